"""Read from Linux's /proc and control groups which processes used the CPUs. Unreadable values are None."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from pytest_llem.hardware.cgroups import CGROUPS, PROC, files
from pytest_llem.results.statistics import total_of

#: /proc counts time in ticks of this many seconds.
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

#: Minimum number of ticks between two snapshots from which the number of used CPUs is computed.
MIN_TICKS = 20

#: Maximum number of other processes to name, and the minimum use of one that is named, in CPUs.
MAX_NAMED = 3
MIN_NAMED_CPUS = 0.05

#: Columns of a "cpu" line of /proc/stat: user, nice, system, irq, softirq; and steal. User, nice include guests.
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
    """The counters of one thread: time on a CPU and time waiting for one, in s; involuntary context switches."""

    ran: float
    waited: float
    involuntary: int | None


@dataclass(frozen=True)
class Quota:
    """The counters of a control group's CPU quota: periods, throttled periods, and throttled time in s."""

    periods: int
    throttled: int
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The counters at one edge of a window.

    Attributes:
        at: Time on the monotonic clock, in s.
        cpus: The CPUs that the experiment may use.
        busy: CPU time that any process used on these CPUs, in s; None if /proc/stat does not report it.
        stolen: CPU time that the hypervisor withheld from these CPUs, in s.
        all_cpus: Whether these are all CPUs of the machine.
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
    all_cpus: bool = False
    processes: Mapping[int, Process] = field(default_factory=dict)
    tree: frozenset[int] = frozenset()
    threads: Mapping[tuple[int, int], Thread] | None = None
    pressure: float | None = None
    group_pressure: float | None = None
    quotas: Mapping[Path, Quota] = field(default_factory=dict)


@dataclass(frozen=True)
class CpuActivity:
    """CPU use between two snapshots. See :class:`pytest_llem.results.contention.Contention` for most fields.

    Attributes:
        own_cpu_seconds: CPU time of the experiment's processes, including those that have ended, in s.
    """

    seconds: float
    cpus: int
    own_cpu_seconds: float | None = None
    cpu_seconds: float | None = None
    cpu_wait_seconds: float | None = None
    involuntary_switches: int | None = None
    others_cpu_share: float | None = None
    others: tuple[str, ...] = ()
    steal_share: float | None = None
    pressure_share: float | None = None
    cgroup_pressure_share: float | None = None
    throttled_share: float | None = None
    throttled_seconds: float | None = None


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
    busy, stolen, all_cpus = _cpu_times(proc, cpus)
    pressure, group_pressure = _pressure(proc / "pressure" / "cpu"), _group_pressure(proc, cgroups)
    processes = dict(_processes(proc))  # the slowest, so it follows the counters that are compared with the clock
    tree = frozenset().union(*(descendants(root, processes) for root in roots))
    return Snapshot(
        at=at,
        cpus=frozenset(cpus),
        busy=busy,
        stolen=stolen,
        all_cpus=all_cpus,
        processes=processes,
        tree=tree,
        threads=_threads(proc, tree),
        pressure=pressure,
        group_pressure=group_pressure,
        quotas=dict(_quotas(proc, cgroups)),
    )


def cpu_activity(before: Snapshot, after: Snapshot, harness: Collection[int] = ()) -> CpuActivity:
    """Return the CPU use between two snapshots.

    Args:
        before: The first snapshot.
        after: The second snapshot, of the same CPUs and roots.
        harness: Pids of measuring processes outside the experiment's tree: they count neither as the experiment
            nor as other processes.
    """
    seconds = after.at - before.at
    own = _own_seconds(before, after)
    ran, waited, involuntary = _thread_totals(before, after)
    not_others = {*harness, *before.tree, *after.tree}
    spent = {pid: _spent(before, after, pid) for pid in after.processes if pid not in not_others}
    others = None
    if own is not None and before.busy is not None and after.busy is not None and seconds and before.cpus:
        measuring = sum(_spent(before, after, pid) for pid in harness if pid not in after.tree)
        # /proc/stat may count at ticks, and miss processes that sleep at every tick. Their own time is exact.
        visible = sum(spent.values()) if after.all_cpus else 0.0
        others = _share(max(visible, after.busy - before.busy - own - measuring), seconds * len(before.cpus))
    throttled, throttled_seconds = _throttled(before, after)
    return CpuActivity(
        seconds=seconds,
        cpus=len(before.cpus),
        own_cpu_seconds=own,
        cpu_seconds=ran,
        cpu_wait_seconds=waited,
        involuntary_switches=involuntary,
        others_cpu_share=others,
        others=_named(after, spent, seconds),
        steal_share=_steal_share(before, after),
        pressure_share=_rise(before.pressure, after.pressure, seconds),
        cgroup_pressure_share=_rise(before.group_pressure, after.group_pressure, seconds),
        throttled_share=throttled,
        throttled_seconds=throttled_seconds,
    )


def join_cpu_activity(parts: Sequence[CpuActivity]) -> CpuActivity:
    """Return the CPU use over several windows, as of one window."""
    seconds = sum(one.seconds for one in parts)

    def mean(name: str) -> float | None:
        total = total_of(None if (share := getattr(one, name)) is None else share * one.seconds for one in parts)
        return None if total is None or not seconds else total / seconds

    return CpuActivity(
        seconds=seconds,
        cpus=parts[0].cpus,
        own_cpu_seconds=total_of(one.own_cpu_seconds for one in parts),
        cpu_seconds=total_of(one.cpu_seconds for one in parts),
        cpu_wait_seconds=total_of(one.cpu_wait_seconds for one in parts),
        involuntary_switches=total_of(one.involuntary_switches for one in parts),
        throttled_seconds=total_of(one.throttled_seconds for one in parts),
        others_cpu_share=mean("others_cpu_share"),
        steal_share=mean("steal_share"),
        pressure_share=mean("pressure_share"),
        cgroup_pressure_share=mean("cgroup_pressure_share"),
        throttled_share=mean("throttled_share"),
        others=tuple(dict.fromkeys(chain.from_iterable(one.others for one in parts)))[:MAX_NAMED],
    )


