"""Handle the output of an experiment's process: keep it for the report, or forward it to the terminal."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest


def output_forwarder(config: pytest.Config, before: Callable[[], None] = lambda: None) -> Callable[[bytes], None]:
    """Return a function that forwards an experiment's output to the terminal with ``-s``, and drops it otherwise.

    Args:
        config: The pytest configuration.
        before: Called before each write to the terminal.
    """
    if not _is_forwarded(config):
        return lambda chunk: None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    encoding = sys.stdout.encoding or "utf-8"

    def write(chunk: bytes) -> None:
        text = decoder.decode(chunk)
        before()
        with suppress(OSError, ValueError):  # standard output is closed: the experiment continues
            sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
            sys.stdout.flush()

    return write


def add_section(item: pytest.Item, output: str, *, failed: bool) -> None:
    """Put *output* on the item's report if pytest will show it.

    pytest keeps sections to the end of the session, which would add up over thousands of passing experiments.
    """
    is_shown = failed or {"P", "A"} & set(item.config.getoption("reportchars", ""))
    if output.strip() and is_shown and not _is_forwarded(item.config):
        item.add_report_section("call", "experiment output", output)


def add_server_section(item: pytest.Item, output: str) -> None:
    """Put the *output* of a server on the report of the item that failed on it. ``-s`` does not forward it."""
    if output.strip():
        item.add_report_section("call", "server output", output)


def print_output(config: pytest.Config, output: str) -> None:
    """Print an experiment's output for pytest to capture, unless it was forwarded."""
    if output and not _is_forwarded(config):
        print(output, end="" if output.endswith("\n") else "\n")


def _is_forwarded(config: pytest.Config) -> bool:
    """Return whether ``-s`` was given and this process is not an xdist worker."""
    return getattr(config.option, "capture", None) == "no" and not hasattr(config, "workerinput")
