"""The Hugging Face hub, as far as what it says has to be told to a person."""

from __future__ import annotations

import errno
import os

from pytest_llem.engines.pytorch.refusals import one_line

#: Errors of a cache that cannot be written; others of the operating system are the network's.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

_OFFLINE = "HF_HUB_OFFLINE is set, so the hub was not asked"

#: Why this process does not ask the hub: what :func:`go_offline` was given.
_unreachable: list[str] = []


def not_cached() -> str:
    """Return the error where the hub is not to be asked and the cache does not hold the model."""
    return f"not in the Hugging Face cache ({_unreachable[-1] if _unreachable else _OFFLINE})"


def unreachable() -> str | None:
    """Ask the hub for any answer, and return why there is none; None where it answers, or is not to be asked.

    It takes up to ``HF_HUB_ETAG_TIMEOUT`` (10 s).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the network's: a dozen types over as many libraries
        return f"the Hugging Face hub cannot be reached: {type(error).__name__}: {one_line(error)[:200]}"
    return None


def go_offline(reason: str) -> None:
    """Have this process take what is in the hub's cache, and not ask the hub."""
    from huggingface_hub import constants

    _unreachable.append(reason)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
    constants.HF_HUB_OFFLINE = True


def refusal(error: Exception, revision: str | None, what: str = "model") -> str:
    """Return in a line why the hub does not give a repository.

    Args:
        error: What huggingface_hub raised.
        revision: That was asked for; None for the main branch.
        what: The kind of repository.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"no name of a hub {what} either (expected owner/name)"
    if isinstance(error, GatedRepoError):
        return "gated on the Hugging Face hub (accept its terms there and set HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hugging Face hub has it, but no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the Hugging Face hub, or private (then set HF_TOKEN)"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = error.filename or "the Hugging Face cache"
        return f"{where} cannot be written ({os.strerror(error.errno)}): set HF_HOME to a folder that can"
    # What is left is the network's: a dozen types over as many libraries.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return f"the Hugging Face hub could not be asked ({type(cause).__name__}: {one_line(cause)[:200]})"
