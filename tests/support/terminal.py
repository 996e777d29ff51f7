"""Emulate a terminal, with the sequences that pytest and the plugin use, to see its screen after each chunk."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from fcntl import ioctl
from pathlib import Path

_ESCAPE = re.compile(r"\x1b(?:\[([0-9;?]*)([A-Za-z])|\](?:[^\x07\x1b]*)(?:\x07|\x1b\\)|([78DM]))")


class Screen:
    """The rows of a terminal and its cursor.

    Args:
        columns: Width.
        rows: Height; text below the last row scrolls the others up.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.gone: list[str] = []  # rows that have scrolled out at the top
        self._lines = [""] * rows
        self._row = self._column = 0
        self._saved = (0, 0)
        self._rest = ""

    def lines(self) -> list[str]:
        """Return all rows, with those that have scrolled off first."""
        return [line.rstrip() for line in [*self.gone, *self._lines]]

    def write(self, text: str) -> None:
        text, self._rest, at = self._rest + text, "", 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
            elif found := _ESCAPE.match(text, at):
                self._apply(found)
                at = found.end()
            else:
                self._rest = text[at:]  # the chunk ends within it
                return

    def _put(self, one: str) -> None:
        if one == "\r":
            self._column = 0
        elif one == "\n":
            self._down()
        elif one.isprintable():
            if self._column == self.columns:
                self._down()
                self._column = 0
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + one + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        if self._row == self.rows - 1:
            self.gone.append(self._lines.pop(0))
            self._lines.append("")
        else:
            self._row += 1

    def _apply(self, found: re.Match[str]) -> None:
        number, letter, single = found.groups()
        if single == "7":
            self._saved = (self._row, self._column)
        elif single == "8":
            self._row, self._column = self._saved
        elif single == "D":
            self._down()
        elif single == "M":
            assert self._row > 0
            self._row -= 1
        elif letter == "B":
            self._row = min(self._row + int(number or 1), self.rows - 1)
        elif letter == "K":
            assert number == "2"
            self._lines[self._row] = ""
        else:
            assert letter in (None, "m"), f"unknown sequence: {found.group()!r}"


def watch(
    command: Sequence[str],
    screen: Screen,
    on_change: Callable[[Screen], None],
    limit_s: float = 120,
    folder: Path | None = None,
) -> int:
    """Run *command* in a terminal, and return its exit status.

    Args:
        command: Program and arguments.
        screen: Receives its output.
        on_change: Called after each chunk. An exception ends the command.
        limit_s: Time limit in s.
        folder: Folder to run it in; None for the current one.
    """
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", screen.rows, screen.columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI", "NO_COLOR")}
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**env, "TERM": "xterm"},
        start_new_session=True,
    ) as process:
        os.close(terminal)
        deadline = time.monotonic() + limit_s
        try:
            while True:
                ready, _, _ = select.select([controller], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, "the command exceeds its time limit"
                try:
                    chunk = os.read(controller, 1 << 16)
                except OSError:  # the other end is closed
                    break
                screen.write(chunk.decode("utf-8", "replace"))
                on_change(screen)
        except BaseException:
            process.kill()  # with SIGKILL
            raise
        finally:
            os.close(controller)
    return process.returncode
