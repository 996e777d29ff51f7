"""The Hugging Face hub, as far as what it says has to be told to a person."""

from __future__ import annotations

import errno
import os

from pytest_llem.backends.refusals import one_line

#: Errors of a cache that cannot be written; others of the operating system are the network's.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

#: In place of asking, with HF_HUB_OFFLINE and nothing in the cache.
OFFLINE = "not in the Hugging Face cache (HF_HUB_OFFLINE is set, so the hub was not asked)"


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
