"""Detect whether something else used the CPUs or GPUs of an experiment during its window."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pytest_llem.hardware.nvml import Nvml
from pytest_llem.measurement.cpu_activity import CpuActivity, cpu_activity, join_cpu_activity
from pytest_llem.measurement.cpu_counters import descendants, snapshot
from pytest_llem.measurement.gpu_activity import gpu_activity, join_gpu_activity
from pytest_llem.results.contention import Contention, GpuContention
from pytest_llem.results.quality_warnings import QualityWarning


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a window counts as contended, as fractions of 1.

    Chosen from windows on a quiet and on a loaded machine: ``tests/benchmarks/contention.py`` measures how many
    quiet windows they classify as contended, and docs/explanation/contention.md has the results.

    Attributes:
        min_window_seconds: Shortest window, in s, that can be assessed: /proc/stat counts in steps of 10 ms.
        cpu_received: The experiment waited for CPUs if CPU time received ÷ wanted is below this …
        cpu_lost: … and the wait exceeds this share of the window. A process that computes little may wait long
            relative to its CPU time without losing anything.
        others_cpu_with_wait: An experiment that waited is contended if other processes used more than this share
            of the CPUs. Otherwise an engine with more threads than CPUs waited for itself.
        own_cpu: An experiment that used more than this share of the CPUs waited for itself.
        others_cpu: An engine on the CPU is contended if other processes used more than this share of its CPUs:
            they share clocks, caches and the meter. An engine on GPUs is contended only if it waited for a CPU.
        steal: Share of the used and stolen CPU time that the hypervisor gave to other virtual machines.
        throttled: Share of the CPU quota's periods that were throttled.
        others_gpu: Utilisation of a GPU by other processes.
        gpu_busy: A GPU that was busy for less than this share was waiting for the host: a warning, not
            contention.
    """

    min_window_seconds: float = 1.0
    cpu_received: float = 0.97
    cpu_lost: float = 0.01
    others_cpu_with_wait: float = 0.03
    own_cpu: float = 0.9
    others_cpu: float = 0.05
    steal: float = 0.02
    throttled: float = 0.05
    others_gpu: float = 0.02
    gpu_busy: float = 0.5


#: The thresholds of every result.
THRESHOLDS = Thresholds()


class Activity(NamedTuple):
    """Use of the CPUs and of each GPU of the experiment during a window."""

    cpu: CpuActivity
    gpus: Sequence[GpuContention]


class ContentionWatch:
    """Compares CPU and GPU use at both edges of a window. Create it just before the window.

    Example:
        watch = ContentionWatch([os.getpid()])
        …
        record = assess_contention(*watch.activity(engine.gpus), seconds)

    Args:
        roots: Pids of the processes that all processes of the experiment descend from.
        harness: Pids of the processes that take part in the measurement, such as pytest's.

    Attributes:
        before: The counters when it was created.
        after: The counters at the last call of :meth:`activity`; before it, those of ``before``.
    """

    def __init__(self, roots: Collection[int], harness: Collection[int] = ()) -> None:
        self._roots = roots
        self._harness = harness
        self._since = time.time()
        self.before = self.after = snapshot(roots)

    def activity(self, gpus: Sequence[str], partner: int | None = None) -> Activity:
        """Return the use of the devices since this object was created.

        Args:
            gpus: UUIDs of the GPUs that the experiment uses.
            partner: Pid of an experiment that is interleaved with this one, or of its server; else None. Its use
                of the GPUs is not that of others: it used them until just before, which the driver's coarse
                samples may still show.
        """
        until, self.after = time.time(), snapshot(self._roots, cpus=self.before.cpus)
        used: list[GpuContention] = []
        if gpus:
            with Nvml() as nvml:
                own = self.before.tree | self.after.tree
                if partner is not None:
                    own |= descendants(partner, self.after.processes)
                used = gpu_activity(nvml, gpus, own, (self._since, until))
        return Activity(cpu_activity(self.before, self.after, self._harness), used)


def root_of(harness: Collection[int]) -> int:
    """Return the pid of the process that all processes of the experiment descend from.

    This is the supervisor, which adopts orphaned processes, if it started this process; else this process.

    Args:
        harness: Pids of the processes that take part in the measurement.
    """
    parent = os.getppid()
    return parent if parent in harness else os.getpid()


def assess_contention(cpu: CpuActivity, gpus: Sequence[GpuContention], seconds: float) -> Contention:
    """Return whether a window is contended by :data:`THRESHOLDS`, and the values that this follows from.

    The window is ``uncontended`` only if the wait for CPUs, and the use of the CPUs and of each GPU by other
    processes, could be read; otherwise it is ``unknown``, as is each window that is too short.

    Args:
        cpu: Use of the CPUs.
        gpus: Use of each GPU of the experiment.
        seconds: Length of the window, in s.
    """
    contended = list(_contended_reasons(cpu, gpus))
    unknown = list(_unknown_reasons(cpu, gpus))
    if seconds < THRESHOLDS.min_window_seconds:
        state = "unknown"
        reasons = [f"window shorter than {THRESHOLDS.min_window_seconds:g} s: {seconds:.2g} s"]
    elif contended:
        state, reasons = "contended", contended
    elif unknown:
        state, reasons = "unknown", unknown
    else:
        state, reasons = "uncontended", []
    fields = {key: value for key, value in asdict(cpu).items() if key != "own_cpu_seconds"}
    return Contention.model_validate(
        {
            **fields,
            "state": state,
            "reasons": reasons,
            "cpu_received_share": _received(cpu),
            "gpus": gpus,
        }
    )


