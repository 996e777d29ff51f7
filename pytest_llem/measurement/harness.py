"""What measuring costs: the processor time of the processes around the experiment's own."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable


class Harness:
    """The processes that wait, or measure, while an engine works. Made before a window, and asked after it.

    Args:
        pids: Of the supervisor and of the pytest processes; none where there are none.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._before = _spent(self._pids)

    def cpu_seconds(self, meters: float | None) -> float | None:
        """Return the processor time that they took since, in s; None where there are none, or one cannot be read.

        Args:
            meters: What the meters' own processes took, in s; None where there are none.
        """
        if not self._pids:
            return meters
        after = _spent(self._pids)
        if self._before is None or after is None:
            return None
        return after - self._before + (meters or 0.0)


def _spent(pids: Iterable[int]) -> float | None:
    """Return the processor time that these processes have taken so far, in s, without their children's."""
    try:
        return sum(map(_cpu_seconds, pids))
    except (AttributeError, OSError):  # no Linux; gone, or another user's
        return None


def _cpu_seconds(pid: int) -> float:
    """Return a process's processor time in s, to the nanosecond: what /proc says comes in steps of 10 ms.

    Raises:
        AttributeError: The system has no such clock.
        OSError: There is no such process, or it is not to be looked at.
    """
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)
