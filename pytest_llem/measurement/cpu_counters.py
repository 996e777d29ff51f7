"""Read the counters of CPUs, processes and threads from Linux's /proc and control groups.

Unreadable values are None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.hardware.cgroups import CGROUPS, PROC, group_files

#: /proc counts time in ticks of this many seconds.
CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

#: Columns of a "cpu" line of /proc/stat: user, nice, system, irq, softirq; and steal. user and nice include the
#: time of virtual machines that run on this machine.
_BUSY, _STEAL = (0, 1, 2, 5, 6), 7


@dataclass(frozen=True)
class Process:
    """The counters of one process.

    Attributes:
        parent: Pid of its parent.
        name: Name of its program, cut to 15 characters by the kernel.
        started: Start time, in ticks since boot: distinguishes processes that had the same pid.
        seconds: Its CPU time, in s.
        reaped_seconds: CPU time of its descendants that ended and were waited for, in s.
    """

    parent: int
    name: str
    started: int
    seconds: float
    reaped_seconds: float


@dataclass(frozen=True)
class Thread:
    """The counters of one thread.

    Attributes:
        ran: Time on a CPU, in s.
        waited: Time in which it was runnable and waited for a CPU, in s.
        involuntary: Number of involuntary context switches; None if not reported.
    """

    ran: float
    waited: float
    involuntary: int | None


@dataclass(frozen=True)
class Quota:
    """The counters of a control group's CPU quota.

    Attributes:
        periods: Number of periods that have ended.
        throttled_periods: Number of those in which the group used up its quota.
        throttled_seconds: Time for which the group was kept from running, summed over CPUs, in s.
    """

    periods: int
    throttled_periods: int
    throttled_seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The counters at one edge of a window.

    Attributes:
        at: Time on the monotonic clock, in s.
        cpus: The CPUs that the experiment may use.
        busy: CPU time that any process used on these CPUs, in s; None if /proc/stat does not report it.
        stolen: CPU time that the hypervisor withheld from these CPUs, in s.
        covers_all_cpus: Whether these are all CPUs of the machine.
        processes: All visible processes, by pid.
        tree: Pids of the experiment's processes.
        threads: Threads of the experiment, by pid and thread id; None if the kernel does not count waiting time.
        pressure: Time for which any task of the machine waited for a CPU, in s.
        group_pressure: Time for which any task of the control group waited for a CPU, in s.
        quotas: CPU quotas of the control group and of those above it, by file.
    """

    at: float
    cpus: frozenset[int]
    busy: float | None = None
    stolen: float | None = None
    covers_all_cpus: bool = False
    processes: Mapping[int, Process] = field(default_factory=dict)
    tree: frozenset[int] = frozenset()
    threads: Mapping[tuple[int, int], Thread] | None = None
    pressure: float | None = None
    group_pressure: float | None = None
    quotas: Mapping[Path, Quota] = field(default_factory=dict)


