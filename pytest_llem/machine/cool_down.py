"""Idle time before an experiment, so that each starts on a GPU as cool and as idle as the first one did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from pytest_llem.hardware.gpu_state import GpuSensors, GpuState, GpuStates
from pytest_llem.results.experiment import GapRecord

#: How far above what it was before the first experiment a GPU may still be, in °C and in W.
TEMPERATURE_MARGIN_C = 2.0
POWER_MARGIN_W = 3.0

#: An automatic gap takes at least and at most so many seconds.
MIN_S = 5.0
MAX_S = 120.0

#: Seconds between two looks at the GPUs.
POLL_S = 0.5

#: The longest single sleep, in seconds; the system takes no more than some centuries.
MAX_SLEEP_S = 86_400.0

#: Seconds from one word on how long it will take to the next.
TELL_S = 1.0


@dataclass
class Gaps:
    """The idle times of one process.

    Attributes:
        gauges: What gives, on being entered, a function that looks at the GPUs.
        sleep: Sleeps for so many seconds.
        clock: Never goes back; in seconds.
    """

    gauges: Callable[[], AbstractContextManager[Callable[[], GpuStates]]] = GpuSensors
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _first: dict[str, GpuState] = field(default_factory=dict, init=False)

    def note_first(self) -> None:
        """Look at the GPUs before the first experiment: automatic gaps wait until they are like that again.

        Of several looks the lower figures count: others may have been busy there.
        """
        with self.gauges() as look:
            seen = {uuid: state for uuid, state in look().items() if state.temperature_c is not None}
        self._first |= {uuid: _lower(state, self._first.get(uuid, state)) for uuid, state in seen.items()}

    def will_wait(self, gap: float | Literal["auto"], at_least: float = 0.0) -> bool:
        """Whether :meth:`wait` would idle, as far as that can be told without a look."""
        return at_least > 0 or (bool(self._first) if gap == "auto" else gap > 0)

    def wait(
        self, gap: float | Literal["auto"], at_least: float = 0.0, tell: Callable[[str], None] | None = None
    ) -> GapRecord:
        """Idle, and return for how long and why.

        Args:
            gap: Seconds, or ``auto``: until the GPUs are as they were at first.
            at_least: Seconds that it takes in any case.
            tell: Called every second or oftener with what is waited for, and for how long yet; None where nobody
                wants to know.
        """
        began = self.clock()
        if gap == "auto":
            waited = self._until_settled(began, tell or (lambda text: None))
            if waited.seconds >= at_least:
                return waited
            wanted = at_least
        else:
            wanted = max(gap, at_least)
        if not wanted:
            return GapRecord(seconds=0.0, reason="skipped", note="none is wanted")
        while (left := wanted - (self.clock() - began)) > 0:
            if tell is not None:
                tell(f"idle, {math.ceil(left)} s left")
            self.sleep(min(left, MAX_SLEEP_S if tell is None else TELL_S))
        return GapRecord(seconds=self.clock() - began, reason="fixed")

    def _until_settled(self, began: float, tell: Callable[[str], None]) -> GapRecord:
        if not self._first:
            return GapRecord(seconds=0.0, reason="skipped", note="no GPU's temperature could be read")
        with self.gauges() as look:
            if all(state.temperature_c is None for state in look().values()):
                return GapRecord(seconds=0.0, reason="skipped", note="no GPU's temperature can be read any more")
            while True:
                waited, now = self.clock() - began, look()
                if waited >= MIN_S and self._is_settled(now):
                    return GapRecord(seconds=waited, reason="target")
                if waited >= MAX_S:
                    return GapRecord(seconds=waited, reason="timeout")
                tell(f"cooling down, {int(waited)} s ({self._obstacle(now, waited)})")
                self.sleep(min(POLL_S, MAX_S - waited))

    def _is_settled(self, now: GpuStates) -> bool:
        # One that is not seen any more is not known to be.
        return all(uuid in now and _is_settled(now[uuid], first) for uuid, first in self._first.items())

    def _obstacle(self, now: GpuStates, waited: float) -> str:
        """Return what keeps the gap from ending, and for how long at most."""
        for number, (uuid, first) in enumerate(self._first.items()):
            if missing := _missing(now.get(uuid, GpuState()), first):
                return f"GPU {number}: {missing}; at most {math.ceil(MAX_S - waited)} s more"
        return f"as cool as at first; at least {math.ceil(MIN_S - waited)} s more"


def _lower(one: GpuState, other: GpuState) -> GpuState:
    return GpuState(
        _least(one.temperature_c, other.temperature_c),
        _least(one.power_w, other.power_w),
    )


def _least(one: float | None, other: float | None) -> float | None:
    return min((figure for figure in (one, other) if figure is not None), default=None)


def _is_settled(now: GpuState, first: GpuState) -> bool:
    return _is_down(now.temperature_c, first.temperature_c, TEMPERATURE_MARGIN_C) and _is_down(
        now.power_w, first.power_w, POWER_MARGIN_W
    )


def _missing(now: GpuState, first: GpuState) -> str | None:
    """Return what a GPU has to come down to; None where it has."""
    if not _is_down(now.temperature_c, first.temperature_c, TEMPERATURE_MARGIN_C):
        return _way_down(now.temperature_c, first.temperature_c, TEMPERATURE_MARGIN_C, "°C")
    if not _is_down(now.power_w, first.power_w, POWER_MARGIN_W):
        return _way_down(now.power_w, first.power_w, POWER_MARGIN_W, "W")
    return None


def _way_down(now: float | None, first: float | None, margin: float, unit: str) -> str:
    at = "not to be read" if now is None else f"{now:.0f} {unit}"
    return f"{at}, waiting for {(first or 0.0) + margin:.0f} {unit}"


def _is_down(now: float | None, first: float | None, margin: float) -> bool:
    """Whether a figure is where it was at first, or below. One that was not there then says nothing."""
    return first is None or (now is not None and now <= first + margin)
