"""What transformers refuses to do, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pytest_llem.engines.protocol import PreflightError

#: Libraries whose errors of these kinds are sentences to the user.
LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "huggingface_hub")

#: The rest of a message, whatever it goes on about.
MESSAGE_CAP = 600


@contextmanager
def library_errors_as_preflight(what: str) -> Iterator[None]:
    """Turn what a library refuses within into one line.

    Only an error from the library's own code is: any other is one that nobody foresaw, and keeps its traceback.

    Args:
        what: What it refuses, for the message.

    Raises:
        PreflightError: It refuses, or lacks a package.
    """
    try:
        yield
    except PreflightError:
        raise
    except ImportError as error:  # how transformers reports a package that is not installed
        raise PreflightError(f"{what}: {one_line(error)}") from error
    except (ValueError, NotImplementedError, OSError) as error:  # OSError: a folder that holds no model
        if _raised_in(error) not in LIBRARIES:
            raise
        raise PreflightError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MESSAGE_CAP else f"{text[: MESSAGE_CAP - 1]}…"


def _raised_in(error: BaseException) -> str:
    """Return the top-level package whose code *error* comes from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).partition(".")[0]
