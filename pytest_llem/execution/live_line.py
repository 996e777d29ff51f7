"""Lines of ours while pytest runs: one below its own that is rewritten and goes again, and ones that stay."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

#: It is rewritten no more often than this, in s.
AT_MOST_EVERY_S = 0.5

# pytest may be in the middle of a line, and counts what it has written there. So the cursor goes down, and comes
# back to where it was. Every terminal since the VT100 knows these.
_MAKE_ROOM = "\x1bD\x1bM"  # down a line, which scrolls the last one up, and up again
_BELOW, _BACK = "\x1b7\x1b[B\r\x1b[2K", "\x1b8"  # keep the place, go to the line below and clear it; go back


@contextmanager
def live_line(config: pytest.Config) -> Iterator[Line | None]:
    """Give the line, until the context ends; None where nobody would see it live.

    That is where standard output is no terminal, with ``-q``, and in a worker of xdist. To be entered while pytest
    does not capture the output: the line then shows also while it does.
    """
    if not is_seen(config):
        yield None
        return
    sys.stdout.flush()
    line = Line(os.dup(sys.stdout.fileno()), sys.stdout.encoding)
    try:
        yield line
    finally:
        line.close()


def is_seen(config: pytest.Config) -> bool:
    """Whether somebody would see a live line."""
    if not config.pluginmanager.has_plugin("terminalreporter") or hasattr(config, "workerinput"):
        return False
    try:
        is_terminal = sys.stdout.isatty() and sys.stdout.fileno() >= 0
    except (OSError, ValueError, AttributeError):  # closed, or not there at all
        return False
    return is_terminal and config.get_verbosity() >= 0 and os.environ.get("TERM", "dumb") != "dumb"


class Line:
    """The line below the cursor of a terminal.

    Args:
        fd: The terminal; it is closed in the end.
        encoding: What it takes.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        self._fd = fd
        self._encoding = encoding
        self._is_shown = False
        self._at = 0.0

    @property
    def width(self) -> int:
        """How many characters fit. The last column stays free: not every terminal stays in the line there."""
        try:
            columns = os.get_terminal_size(self._fd).columns
        except OSError:  # gone
            columns = 0
        return (columns or 80) - 1

    @property
    def is_due(self) -> bool:
        """Whether it may be rewritten now."""
        return not self._is_shown or time.monotonic() - self._at >= AT_MOST_EVERY_S

    def show(self, compose: Callable[[int], str]) -> None:
        """Show what *compose* makes of the width, in place of what is there, unless that is but a moment old."""
        if self.is_due:
            self._is_shown, self._at = True, time.monotonic()
            self._write(compose(self.width))

    def erase(self) -> None:
        """Leave the line empty: somebody else is about to write."""
        if self._is_shown:
            self._is_shown = False
            self._write("")

    def close(self) -> None:
        """Leave it empty for good."""
        self.erase()
        fd, self._fd = self._fd, -1  # a number that is soon somebody else's
        os.close(fd)

    def _write(self, text: str) -> None:
        shown = f"{_MAKE_ROOM}{_BELOW}{text}{_BACK}".encode(self._encoding, errors="replace")
        with suppress(OSError, ValueError):  # nobody looks any more
            _, takes_it, _ = select.select([], [self._fd], [], 0)
            if takes_it:  # or somebody has stopped it with Ctrl-S, and the experiment is not to wait
                os.write(self._fd, shown)


def say(config: pytest.Config, line: str) -> None:
    """Write a line of ours below what pytest has written, unless ``-q`` was given; one that stays."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and config.get_verbosity() >= 0:
        reporter.ensure_newline()
        reporter.write_line(f"llem: {line}")
