"""Wait before an experiment, so that it starts on a GPU as cool and as idle as the first one did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from pytest_llem.hardware.gpu_state import GpuState, GpuStates, gpu_sensors
from pytest_llem.results.experiment import GapRecord

#: How far a GPU may be above its temperature and power before the first experiment, in °C and in W.
TEMPERATURE_MARGIN_C = 2.0
POWER_MARGIN_W = 3.0

#: Minimum and maximum duration of an automatic gap, in s.
MIN_S = 5.0
MAX_S = 120.0

#: Time between two readings of the GPUs, in s.
POLL_S = 0.5

#: Longest single sleep, in s: longer gaps are slept in parts, as time.sleep refuses huge values.
MAX_SLEEP_S = 86_400.0

#: Time between two reports of the remaining time, in s.
REPORT_PERIOD_S = 1.0


@dataclass
class CoolDown:
    """Waits in the gaps, which are idle times between the experiments of a session.

    Attributes:
        sensors: Creates a context that yields a function, which reads the GPUs' states.
        sleep: Sleeps for the given seconds.
        clock: A monotonic clock, in s.
    """

    sensors: Callable[[], AbstractContextManager[Callable[[], GpuStates]]] = gpu_sensors
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _targets: dict[str, GpuState] = field(default_factory=dict, init=False)

    def record_target(self) -> None:
        """Record the GPUs' states before the first experiment: automatic gaps wait until they are reached again.

        If called repeatedly, the lower values count: another process may have used the GPUs in one of the calls.
        """
        with self.sensors() as read:
            known = {uuid: state for uuid, state in read().items() if state.temperature_c is not None}
        self._targets |= {uuid: _lower(state, self._targets.get(uuid, state)) for uuid, state in known.items()}

    @property
    def targets(self) -> dict[str, tuple[float | None, float | None]]:
        """Temperature in °C and power in W that automatic gaps wait for, by UUID."""
        return {uuid: (state.temperature_c, state.power_w) for uuid, state in self._targets.items()}

    def use_targets(self, targets: Mapping[str, tuple[float | None, float | None]]) -> None:
        """Use the targets that another process recorded."""
        self._targets = {uuid: GpuState(*target) for uuid, target in targets.items()}

    def will_wait(
        self, gap: float | Literal["auto"], at_least: float = 0.0, uuids: Collection[str] | None = None
    ) -> bool:
        """Return whether :meth:`wait` is expected to wait. The GPUs are not read."""
        return at_least > 0 or (bool(self._of(uuids)) if gap == "auto" else gap > 0)

    def wait(
        self,
        gap: float | Literal["auto"],
        at_least: float = 0.0,
        report: Callable[[str], None] | None = None,
        uuids: Collection[str] | None = None,
    ) -> GapRecord:
        """Wait, and return for how long and why.

        Args:
            gap: Duration in s, or ``auto``: until the GPUs are in their first state again.
            at_least: Minimum duration, in s.
            report: Called about every second or more often with a text about the reason and the remaining time.
            uuids: GPUs of the experiment: others, which may be in use, are not waited for. None for all.
        """
        began = self.clock()
        if gap == "auto":
            waited = self._until_settled(began, report or (lambda text: None), self._of(uuids))
            if waited.seconds >= at_least:
                return waited
            wanted = at_least
        else:
            wanted = max(gap, at_least)
        if not wanted:
            return GapRecord(seconds=0.0, reason="skipped", note="no gap is configured")
        while (left := wanted - (self.clock() - began)) > 0:
            if report is not None:
                report(f"idle, {math.ceil(left)} s left")
            self.sleep(min(left, MAX_SLEEP_S if report is None else REPORT_PERIOD_S))
        return GapRecord(seconds=self.clock() - began, reason="fixed")

    def _of(self, uuids: Collection[str] | None) -> dict[str, GpuState]:
        """Return the targets of some GPUs, or of all."""
        return {uuid: state for uuid, state in self._targets.items() if uuids is None or uuid in uuids}

    def _until_settled(
        self, began: float, report: Callable[[str], None], targets: Mapping[str, GpuState]
    ) -> GapRecord:
        if not targets:
            note = "it uses no GPU" if self._targets else "no GPU's temperature could be read"
            return GapRecord(seconds=0.0, reason="skipped", note=note)
        with self.sensors() as read:
            if all(state.temperature_c is None for uuid, state in read().items() if uuid in targets):
                return GapRecord(seconds=0.0, reason="skipped", note="no GPU's temperature can be read any more")
            while True:
                waited, now = self.clock() - began, read()
                # A GPU that has disappeared counts as not settled.
                texts = (_unreached(now.get(uuid, GpuState()), first) for uuid, first in targets.items())
                unreached = next(filter(None, texts), None)
                if waited >= MIN_S and unreached is None:
                    return GapRecord(seconds=waited, reason="target")
                if waited >= MAX_S:
                    return GapRecord(seconds=waited, reason="timeout")
                if unreached is None:
                    reason = f"cool and idle again; at least {math.ceil(MIN_S - waited)} s more"
                else:
                    reason = f"one GPU: {unreached}; at most {math.ceil(MAX_S - waited)} s more"
                report(f"cooling down, {int(waited)} s ({reason})")
                self.sleep(min(POLL_S, MAX_S - waited))


def _lower(one: GpuState, other: GpuState) -> GpuState:
    return GpuState(
        _min(one.temperature_c, other.temperature_c),
        _min(one.power_w, other.power_w),
    )


def _min(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _unreached(now: GpuState, first: GpuState) -> str | None:
    """Return a text about the temperature or power that a GPU has not reached yet; None if it has reached both."""
    for value, target, margin, unit in (
        (now.temperature_c, first.temperature_c, TEMPERATURE_MARGIN_C, "°C"),
        (now.power_w, first.power_w, POWER_MARGIN_W, "W"),
    ):
        if target is not None and (value is None or value > target + margin):
            current = "not readable" if value is None else f"{value:.0f} {unit}"
            return f"{current}, waiting for {target + margin:.0f} {unit}"
    return None
