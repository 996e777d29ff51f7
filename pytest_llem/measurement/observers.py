"""Observe what uses the devices, and what measuring costs, during a window or during its turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Protocol

from pytest_llem.energy.account import Account
from pytest_llem.measurement.contention import (
    Activity,
    ContentionWatch,
    assess_contention,
    join_activities,
    root_of,
)
from pytest_llem.measurement.cpu_activity import own_cpus
from pytest_llem.measurement.harness import Harness
from pytest_llem.measurement.turns import Turn, Turns
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import InterleavingRecord, TurnRecord
from pytest_llem.results.statistics import total_of


class Observed(Protocol):
    """The part of a loaded engine that observers use."""

    @property
    def gpus(self) -> Sequence[str]:
        """UUIDs of its GPUs."""

    def reset_peak_memory(self) -> None:
        """Start to record the peak memory use."""


class WindowObservers:
    """Observes contention, and the CPU time of the measurement, during one or several windows.

    Args:
        engine: The loaded engine.
        harness: Pids of the supervisor and of the pytest processes.
        processes: Pids of other processes that run the model, with their descendants: those of a server.
    """

    def __init__(self, engine: Observed, harness: Sequence[int], processes: Sequence[int] = ()) -> None:
        self._engine, self._pids, self._processes = engine, harness, processes
        self._activities: list[Activity] = []
        self._harness_seconds: list[float | None] = []
        self._waits: list[float | None] = []
        self._stopped = False
        self._watch: ContentionWatch | None = None

    def begin(self) -> None:
        """Start or restart observing, at the start of a window."""
        if not self._activities:
            self._engine.reset_peak_memory()
        last = self._watch
        self._watch = ContentionWatch([root_of(self._pids), *self._processes], self._pids)
        if last is not None and self._activities:
            self._waits.append(own_cpus(last.after, self._watch.before))
        self._harness = Harness(self._pids)

    def end(self, account: Account, turn: Turn | None = None) -> None:
        """Stop observing, at the end of a window, which was a *turn* if two experiments are interleaved."""
        assert self._watch is not None
        self._harness_seconds.append(self._harness.cpu_seconds(account.harness_cpu_seconds))
        self._activities.append(self._watch.activity(self._engine.gpus, None if turn is None else turn.partner))
        self._stopped |= turn is not None and turn.stopped

    @property
    def harness_cpu_seconds(self) -> float | None:
        """CPU time of measuring in all windows, in s; None if unknown."""
        return total_of(self._harness_seconds)

    def contention(self, seconds: float) -> Contention:
        """Return the contention in all windows, which took that many *seconds*."""
        return assess_contention(*join_activities(self._activities), seconds)

    @property
    def waiting_cpus(self) -> float | None:
        """CPUs that this experiment used while it waited for its last turn; None if unknown or for the first."""
        return self._waits[-1] if self._waits else None

    def interleaving(self, turns: Turns, records: Sequence[TurnRecord]) -> InterleavingRecord:
        """Return the record of a measurement alternately."""
        known = [one for one in self._waits if one is not None]
        return InterleavingRecord(
            pair=turns.pair,
            min_turn_seconds=turns.min_seconds,
            waiting_cpus=statistics.median(known) if known else None,
            stopped=self._stopped,
            turns=list(records),
        )
