"""Determine which processes used the CPUs between two readings of the counters. Unknown values are None."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from pytest_llem.measurement.cpu_counters import CLOCK_TICK_S, Snapshot, Thread
from pytest_llem.results.statistics import total_of

#: Minimum time between two snapshots from which the number of used CPUs is computed, in ticks of the kernel's
#: clock.
MIN_CLOCK_TICKS = 20

#: Maximum number of other processes to name, and the minimum use of one that is named, in CPUs.
MAX_NAMED = 3
MIN_NAMED_CPUS = 0.05


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


def cpu_activity(before: Snapshot, after: Snapshot, harness: Collection[int] = ()) -> CpuActivity:
    """Return the CPU use between two snapshots.

    Args:
        before: The first snapshot.
        after: The second snapshot, of the same CPUs and the same processes at the root of the experiment.
        harness: Pids of measuring processes. Those outside the experiment's tree count neither as the experiment
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
        # /proc/stat may count at clock ticks, and miss processes that sleep at every tick. Their own time is
        # exact, but may have been spent on other CPUs.
        visible = sum(spent.values()) if after.covers_all_cpus else 0.0
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

    None if that is unknown, or if there are too few ticks of the kernel's clock between them.
    """
    seconds, own = after.at - before.at, _own_seconds(before, after)
    return None if own is None or seconds < MIN_CLOCK_TICKS * CLOCK_TICK_S else own / seconds


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
            periods, throttled = last.periods - first.periods, last.throttled_periods - first.throttled_periods
            seconds = last.throttled_seconds - first.throttled_seconds
            found.append((throttled / periods if periods > 0 else 0.0, seconds))
    return max(found, default=(None, None))


def _rise(before: float | None, after: float | None, seconds: float) -> float | None:
    """Return by how much a counter of time rose, ÷ *seconds*; None if it is unknown."""
    return _share(after - before, seconds) if before is not None and after is not None and seconds else None


def _share(part: float, whole: float) -> float:
    """Return *part* ÷ *whole*, limited to 0 … 1: on a busy machine a snapshot's files are read some ms apart."""
    return min(1.0, max(0.0, part / whole))
