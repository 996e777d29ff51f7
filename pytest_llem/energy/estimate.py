"""Estimate CPU energy from CPU time, for machines where it cannot be measured."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading
from pytest_llem.results.metrics import Method

#: Power of one busy hardware thread, in W: the average maximum per vCPU of a cloud provider's x86 servers in the
#: methodology of Cloud Carbon Footprint.
WATTS_PER_BUSY_THREAD = 3.5

#: Source of the readings.
CPU_TIME_MODEL = "cpu_time_model"

#: Maximum number of listings of the processes until two in a row agree: processes may start or end meanwhile.
_MAX_LISTS = 5

#: Resolution on Linux of the CPU time that a process has waited for, in s. User and system time are rounded each.
_CLOCK_TICK_S = 0.01

#: Kind of CPU time in the id of another process's clock, as of ``clock_getcpuclockid``: the run time of the
#: scheduler. Without the bit for a single thread, it is that of all threads.
_CPUCLOCK_SCHED = 2


class EstimateMeter:
    """Estimates energy as CPU time of this process and its descendants × :data:`WATTS_PER_BUSY_THREAD`.

    The estimate is off by a factor of two or three. It ignores memory, idle power and all other processes. It can
    only show that one setup keeps the CPU busier than another.

    The processes are listed at both edges of the window. CPU time that a child used before the window does not
    count, even if the child ends and is waited for within it. An orphaned process counts as long as it is in the
    POSIX session that this process leads, which an experiment's process does. A process that is neither any more
    at the end of the window, or has ended without one of these processes waiting for it, makes the energy
    unavailable. If it has also started in the window, that is not detected. For a server, its processes count and
    this one does not.
    """

    def __init__(self) -> None:
        self._before: _Tree | None = None
        self._began = 0.0
        self._root_pids: Sequence[int] = ()

    def set_processes(self, pids: Sequence[int]) -> None:
        self._root_pids = pids

    def open(self, gpus: Sequence[str]) -> None:
        if gpus:
            raise MeterUnavailableError("an estimate covers CPUs only, and what is measured runs on a GPU")

    def begin(self) -> None:
        self._before = _stable_tree(self._root_pids)
        self._began = time.monotonic()

    def end(self) -> Reading:
        ended = time.monotonic()
        before, after = self._before, _stable_tree(self._root_pids)
        energy_j: float | None = None
        reason: str | None = None
        if before is None or after is None:
            reason = "processes ended, or kept starting, while they were listed"
        elif (lost := _lost(before, after)) is not None:
            reason = f"process {lost} left the process tree in the window: its CPU time is unknown"
        else:
            energy_j = (_seconds(after) - _seconds(before)) * WATTS_PER_BUSY_THREAD
        method: Method = "unavailable" if energy_j is None else "estimated"
        device = DeviceReading("process", "cpu_package", energy_j, method, CPU_TIME_MODEL, reason=reason)
        return Reading((device,), ended - self._began, began=self._began, ended=ended)

    def close(self) -> None:
        """Do nothing: ``open`` takes no resource."""


@dataclass(frozen=True)
class _Process:
    """A process at an edge of the window.

    Attributes:
        parent: Pid of its parent.
        own: Its CPU time, in s.
        waited: CPU time of its descendants that have ended and been waited for, in s.
    """

    parent: int
    own: float
    waited: float


#: Processes and their descendants, by pid and start time.
_Tree = Mapping[tuple[int, float], _Process]


def _seconds(tree: _Tree) -> float:
    """Return the CPU time of all processes of *tree*, and of those that they have waited for, in s."""
    return sum(one.own + one.waited for one in tree.values())


def _stable_tree(root_pids: Sequence[int]) -> _Tree | None:
    """Return the process tree below *root_pids*, or else this process; None if unstable or without a root."""
    before = None
    for _ in range(_MAX_LISTS):
        tree = _tree_below(root_pids) if root_pids else _own_tree()
        # A child that ended while the processes were listed would count twice, or not at all.
        waited = None if tree is None else {key: one.waited for key, one in tree.items()}
        if tree is not None and waited == before:
            return tree
        before = waited
    return None


def _tree_below(root_pids: Sequence[int]) -> _Tree | None:
    """Return the processes *root_pids* and their descendants; None if a process ended meanwhile."""
    found: dict[tuple[int, float], _Process] = {}
    try:
        for root in map(psutil.Process, root_pids):
            for one in (root, *root.children(recursive=True)):
                found[one.pid, one.create_time()] = _process(one)
    except psutil.Error:  # a process has just ended
        return None
    return found


def _process(one: psutil.Process) -> _Process:
    times = one.cpu_times()
    own, waited = times.user + times.system, times.children_user + times.children_system
    if sys.platform == "linux":
        # psutil's is in clock ticks: a short window would have an energy of 0 J.
        with suppress(OSError):  # the process has just ended
            own = time.clock_gettime(~one.pid << 3 | _CPUCLOCK_SCHED)
    return _Process(one.ppid(), own, waited)


def _own_tree() -> _Tree | None:
    """Return the tree of this process and its POSIX session; None if a process ended meanwhile."""
    this = psutil.Process()
    found: dict[tuple[int, float], _Process] = {}
    try:
        for one in {*this.children(recursive=True), *_session(this.pid)} - {this}:
            found[one.pid, one.create_time()] = _process(one)
    except psutil.Error:  # a process has just ended
        return None
    # getrusage and process_time have a finer resolution than psutil's clock ticks.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited = children.ru_utime + children.ru_stime
    found[this.pid, this.create_time()] = _Process(os.getppid(), time.process_time(), waited)
    return found


def _session(leader: int) -> Iterator[psutil.Process]:
    """Yield the processes of the session that *leader* leads."""
    if os.getsid(0) != leader:
        return
    for pid in psutil.pids():
        with suppress(OSError):  # the process has ended, or may not be read
            if os.getsid(pid) == leader:
                yield psutil.Process(pid)


def _lost(before: _Tree, after: _Tree) -> int | None:
    """Return the pid of a process whose CPU time from before the window is lost; None if there is none.

    A process that waits for another inherits the CPU time of that one, and of those that it has waited for.
    """
    inherited: dict[tuple[int, float], float] = {}
    by_pid = {key[0]: key for key in before}
    for key in before.keys() - after.keys():
        with suppress(psutil.Error):
            if psutil.Process(key[0]).create_time() == key[1]:
                return key[0]
        heir = key
        while heir in before and heir not in after:
            heir = by_pid.get(before[heir].parent, (0, 0.0))
        if heir not in after:
            return key[0]
        inherited[heir] = inherited.get(heir, 0.0) + before[key].own + before[key].waited
        increase = after[heir].waited - before[heir].waited
        if increase < inherited[heir] - _CLOCK_TICK_S * (2 + len(inherited)):
            return key[0]
    return None