def join_activities(activities: Sequence[Activity]) -> Activity:
    """Return the use of the devices over several windows, as of one window."""
    gpus = zip(*(one.gpus for one in activities), strict=True)
    return Activity(join_cpu_activity([one.cpu for one in activities]), [*map(join_gpu_activity, gpus)])


def with_prefill(window: Contention, prefill: Contention) -> Contention:
    """Return the worse contention of an experiment's two windows, the second being that of prefill.

    The values are those of the first window. Reasons from the second contain "in the prefill window".
    """
    severities = ("uncontended", "unknown", "contended")
    if prefill.state == "uncontended" or severities.index(prefill.state) < severities.index(window.state):
        return window
    reasons = [reason.replace(":", " in the prefill window:", 1) for reason in prefill.reasons]
    reasons_of_window = window.reasons if window.state == prefill.state else []
    return window.model_copy(update={"state": prefill.state, "reasons": [*reasons_of_window, *reasons]})


def contention_warnings(contention: Contention) -> Iterator[QualityWarning]:
    """Yield the quality warnings about contention. They have no numbers: those are in the record."""
    if contention.state == "contended":
        for reason in contention.reasons:
            yield QualityWarning.of("contended", f"contended: {reason.partition(':')[0]}")
    for gpu in contention.gpus:
        if gpu.busy_share is not None and gpu.busy_share < THRESHOLDS.gpu_busy:
            busy = f"{gpu.device} was busy for less than {_percent(THRESHOLDS.gpu_busy)} of the window"
            yield QualityWarning.of("host_bound", f"host-bound: {busy}")


def _received(cpu: CpuActivity) -> float | None:
    """Return the CPU time that the experiment received ÷ wanted; None if unknown."""
    if cpu.cpu_seconds is None or cpu.cpu_wait_seconds is None:
        return None
    wanted = cpu.cpu_seconds + cpu.cpu_wait_seconds
    return cpu.cpu_seconds / wanted if wanted else None


def _waited(cpu: CpuActivity) -> bool:
    """Return whether the experiment waited for CPUs for longer than :data:`THRESHOLDS` allow."""
    received, waited = _received(cpu), cpu.cpu_wait_seconds
    if received is None or waited is None:
        return False
    return received < THRESHOLDS.cpu_received and waited > THRESHOLDS.cpu_lost * cpu.seconds


def _contended_reasons(cpu: CpuActivity, gpus: Sequence[GpuContention]) -> Iterator[str]:
    others, received = cpu.others_cpu_share, _received(cpu)
    if others is not None and received is not None and _waited(cpu) and others > THRESHOLDS.others_cpu_with_wait:
        yield (
            f"waited for a CPU: received {_percent(received)} of the CPU time that it wanted, while other "
            f"processes used {_percent(others)} of {_cpu_count(cpu)}{_by(cpu.others)}"
        )
    elif others is not None and others > THRESHOLDS.others_cpu and not gpus:
        yield f"other processes used the CPUs: {_percent(others)} of {_cpu_count(cpu)}{_by(cpu.others)}"
    if cpu.steal_share is not None and cpu.steal_share > THRESHOLDS.steal:
        yield f"other virtual machines used the CPUs: {_percent(cpu.steal_share)} of the CPU time was stolen"
    if cpu.throttled_share is not None and cpu.throttled_share > THRESHOLDS.throttled:
        yield (
            f"the control group used up its CPU quota: throttled in {_percent(cpu.throttled_share)} of the "
            "periods; use fewer threads, or raise the quota"
        )
    for gpu in gpus:
        if gpu.others_share is not None and gpu.others_share > THRESHOLDS.others_gpu:
            yield f"other processes used {gpu.device}: {_percent(gpu.others_share)} of it{_by(gpu.others)}"


def _unknown_reasons(cpu: CpuActivity, gpus: Sequence[GpuContention]) -> Iterator[str]:
    if cpu.cpu_seconds is None:
        yield "time waited for a CPU is not available: the kernel has no /proc/PID/task/TID/schedstat"
    if cpu.others_cpu_share is None:
        yield "CPU time of other processes is not available: /proc/stat does not report it"
    elif _waited(cpu) and not _waited_for_itself(cpu):
        received = _received(cpu) or 0.0
        yield (
            f"waited for a CPU, for an unknown reason: received {_percent(received)} of the CPU time that it "
            "wanted"
        )
    for gpu in gpus:
        if gpu.others_share is None:
            names = ", ".join(gpu.others)
            why = f"lists the memory of {names}, and not the use" if names else "does not list the experiment"
            yield f"use of {gpu.device} by other processes is not available: the driver {why}"


def _waited_for_itself(cpu: CpuActivity) -> bool:
    return cpu.own_cpu_seconds is not None and cpu.own_cpu_seconds > THRESHOLDS.own_cpu * cpu.seconds * cpu.cpus


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cpu_count(cpu: CpuActivity) -> str:
    return "1 CPU" if cpu.cpus == 1 else f"{cpu.cpus} CPUs"


def _by(names: Sequence[str]) -> str:
    return f", most by {', '.join(names)}" if names else ""
