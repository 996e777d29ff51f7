"""Turn errors of transformers and similar libraries into one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pytest_llem.engines.protocol import PreflightError

#: Libraries whose ValueErrors, RuntimeErrors and OSErrors have messages for users.
LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "huggingface_hub")

#: Libraries that raise TypeError or AttributeError if an argument of ``generate`` has a wrong type, which
#: transformers seldom checks.
TYPE_CHECKERS = ("transformers", "torch")

#: Maximum length of a message, in characters.
MAX_MESSAGE_LENGTH = 600


@contextmanager
def library_errors_as_preflight(what: str, *, with_type_errors: bool = False) -> Iterator[None]:
    """Turn a library's error in the context into a PreflightError of one line.

    Only errors raised by the library's own code are turned. Others are unexpected and keep their traceback.

    Args:
        what: What failed; the beginning of the message.
        with_type_errors: Whether TypeError and AttributeError are turned too, because the library gets unchecked
            values of the study.

    Raises:
        PreflightError: The library refuses a setting, or a package that it needs is not installed.
    """
    try:
        yield
    except PreflightError:
        raise
    except ImportError as error:  # transformers reports a missing package this way
        raise PreflightError(f"{what}: {one_line(error)}") from error
    except (ValueError, RuntimeError, OSError) as error:  # OSError: a folder that holds no model
        if _raised_in(error) not in LIBRARIES:
            raise
        raise PreflightError(f"{what}: {one_line(error)}") from error
    except (TypeError, AttributeError) as error:
        if not with_type_errors or _raised_in(error) not in TYPE_CHECKERS:
            raise
        raise PreflightError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, of at most MAX_MESSAGE_LENGTH characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[: MAX_MESSAGE_LENGTH - 1]}…"


def _raised_in(error: BaseException) -> str:
    """Return the top-level package whose code raised *error*."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).partition(".")[0]
