"""Check and wait for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil


def gone(pid: int) -> bool:
    """Return whether a process has ended; it may not have been reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children_called(name: str) -> list[psutil.Process]:
    """Return this process's living children that have *name* in an argument; one may end during the look."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any(name in argument for argument in child.cmdline()):
                found.append(child)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until *condition* holds; fail if it does not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
