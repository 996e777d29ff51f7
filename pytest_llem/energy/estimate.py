"""CPU energy where nothing can be measured: a model, and labelled as one."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading
from pytest_llem.results.metrics import Method

#: Power of one busy hardware thread, in W: the average maximum per vCPU over a cloud provider's x86 servers
#: in the methodology of Cloud Carbon Footprint.
WATTS_PER_BUSY_THREAD = 3.5

#: What its readings are from.
CPU_TIME_MODEL = "cpu_time_model"

#: How often the processes are listed until two lists in a row agree: some may start or end meanwhile.
_MAX_LISTS = 5

#: What CPU times of other processes are counted in on Linux, in s. A child's time may be rounded twice.
_CLOCK_TICK_S = 0.01


class EstimateMeter:
    """CPU seconds of this process and its descendants × :data:`WATTS_PER_BUSY_THREAD`.

    Good to a factor of two or three, blind to memory, idle power and everything but these processes. It can tell
    that one setup keeps the CPU busier than another, and nothing finer.

    The processes are listed at both edges. What a child took before the window does not count, also where it ends
    and is waited for within. A process that has lost its parent counts as long as it is in the session that this
    one leads, as an experiment's does. One that leaves in the window, or ends and is waited for by none of these,
    makes the figure unavailable; one that starts and leaves within a window is not seen.
    """

    def __init__(self) -> None:
        self._before: _Tree | None = None
        self._began = 0.0

    def open(self, gpus: Sequence[str]) -> None:
        if gpus:
            raise MeterUnavailableError("the estimate knows CPUs only, and the engine runs on a GPU")

    def begin(self) -> None:
        self._before = _tree()
        self._began = time.monotonic()

    def end(self) -> Reading:
        seconds = time.monotonic() - self._began
        before, after = self._before, _tree()
        energy_j: float | None = None
        reason: str | None = None
        if before is None or after is None:
            reason = "processes kept starting and ending while they were listed"
        elif (lost := _lost(before, after)) is not None:
            reason = f"process {lost} left the process tree in the window: its CPU time is unknown"
        else:
            energy_j = (after.seconds - before.seconds) * WATTS_PER_BUSY_THREAD
        method: Method = "unavailable" if energy_j is None else "estimated"
        device = DeviceReading("process", "cpu_package", energy_j, method, CPU_TIME_MODEL, reason=reason)
        return Reading((device,), seconds)

    def close(self) -> None:
        """Nothing was taken."""


@dataclass(frozen=True)
class _Process:
    """A process at an edge of the window: CPU times in s.

    Attributes:
        parent: Its parent's id.
        own: Its own.
        waited: Of its descendants that have ended and been waited for.
    """

    parent: int
    own: float
    waited: float


@dataclass(frozen=True)
class _Tree:
    """This process and its descendants, by id and by when they started."""

    processes: Mapping[tuple[int, float], _Process]

    @property
    def seconds(self) -> float:
        """CPU time of all of them, and of those that they have waited for."""
        return sum(one.own + one.waited for one in self.processes.values())


def _tree() -> _Tree | None:
    """Return the process tree; None where it did not keep still."""
    before = None
    for _ in range(_MAX_LISTS):
        tree = _listed()
        # A child that ended between two looks would count twice, or not at all.
        still = None if tree is None else {key: one.waited for key, one in tree.processes.items()}
        if tree is not None and still == before:
            return tree
        before = still
    return None


def _listed() -> _Tree | None:
    this = psutil.Process()
    found: dict[tuple[int, float], _Process] = {}
    try:
        for one in {*this.children(recursive=True), *_session(this.pid)} - {this}:
            times = one.cpu_times()
            waited = times.children_user + times.children_system
            found[one.pid, one.create_time()] = _Process(one.ppid(), times.user + times.system, waited)
    except psutil.Error:  # it has just ended
        return None
    # Of this process finer than in the clock ticks that psutil reads.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited = children.ru_utime + children.ru_stime
    found[this.pid, this.create_time()] = _Process(os.getppid(), time.process_time(), waited)
    return _Tree(found)


def _session(leader: int) -> Iterator[psutil.Process]:
    """Yield the processes of the session that *leader* leads."""
    if os.getsid(0) != leader:
        return
    for pid in psutil.pids():
        with suppress(OSError):  # gone, or not ours to ask
            if os.getsid(pid) == leader:
                yield psutil.Process(pid)


def _lost(before: _Tree, after: _Tree) -> int | None:
    """Return the id of a process whose time before the window is in no other's after it; None where all are.

    Whoever waits for a process takes over its time and that of those it has waited for.
    """
    taken: dict[tuple[int, float], float] = {}
    by_pid = {key[0]: key for key in before.processes}
    for key in before.processes.keys() - after.processes.keys():
        with suppress(psutil.Error):
            if psutil.Process(key[0]).create_time() == key[1]:
                return key[0]
        heir = key
        while heir in before.processes and heir not in after.processes:
            heir = by_pid.get(before.processes[heir].parent, (0, 0.0))
        if heir not in after.processes:
            return key[0]
        taken[heir] = taken.get(heir, 0.0) + before.processes[key].own + before.processes[key].waited
        grown = after.processes[heir].waited - before.processes[heir].waited
        if grown < taken[heir] - _CLOCK_TICK_S * (2 + len(taken)):
            return key[0]
    return None
