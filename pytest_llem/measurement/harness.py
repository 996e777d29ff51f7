"""Measure the CPU time of the measurement itself: the processes that wait or measure while an engine works."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable


class Harness:
    """The processes that wait or measure while an engine works. Create it before a window, read it after.

    Args:
        pids: Pids of the supervisor and of the pytest processes; may be empty.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._before = _spent(self._pids)

    def cpu_seconds(self, meters: float | None) -> float | None:
        """Return the CPU time that these processes used since, in s; None if unknown or there are no processes.

        Args:
            meters: CPU time of the meters' own processes, in s; None if there are none.
        """
        if not self._pids:
            return meters
        after = _spent(self._pids)
        if self._before is None or after is None:
            return None
        return after - self._before + (meters or 0.0)


def _spent(pids: Iterable[int]) -> float | None:
    """Return the CPU time of these processes so far, in s, without their children; None if one cannot be read."""
    try:
        return sum(map(_cpu_seconds, pids))
    except (AttributeError, OSError):  # not Linux; or a process has ended, or belongs to another user
        return None


def _cpu_seconds(pid: int) -> float:
    """Return a process's CPU time in s. Its resolution is 1 ns, that of /proc only 10 ms.

    Raises:
        AttributeError: The system has no such clock.
        OSError: There is no such process, or it may not be read.
    """
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)