def own_cpus(before: Snapshot, after: Snapshot) -> float | None:
    """Return how many CPUs the experiment's processes used on average between two snapshots.

    None if that is unknown, or if there are too few ticks between them.
    """
    seconds, own = after.at - before.at, _own_seconds(before, after)
    return None if own is None or seconds < MIN_TICKS * TICK_S else own / seconds


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
            spent, reaped = (sum(map(int, rest[i : i + 2])) * TICK_S for i in (11, 13))
            yield pid, Process(int(rest[1]), head.partition("(")[2], int(rest[19]), spent, reaped)
        except (OSError, ValueError, IndexError):  # the process has ended
            continue


def descendants(root: int, processes: Mapping[int, Process]) -> frozenset[int]:
    """Return the pids of *root* and all its descendants among *processes*; empty if *root* is not among them."""
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found, left = set(), [root] if root in processes else []
    while left:
        pid = left.pop()
        found.add(pid)
        left += (one for one in children.get(pid, ()) if one not in found)
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
        return busy * TICK_S, stolen * TICK_S, known.keys() == wanted
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
    known = (_pressure(file) for file in files("", "cpu.pressure", "", proc, cgroups))
    return next((one for one in known if one is not None), None)


def _quotas(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Quota]]:
    """Yield the CPU quota of each control group that has one. cpu.stat has µs in version 2, ns in version 1."""
    for file in files("cpu", "cpu.stat", "cpu.stat", proc, cgroups, above=True):
        try:
            lines = (line.split() for line in file.read_text().splitlines())
            stat = {name: int(value) for name, value in lines}
            seconds = stat["throttled_usec"] / 1e6 if "throttled_usec" in stat else stat["throttled_time"] / 1e9
            yield file, Quota(stat["nr_periods"], stat["nr_throttled"], seconds)
        except (OSError, ValueError, KeyError):
            continue


def _own_seconds(before: Snapshot, after: Snapshot) -> float | None:
    """Return the CPU time of the experiment's processes between two snapshots, in s.

    Reaped children count with their parents in both snapshots. CPU time from before the first snapshot is in both
    sums and cancels, whether the child was alive or not.
    """
    if not before.tree or not after.tree:
        return None
    first, last = (
        sum(one.processes[pid].seconds + one.processes[pid].reaped_seconds for pid in one.tree)
        for one in (before, after)
    )
    return max(0.0, last - first)


def _spent(before: Snapshot, after: Snapshot, pid: int) -> float:
    """Return the CPU time of a process between two snapshots, in s; 0 if it is not visible."""
    last, first = after.processes.get(pid), before.processes.get(pid)
    if last is None:
        return 0.0
    return last.seconds - (first.seconds if first is not None and first.started == last.started else 0.0)


def _named(after: Snapshot, spent: Mapping[int, float], seconds: float) -> tuple[str, ...]:
    """Return the names of the processes that used the most CPU time.

    Args:
        after: The later snapshot.
        spent: CPU time by pid, in s.
        seconds: Time between the snapshots, in s.
    """
    most = sorted((pid for pid in spent if spent[pid] > MIN_NAMED_CPUS * seconds), key=lambda pid: -spent[pid])
    return tuple(f"{after.processes[pid].name} ({pid})" for pid in most[:MAX_NAMED])


def _thread_totals(before: Snapshot, after: Snapshot) -> tuple[float | None, float | None, int | None]:
    """Return how long the experiment's threads ran and waited, in s, and their involuntary context switches."""
    if before.threads is None or after.threads is None:
        return None, None, None
    ran = waited = 0.0
    switches: int | None = 0
    for key, last in after.threads.items():
        first = before.threads.get(key)
        if first is None or first.ran > last.ran:  # a new thread, possibly with the id of an earlier one
            first = Thread(0.0, 0.0, 0)
        ran, waited = ran + last.ran - first.ran, waited + last.waited - first.waited
        if switches is not None and last.involuntary is not None and first.involuntary is not None:
            switches += last.involuntary - first.involuntary
        else:
            switches = None
    return ran, waited, switches


def _steal_share(before: Snapshot, after: Snapshot) -> float | None:
    if before.busy is None or after.busy is None or before.stolen is None or after.stolen is None:
        return None
    stolen, busy = after.stolen - before.stolen, after.busy - before.busy
    return stolen / (stolen + busy) if stolen + busy > 0 else 0.0


def _throttled(before: Snapshot, after: Snapshot) -> tuple[float | None, float | None]:
    """Return the share of throttled periods and the throttled time, in s, of the most throttled control group."""
    found = []
    for file, last in after.quotas.items():
        if (first := before.quotas.get(file)) is not None:
            periods, throttled = last.periods - first.periods, last.throttled - first.throttled
            found.append((throttled / periods if periods > 0 else 0.0, last.seconds - first.seconds))
    return max(found, default=(None, None))


def _rise(before: float | None, after: float | None, seconds: float) -> float | None:
    return _share(after - before, seconds) if before is not None and after is not None and seconds else None


def _share(part: float, whole: float) -> float:
    """Return *part* ÷ *whole*, limited to 0 … 1: on a busy machine a snapshot's files are read some ms apart."""
    return min(1.0, max(0.0, part / whole))
