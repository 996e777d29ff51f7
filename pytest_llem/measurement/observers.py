"""Observe what uses the devices, and what measuring costs, during a window or during its turns."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from pytest_llem.energy.account import Account
from pytest_llem.measurement.contention import (
    Activity,
    ContentionWatch,
    assess_contention,
    join_activities,
    root_of,
)
from pytest_llem.measurement.cpu_activity import own_cpus
from pytest_llem.measurement.turns import Turn, Turns
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import InterleavingRecord, TurnRecord
from pytest_llem.results.statistics import total_of


class WindowObservers:
    """Observes contention, and the CPU time of the measurement, during one or several windows.

    Args:
        gpus: UUIDs of the GPUs that the experiment runs on.
        harness: Pids of the processes that wait or measure meanwhile: the supervisor and the pytest processes.
        processes: Pids of other processes that run the model, with their descendants: those of a server.
        on_first_window: Called at the start of the first window, and again if that is restarted.
    """

    def __init__(
        self,
        gpus: Sequence[str],
        harness: Sequence[int],
        processes: Sequence[int] = (),
        on_first_window: Callable[[], None] = lambda: None,
    ) -> None:
        self._gpus, self._harness, self._processes, self._on_first_window = (
            gpus,
            harness,
            processes,
            on_first_window,
        )
        self._activities: list[Activity] = []
        self._harness_seconds: list[float | None] = []
        self._cpus_while_waiting: list[float | None] = []
        self._stopped = False
        self._watch: ContentionWatch | None = None

    def begin(self) -> None:
        """Start or restart observing, at the start of a window."""
        if not self._activities:
            self._on_first_window()
        last = self._watch
        self._watch = ContentionWatch([root_of(self._harness), *self._processes], self._harness)
        if last is not None and len(self._cpus_while_waiting) < len(self._activities):  # not in a restarted turn
            self._cpus_while_waiting.append(own_cpus(last.after, self._watch.before))
        self._harness_before = cpu_seconds_of(self._harness)

    def end(self, account: Account, turn: Turn | None = None) -> None:
        """Stop observing, at the end of a window, which was a *turn* if two experiments are interleaved."""
        assert self._watch is not None
        self._harness_seconds.append(self._harness_spent(account.harness_cpu_seconds))
        self._activities.append(self._watch.activity(self._gpus, None if turn is None else turn.partner))
        self._stopped |= turn is not None and turn.stopped

    def _harness_spent(self, meters: float | None) -> float | None:
        """Return the CPU time of measuring since the window began, in s; None if it is unknown.

        Args:
            meters: CPU time of the meters' own processes, in s; None if there are none.
        """
        if not self._harness:
            return meters
        after = cpu_seconds_of(self._harness)
        if self._harness_before is None or after is None:
            return None
        return after - self._harness_before + (meters or 0.0)

    @property
    def harness_cpu_seconds(self) -> float | None:
        """CPU time of measuring in all windows, in s; None if unknown."""
        return total_of(self._harness_seconds)

    def contention(self, seconds: float) -> Contention:
        """Return the contention in all windows, which took that many *seconds*."""
        return assess_contention(*join_activities(self._activities), seconds)

    @property
    def waiting_cpus(self) -> float | None:
        """Mean number of CPUs that this experiment used while it waited for its last turn; None if unknown."""
        return self._cpus_while_waiting[-1] if self._cpus_while_waiting else None

    def interleaving(self, turns: Turns, records: Sequence[TurnRecord]) -> InterleavingRecord:
        """Return the record of an interleaved measurement."""
        known = [one for one in self._cpus_while_waiting if one is not None]
        return InterleavingRecord(
            pair=turns.pair,
            min_turn_seconds=turns.min_seconds,
            waiting_cpus=statistics.median(known) if known else None,
            stopped=self._stopped,
            turns=list(records),
        )


def cpu_seconds_of(pids: Iterable[int]) -> float | None:
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