def snapshot(
    roots: Collection[int], proc: Path = PROC, cgroups: Path = CGROUPS, cpus: Collection[int] | None = None
) -> Snapshot:
    """Return the current counters.

    This takes milliseconds: it reads a file for each process of the machine and each thread of the experiment.

    Args:
        roots: Pids of the processes that all processes of the experiment descend from.
        proc: Mount point of procfs.
        cgroups: Mount point of the control groups.
        cpus: The CPUs that the experiment may use; None for those of this process.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    at = time.monotonic()
    busy, stolen, covers_all_cpus = _cpu_times(proc, cpus)
    pressure, group_pressure = _pressure(proc / "pressure" / "cpu"), _group_pressure(proc, cgroups)
    processes = dict(_processes(proc))  # the slowest, so it follows the counters that are compared with the clock
    tree = frozenset().union(*(descendants(root, processes) for root in roots))
    return Snapshot(
        at=at,
        cpus=frozenset(cpus),
        busy=busy,
        stolen=stolen,
        covers_all_cpus=covers_all_cpus,
        processes=processes,
        tree=tree,
        threads=_threads(proc, tree),
        pressure=pressure,
        group_pressure=group_pressure,
        quotas=dict(_quotas(proc, cgroups)),
    )


def _processes(proc: Path) -> Iterator[tuple[int, Process]]:
    try:
        pids = [int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()]
    except OSError:
        return
    for pid in pids:
        try:
            text = (proc / str(pid) / "stat").read_text(errors="replace")
            head, _, tail = text.rpartition(")")
            rest = tail.split()
            spent, reaped = (sum(map(int, rest[i : i + 2])) * CLOCK_TICK_S for i in (11, 13))
            yield pid, Process(int(rest[1]), head.partition("(")[2], int(rest[19]), spent, reaped)
        except (OSError, ValueError, IndexError):  # the process has ended
            continue


def descendants(root: int, processes: Mapping[int, Process]) -> frozenset[int]:
    """Return the pids of *root* and all its descendants among *processes*; empty if *root* is not among them."""
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found, to_visit = set(), [root] if root in processes else []
    while to_visit:
        pid = to_visit.pop()
        found.add(pid)
        to_visit += (one for one in children.get(pid, ()) if one not in found)
    return frozenset(found)


def _threads(proc: Path, tree: Collection[int]) -> dict[tuple[int, int], Thread] | None:
    """Return the threads of *tree*; None if the kernel does not count how long they wait."""
    found: dict[tuple[int, int], Thread] = {}
    for pid in tree:
        tasks = proc / str(pid) / "task"
        try:
            tids = [int(entry.name) for entry in tasks.iterdir()]
        except OSError:
            continue
        for tid in tids:
            try:
                ran, waited, _ = map(int, (tasks / str(tid) / "schedstat").read_text().split())
            except (OSError, ValueError):
                continue
            found[pid, tid] = Thread(ran / 1e9, waited / 1e9, _involuntary(tasks / str(tid) / "status"))
    # Without the kernel's CONFIG_SCHED_INFO the file is missing or contains zeros.
    return found if any(one.ran for one in found.values()) else None


def _involuntary(status: Path) -> int | None:
    try:
        for line in status.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "nonvoluntary_ctxt_switches":
                return int(value)
    except (OSError, ValueError):
        pass
    return None


def _cpu_times(proc: Path, cpus: Collection[int]) -> tuple[float | None, float | None, bool]:
    """Return the busy time and the stolen time of *cpus*, in s, and whether the machine has no other CPUs."""
    wanted = {f"cpu{number}" for number in cpus}
    try:
        rows = [line.split() for line in (proc / "stat").read_text().splitlines()]
        known = {
            row[0]: list(map(int, row[1:])) for row in rows if row and row[0][:3] == "cpu" and row[0] != "cpu"
        }
        if not wanted or not known.keys() >= wanted:
            return None, None, False
        busy = sum(known[cpu][column] for cpu in wanted for column in _BUSY)
        stolen = sum(known[cpu][_STEAL] for cpu in wanted)
        return busy * CLOCK_TICK_S, stolen * CLOCK_TICK_S, known.keys() == wanted
    except (OSError, ValueError, IndexError):
        return None, None, False


def _pressure(file: Path) -> float | None:
    try:
        for line in file.read_text().splitlines():
            kind, *fields = line.split()
            if kind == "some":
                return int(dict(one.split("=") for one in fields)["total"]) / 1e6
    except (OSError, ValueError, KeyError):
        pass
    return None


def _group_pressure(proc: Path, cgroups: Path) -> float | None:
    known = (_pressure(file) for file in group_files("", "cpu.pressure", "", proc, cgroups))
    return next((one for one in known if one is not None), None)


def _quotas(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Quota]]:
    """Yield the counters of each control group that counts throttling. cpu.stat has µs in cgroup v2, ns in v1."""
    for file in group_files("cpu", "cpu.stat", "cpu.stat", proc, cgroups, above=True):
        try:
            lines = (line.split() for line in file.read_text().splitlines())
            stat = {name: int(value) for name, value in lines}
            seconds = stat["throttled_usec"] / 1e6 if "throttled_usec" in stat else stat["throttled_time"] / 1e9
            yield file, Quota(stat["nr_periods"], stat["nr_throttled"], seconds)
        except (OSError, ValueError, KeyError):
            continue
