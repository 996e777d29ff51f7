"""Determine when energy counters tick, for several devices at once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pytest_llem.hardware.nvml import NvmlError

#: Longest wait for a tick, in s. Counters tick every 20 to 100 ms on all GPUs tested so far.
MAX_TICK_S = 0.5

_POLL_S = 0.001


@dataclass(frozen=True)
class Tick:
    """A tick of a counter.

    Attributes:
        millijoules: Value of the counter after the tick, in mJ.
        at: Time of the tick on the monotonic clock, in s: the middle of the interval in which it lies.
        width: Length of that interval, in s: from the last read before the tick to the first read after it.
    """

    millijoules: int
    at: float
    width: float


def wait_for_ticks(
    counters: Mapping[str, Callable[[], int]], count: int = 1, periods: Mapping[str, float] | None = None
) -> dict[str, list[Tick] | str]:
    """Wait until every counter has ticked *count* times, reading one after the other.

    No counter delays the others: one that fails, or does not change for :data:`MAX_TICK_S`, is given up.

    Args:
        counters: For each device a function that returns its counter in mJ, or raises
            :class:`~pytest_llem.hardware.nvml.NvmlError`.
        count: Number of ticks to wait for.
        periods: Known time between two ticks by device, in s. It limits the interval in which a tick lies.

    Returns:
        For each device its ticks, or the reason why there are fewer than *count*.
    """
    watches = {device: _CounterWatch(read, (periods or {}).get(device)) for device, read in counters.items()}
    waiting = list(watches.values())
    while waiting:
        for watch in waiting:
            watch.read()
        waiting = [watch for watch in waiting if watch.failure is None and len(watch.ticks) < count]
        if waiting:
            time.sleep(_POLL_S)
    return {device: watch.failure or watch.ticks for device, watch in watches.items()}


def tick_period(ticks: Sequence[Tick]) -> float | None:
    """Return the time between two ticks in s; None for fewer than two."""
    # A late read makes one gap too long and the next too short, which the median ignores.
    gaps = [after.at - before.at for before, after in pairwise(ticks)]
    return statistics.median(gaps) if gaps else None


class _CounterWatch:
    """Reads one counter until it ticks.

    Args:
        read: Returns the counter in mJ.
        max_width: Largest width of a tick, in s; None if unknown.
    """

    def __init__(self, read: Callable[[], int], max_width: float | None) -> None:
        self._read = read
        self._max_width = max_width
        self._value: int | None = None
        self._began = self._changed_at = 0.0
        self._call_s = math.inf
        self.ticks: list[Tick] = []
        self.failure: str | None = None

    def read(self) -> None:
        began = time.monotonic()
        try:
            value = self._read()
        except NvmlError as error:
            self.failure = str(error)
            return
        ended = time.monotonic()
        # Assume that the driver reads the counter in the middle of the shortest call. A longer call was delayed
        # before that instant or after it, so that the instant lies between these two.
        self._call_s = min(self._call_s, ended - began)
        latest = ended - self._call_s / 2
        if self._value is None:
            self._changed_at = latest
        elif value != self._value:
            # The call before may have been slower than this one, as the first call after a pause is.
            width = latest - (self._began + self._call_s / 2)
            if self._max_width is not None:
                width = min(width, self._max_width)
            self.ticks.append(Tick(value, latest - width / 2, width))
            self._changed_at = latest
        elif began + self._call_s / 2 - self._changed_at > MAX_TICK_S:
            self.failure = f"the energy counter stood still for {MAX_TICK_S} s (at {value} mJ)"
        self._value, self._began = value, began
