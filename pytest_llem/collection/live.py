"""Lines of ours while pytest runs: one below its own that is rewritten and goes again, and ones that stay."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import pytest

#: It is rewritten no more often than this, in s.
EVERY_S = 1.0

# pytest may be in the middle of a line, and counts what it has written there. So the cursor goes down, and comes
# back to where it was. Every terminal since the VT100 knows these.
_MAKE_ROOM = "\x1bD\x1bM"  # down a line, which scrolls the last one up, and up again
_BELOW, _BACK = "\x1b7\x1b[B\r\x1b[2K", "\x1b8"  # keep the place, go to the line below and clear it; go back


@contextmanager
def live_line(config: pytest.Config) -> Iterator[Callable[[str], None] | None]:
    """Give what shows a text in the line, until the context ends; None where nobody would see it live.

    That is where standard output is no terminal, with ``-q``, and in a worker of xdist.
    """
    if not _is_seen(config):
        yield None
        return
    sys.stdout.flush()
    line = _Line(sys.stdout)
    try:
        yield line.show
    finally:
        line.erase()


def _is_seen(config: pytest.Config) -> bool:
    return (
        config.pluginmanager.has_plugin("terminalreporter")
        and not hasattr(config, "workerinput")
        and config.get_verbosity() >= 0
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
    )


class _Line:
    """The line below the cursor of a terminal."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._shown = ""
        self._at = 0.0

    def show(self, text: str) -> None:
        """Show *text* in place of what is there, unless that is a moment old or says the same."""
        now = time.monotonic()
        if text != self._shown and (not self._shown or now - self._at >= EVERY_S):
            self._shown, self._at = text, now
            self._write(text[: shutil.get_terminal_size().columns - 1])

    def erase(self) -> None:
        """Leave the line empty."""
        if self._shown:
            self._shown = ""
            self._write("")

    def _write(self, text: str) -> None:
        encoding = self._terminal.encoding or "utf-8"
        shown = text.encode(encoding, errors="replace").decode(encoding)
        with suppress(OSError, ValueError):  # nobody looks any more
            self._terminal.write(f"{_MAKE_ROOM}{_BELOW}{shown}{_BACK}")
            self._terminal.flush()


def say(config: pytest.Config, line: str) -> None:
    """Write a line of ours below what pytest has written, unless ``-q`` was given; one that stays."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and config.get_verbosity() >= 0:
        reporter.ensure_newline()
        reporter.write_line(f"llem: {line}")
