"""Energy counters that move in ticks, of several devices at once: when each of them did."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pytest_llem.hardware.nvml import NvmlError

#: Counters move in ticks of 20 to 100 ms on the boards seen so far; one that stands still for this long is not
#: waited for any longer.
MAX_TICK_S = 0.5

_PAUSE_S = 0.001


@dataclass(frozen=True)
class Tick:
    """A tick of a counter.

    Attributes:
        millijoules: What it has shown since.
        at: When it came, on the monotonic clock in s: the middle of where it may lie.
        width: How much time that is: between the last look that had not seen it and the one that did.
    """

    millijoules: int
    at: float
    width: float


def ticks(
    counters: Mapping[str, Callable[[], int]], count: int = 1, periods: Mapping[str, float] | None = None
) -> dict[str, list[Tick] | str]:
    """Wait until every counter has ticked *count* times, looking at each in turn.

    None holds the others up: one that fails, or stands still for :data:`MAX_TICK_S`, is given up.

    Args:
        counters: What reads each in mJ, by device; raises
            :class:`~pytest_llem.hardware.nvml.NvmlError` where that cannot be read.
        count: How many ticks to wait for.
        periods: The time between two ticks in s, where it is known: a tick is no older when it is seen.

    Returns:
        For each device its ticks, or why there are not as many.
    """
    watches = {device: _Watch(read, (periods or {}).get(device)) for device, read in counters.items()}
    waiting = list(watches.values())
    while waiting:
        for watch in waiting:
            watch.look()
        waiting = [watch for watch in waiting if watch.failure is None and len(watch.ticks) < count]
        if waiting:
            time.sleep(_PAUSE_S)
    return {device: watch.failure or watch.ticks for device, watch in watches.items()}


def period(seen: Sequence[Tick]) -> float | None:
    """Return the time between two ticks in s; None for fewer than two."""
    # One seen late makes one gap too long and the next too short: the median stays.
    gaps = [after.at - before.at for before, after in pairwise(seen)]
    return statistics.median(gaps) if gaps else None


class _Watch:
    """Looks at one counter."""

    def __init__(self, read: Callable[[], int], longest: float | None) -> None:
        self._read = read
        self._longest = longest
        self._shown: int | None = None
        self._looked = self._moved = 0.0
        self._call = math.inf
        self.ticks: list[Tick] = []
        self.failure: str | None = None

    def look(self) -> None:
        began = time.monotonic()
        try:
            shown = self._read()
        except NvmlError as error:
            self.failure = str(error)
            return
        ended = time.monotonic()
        # A reading is from the same place within every call, here called its middle. One that takes longer than
        # the shortest was held up, before that place or after it: what is added belongs to either side.
        self._call = min(self._call, ended - began)
        earliest, latest = began + self._call / 2, ended - self._call / 2
        if self._shown is None:
            self._moved = latest
        elif shown != self._shown:
            width = latest - self._looked
            if self._longest is not None:
                width = min(width, self._longest)
            self.ticks.append(Tick(shown, latest - width / 2, width))
            self._moved = latest
        elif earliest - self._moved > MAX_TICK_S:
            self.failure = f"the energy counter stood still for {MAX_TICK_S} s (at {shown} mJ)"
        self._shown, self._looked = shown, earliest
