"""Check that the Hugging Face hub can be reached, and turn its errors into one-line messages."""

from __future__ import annotations

import errno
import os

from pytest_llem.engines.library_errors import one_line

#: Errors of a cache that cannot be written. Other errors of the operating system are network errors.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

_OFFLINE = "HF_HUB_OFFLINE is set, so the hub was not asked"

#: Reasons that :func:`go_offline` was given in this process.
_unreachable: list[str] = []


def not_cached_message() -> str:
    """Return the error message for a model that is not in the cache while the hub must not be asked."""
    return f"not in the Hugging Face cache ({_unreachable[-1] if _unreachable else _OFFLINE})"


def unreachable_reason() -> str | None:
    """Return why the hub cannot be reached; None if it answers, or if HF_HUB_OFFLINE is set.

    Waits up to ``HF_HUB_ETAG_TIMEOUT`` (10 s) for a connection, and again for an answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # network errors have a dozen types in as many libraries
        return f"the Hugging Face hub cannot be reached: {type(error).__name__}: {one_line(error)[:200]}"
    return None


def go_offline(reason: str) -> None:
    """Make this process use only the hub's cache. Error messages mention *reason*."""
    from huggingface_hub import constants

    _unreachable.append(reason)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
    constants.HF_HUB_OFFLINE = True


def refusal(error: Exception, revision: str | None, what: str = "model") -> str:
    """Return, in one line, why a repository cannot be downloaded from the hub.

    Args:
        error: The error that huggingface_hub raised.
        revision: The requested revision; None for the main branch.
        what: Kind of repository: ``model`` or ``dataset``.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"not the name of a {what} on the hub either (expected owner/name)"
    if isinstance(error, GatedRepoError):
        return "gated on the Hugging Face hub (accept its terms there and set HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hugging Face hub has it, but no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the Hugging Face hub, or private (then set HF_TOKEN)"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = error.filename or "the Hugging Face cache"
        return f"{where} cannot be written ({os.strerror(error.errno)}): set HF_HOME to a folder that can"
    # All other errors are network errors.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return f"the Hugging Face hub could not be asked ({type(cause).__name__}: {one_line(cause)[:200]})"
