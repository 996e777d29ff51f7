"""Write to the terminal while pytest runs: a live line, lines that stay, and the output of experiments."""

from __future__ import annotations

import codecs
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest

from pytest_llem._plugin.terminal_width import fitted

#: Shortest time between two updates of the line, in s.
MIN_INTERVAL_S = 0.5

# pytest may be in the middle of a line and counts the columns that it has written. So the cursor moves down and
# returns to where it was. Every terminal since the VT100 has these sequences.
_MAKE_ROOM = "\x1bD\x1bM"  # one line down, which scrolls at the bottom of the screen, and up again
_BELOW, _BACK = "\x1b7\x1b[B\r\x1b[2K", "\x1b8"  # save the cursor, clear the line below; restore the cursor


@contextmanager
def live_line(config: pytest.Config) -> Iterator[Line | None]:
    """Yield the live line; None if standard output is not a terminal, with ``-q``, and in an xdist worker.

    Enter it while pytest does not capture output: the line then works also while pytest captures.
    """
    if not is_live(config):
        yield None
        return
    sys.stdout.flush()
    line = Line(os.dup(sys.stdout.fileno()), sys.stdout.encoding)
    try:
        yield line
    finally:
        line.close()


def is_live(config: pytest.Config) -> bool:
    """Return whether a live line can be shown."""
    if not config.pluginmanager.has_plugin("terminalreporter") or hasattr(config, "workerinput"):
        return False
    try:
        is_terminal = sys.stdout.isatty() and sys.stdout.fileno() >= 0
    except (OSError, ValueError, AttributeError):  # standard output is closed or missing
        return False
    return is_terminal and config.get_verbosity() >= 0 and os.environ.get("TERM", "dumb") != "dumb"


class Line:
    """The line below the cursor of a terminal.

    Args:
        fd: File descriptor of the terminal; :meth:`close` closes it.
        encoding: The terminal's encoding.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        self._fd = fd
        self._encoding = encoding
        self._is_shown = False
        self._updated_at = 0.0

    @property
    def width(self) -> int:
        """Usable width in columns. The last column stays free, as some terminals wrap there."""
        try:
            columns = os.get_terminal_size(self._fd).columns
        except OSError:  # the terminal is gone
            columns = 0
        return (columns or 80) - 1

    @property
    def is_due(self) -> bool:
        """Whether the line may be updated now."""
        return not self._is_shown or time.monotonic() - self._updated_at >= MIN_INTERVAL_S

    def show(self, compose: Callable[[int], str]) -> None:
        """Show the text that *compose* returns for a width, unless the shown line is less than 0.5 s old."""
        if self.is_due:
            self._is_shown, self._updated_at = True, time.monotonic()
            self._write(compose(self.width))

    def erase(self) -> None:
        """Clear the line before something else writes to the terminal."""
        if self._is_shown:
            self._is_shown = False
            self._write("")

    def close(self) -> None:
        """Clear the line and close the file descriptor."""
        self.erase()
        fd, self._fd = self._fd, -1  # the number will be reused
        os.close(fd)

    def _write(self, text: str) -> None:
        shown = f"{_MAKE_ROOM}{_BELOW}{text}{_BACK}".encode(self._encoding, errors="replace")
        with suppress(OSError, ValueError):  # the terminal is gone
            _, is_writable, _ = select.select([], [self._fd], [], 0)
            if is_writable:  # not while Ctrl-S stops the terminal: the experiment must not wait for it
                os.write(self._fd, shown)


def print_line(config: pytest.Config, line: str) -> None:
    """Write a line, prefixed ``llem:``, below pytest's output, unless ``-q`` was given.

    Within an item's call pytest captures the terminal's output too, so capturing is suspended meanwhile.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and config.get_verbosity() >= 0:
        capture = config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            reporter.ensure_newline()
            for part in fitted([f"llem: {line}"]):
                reporter.write_line(part, flush=True)


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
