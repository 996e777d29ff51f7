"""What becomes of what an experiment's process writes: kept for the report, or passed on as it comes."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest


def output_forwarder(config: pytest.Config, before: Callable[[], None] = lambda: None) -> Callable[[bytes], None]:
    """Return what takes an experiment's output as it comes: with ``-s`` it goes on to the terminal.

    Args:
        config: Of pytest.
        before: Called each time, before something is written there.
    """
    if not _is_live(config):
        return lambda chunk: None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    encoding = sys.stdout.encoding or "utf-8"

    def write(chunk: bytes) -> None:
        text = decoder.decode(chunk)
        before()
        with suppress(OSError, ValueError):  # nobody reads it any more: the experiment goes on
            sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
            sys.stdout.flush()

    return write


def add_section(item: pytest.Item, output: str, *, failed: bool) -> None:
    """Put *output* on the item's report, where anybody will see it there.

    pytest keeps sections to the end of the session: of thousands of experiments that passed, it need not.
    """
    seen = failed or {"P", "A"} & set(item.config.getoption("reportchars", ""))
    if output.strip() and seen and not _is_live(item.config):
        item.add_report_section("call", "experiment output", output)


def print_output(config: pytest.Config, output: str) -> None:
    """Print what an experiment has written, for pytest to capture, unless it was passed on."""
    if output and not _is_live(config):
        print(output, end="" if output.endswith("\n") else "\n")


def _is_live(config: pytest.Config) -> bool:
    """Whether ``-s`` was given, in a process that has a terminal."""
    return getattr(config.option, "capture", None) == "no" and not hasattr(config, "workerinput")
