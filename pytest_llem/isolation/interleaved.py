"""Run two experiments alternately: both are loaded, and one waits while the other one measures.

Both processes import their packages at the same time. Then each loads and warms up alone, the first one first.
After that they take turns in the order A B B A B A A B …, so that a drift of the machine, also one that
accelerates, is nearly the same for both. This process only gives the turns, and sleeps during them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pytest_llem.isolation import worker
from pytest_llem.isolation.child import MAX_WAIT, Child
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import ExperimentProcess, Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.progress import GpuStatus, Progress, Watcher
from pytest_llem.measurement.turns import END_OF_TURNS, WAITING, Turn
from pytest_llem.results.manifest_records import ErrorRecord

#: A process that uses more CPUs than this while it waits is stopped by a signal from then on.
MAX_WAITING_CPUS = 0.05

#: Phase shown while turns are taken.
IN_TURNS = "measuring alternately"


@dataclass
class Side:
    """One of two interleaved experiments.

    Attributes:
        name: Its name in messages: ``candidate`` or ``reference``.
        job: What its process has to do.
        timeout: Time limit of both sides together, in s, to which the time of downloads is added. Only that of
            the first side is used.
        forkservers: Forkservers to fork it from; None to start an interpreter.
        started: Its process, if that was started in advance, to save time; else None.
        on_output: Called with output of the process as it arrives.
        server: Pid of the first process of the server that it measures, which leads a process group;
            None without a server.
    """

    name: str
    job: Job
    timeout: float
    forkservers: ForkServers | None = None
    started: ExperimentProcess | None = None
    on_output: Callable[[bytes], None] = lambda chunk: None
    server: int | None = None


def run_interleaved(first: Side, second: Side, watcher: Watcher | None = None) -> tuple[Outcome, Outcome]:
    """Run two experiments alternately, and return the outcome of each.

    When this returns or raises, no descendant of either process is left. If one ends before both have measured,
    the other one is ended, with an error of the kind ``partner``.

    Args:
        first: The side that loads first and has the first turn.
        second: The other side.
        watcher: Notified of progress; None for no notification.
    """
    one, other = _Running(first, watcher), _Running(second, watcher)
    try:
        failed = _run(one, other)
        return one.conclude(failed), other.conclude(failed)
    finally:
        for side in (one, other):
            side.resume()  # a server that is stopped could not end at SIGTERM
            side.process.end()


@dataclass
class _Running:
    """A side and its process.

    Attributes:
        side: The side.
        watcher: Notified of progress; None for no notification.
        process: Starts and ends the process.
        child: The connection to the process, once that was started.
        error: Why the process or its job could not be started; None if they were.
        waiting: The last report that it waits for its turn.
        waits: Number of these reports.
        has_turn: Whether it has been given a turn that it has not ended.
        is_stopped: Whether it is stopped by a signal while it waits.
        timed_out: Whether the time was up while it had something to do.
        refresh_every_s: Longest time between two calls of :meth:`refresh`, in s.
    """

    side: Side
    watcher: Watcher | None
    process: ExperimentProcess = field(init=False)
    child: Child | None = None
    error: OSError | None = None
    waiting: Progress = field(default_factory=lambda: Progress(WAITING, 0, 1))
    waits: int = 0
    has_turn: bool = False
    is_stopped: bool = False
    timed_out: bool = False
    refresh_every_s: float = MAX_WAIT

    def __post_init__(self) -> None:
        if self.watcher is not None:
            self.refresh_every_s = self.watcher.refresh_every_s
        self.process = ExperimentProcess.for_job(self.side.job, self.side.forkservers, self.side.started)

    def start(self) -> bool:
        """Start the process, which imports its packages, and return whether it could be started."""
        with self._noting_error():
            self.child = self.process.start(self, self.side.on_output)
        return self.error is None

    def begin(self) -> bool:
        """Begin the job, and return whether that was possible."""
        with self._noting_error():
            self.process.begin(self.side.job, watched=self.watcher is not None)
        return self.error is None

    @contextmanager
    def _noting_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error

    def see(self, seen: Progress | GpuStatus) -> None:
        """Note a report of the process, and pass it on. Implements the protocol ``Watcher``."""
        if isinstance(seen, Progress) and seen.phase == WAITING:
            self.waiting, self.waits = seen, self.waits + 1
            seen = Progress(IN_TURNS, seen.done, seen.total, seen.unit)
        elif isinstance(seen, Progress):
            seen = Progress(f"{self.side.name}: {seen.phase}", seen.done, seen.total, seen.unit)
        if self.watcher is not None:
            self.watcher.see(seen)

    def refresh(self) -> None:
        """Let the watcher do its periodic work, such as redrawing the live line."""
        if self.watcher is not None:
            self.watcher.refresh()

    @property
    def is_done(self) -> bool:
        """Whether it has written its result, or has ended without one."""
        return self.child is not None and (self.child.phase == worker.DONE or self.child.has_ended)

    def has_imported(self) -> bool:
        """Return whether its packages are imported, and it waits for its job."""
        return self.child is not None and self.child.phase == worker.READY

    def is_ready(self) -> bool:
        """Return whether it is ready for its first turn."""
        return self.waits > 0

    @property
    def has_enough(self) -> bool:
        """Whether it has measured for as long as it has to."""
        return self.waiting.done == self.waiting.total

    def wait(self, other: _Running, left: float, condition: Callable[[], bool]) -> bool:
        """Wait up to *left* s until *condition* holds, and return whether it does.

        The wait also ends when this process, or the *other* one, is done.
        """
        assert self.child is not None

        def is_decided() -> bool:
            return condition() or self.is_done or other.is_done

        self.timed_out = self.child.wait(left, until=is_decided, other=other.child)
        return condition()

    def take_turn(self, other: _Running, left: float) -> bool:
        """Let it measure while *other* waits, and return whether it has."""
        assert self.child is not None
        assert other.child is not None
        before, was_stopped, self.has_turn = self.waits, self.resume(), True
        self.child.send(Turn(other.side.server or other.child.pid or 0, was_stopped).line())
        if not self.wait(other, left, lambda: self.waits > before):
            return False
        self.has_turn = False
        # A process that was stopped could not use a CPU while it waited, so stop it again.
        if was_stopped or (self.waiting.waiting_cpus or 0.0) > MAX_WAITING_CPUS:
            self.is_stopped = True  # first, as Ctrl-C may come in between
            self._signal(signal.SIGSTOP)
        return True

    def finish(self, left: float) -> None:
        """End its turns, and wait up to *left* s for its result."""
        assert self.child is not None
        self.resume()
        self.child.send(END_OF_TURNS)
        self.timed_out = self.child.wait(left, until=lambda: self.is_done)

    def conclude(self, failed: _Running | None) -> Outcome:
        """Return the outcome, once the process is done, or the side *failed* has ended too early."""
        if self.error is not None:
            return Outcome.of_failed_start(self.error)
        if failed is not None and failed is not self:
            self.process.end()
            name, output = failed.side.name, "" if self.child is None else self.child.output.text()
            message = f"the {name} failed, with which it was measured alternately: see the error of the {name}"
            return Outcome(error=ErrorRecord(kind="partner", type="PartnerFailed", message=message), output=output)
        outcome = self.process.outcome(self.side.timeout if self.timed_out else None)
        if outcome.result is not None:
            self.process.shut_down()
        if outcome.error is not None and self.has_turn and outcome.error.phase == WAITING:
            outcome.error.phase = IN_TURNS  # the process does not report that its turn begins
        return outcome

    def resume(self) -> bool:
        """Let it and its server run again if they were stopped, and return whether they were."""
        was_stopped, self.is_stopped = self.is_stopped, False
        if was_stopped:
            self._signal(signal.SIGCONT)
        return was_stopped

    def _signal(self, number: signal.Signals) -> None:
        assert self.child is not None
        for pid in (self.child.pid, self.side.server):
            if pid is not None:
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(pid, number)


def _run(first: _Running, second: _Running) -> _Running | None:
    """Run both to their results. Return the side that ended before both had measured; None if neither did."""
    began = time.monotonic()

    def left() -> float:
        fetched = sum(side.child.fetched_seconds for side in (first, second) if side.child is not None)
        return max(0.0, began + first.side.timeout + fetched - time.monotonic())

    sides = ((first, second), (second, first))
    for side, _ in sides:
        if not side.start():
            return side
    for side, other in sides:
        if not side.wait(other, left(), side.has_imported):
            return _failed(side, other)
    for side, other in sides:
        if not side.begin() or not side.wait(other, left(), side.is_ready):
            return _failed(side, other)
    for side, other in _turns(first, second):
        if not side.take_turn(other, left()):
            return _failed(side, other)
    for side in (first, second):
        side.finish(left())
    return None


def _turns(first: _Running, second: _Running) -> Iterator[tuple[_Running, _Running]]:
    """Yield the side that has the next turn, and the other one, until both have measured enough."""
    one, other = (first, second), (second, first)
    while not (first.has_enough and second.has_enough):
        yield from (one, other, other, one)
        one, other = other, one


def _failed(active: _Running, other: _Running) -> _Running:
    """Return the side that has ended, given that the *active* one did not do what it had to."""
    return other if other.is_done and not (active.is_done or active.timed_out) else active
