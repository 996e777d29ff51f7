"""Whether something else used the CPUs or GPUs of an experiment during its window."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

from pytest_llem.hardware.nvml import Nvml
from pytest_llem.measurement.cpu_activity import CpuActivity, activity, snapshot
from pytest_llem.measurement.gpu_activity import GpuActivity, gpu_activity
from pytest_llem.results.contention import Contention, GpuContention
from pytest_llem.results.quality_warnings import QualityWarning


@dataclass(frozen=True)
class Thresholds:
    """From where on a window counts as contended. Shares are of 1.

    Chosen from windows on a quiet and on a loaded machine: ``tests/benchmarks/contention.py`` measures how many
    quiet ones they take for contended, and docs/measurement.md has the figures.

    Attributes:
        min_window_seconds: Of a shorter window nothing is known: /proc/stat counts in steps of 10 ms.
        cpu_received: CPU time received ÷ wanted is below this …
        cpu_lost: … and the wait was more than this share of the window: a process that computes little may wait
            long for it, relative to that, and lose nothing.
        others_cpu_with_wait: … and others used more than this share of the CPUs: an engine with more threads than
            CPUs waits for itself.
        own_cpu: Where the experiment itself used more than this share of the CPUs, it waited for itself.
        others_cpu: Others used more than this share of the CPUs that the engine computes on: they share clocks,
            caches and the meter, too. Beside an engine on GPUs they count only where it waited for a CPU.
        steal: Of the CPU time used and stolen, the share that the hypervisor gave away.
        throttled: Share of the quota's periods that ended throttled.
        others_gpu: Utilisation of a GPU by others.
        gpu_busy: A GPU that was busy for less than this share waits for the host. That is no contention, and is
            warned of.
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


THRESHOLDS = Thresholds()


class ContentionWatch:
    """Looks at CPUs and GPUs at both edges of a window. Made just before it.

    Example:
        watch = ContentionWatch(os.getpid())
        …
        record = watch.end(seconds, engine.gpus)

    Args:
        root: The pid of the process that the experiment's processes descend from.
        harness: Pids of other processes that take part in measuring.
    """

    def __init__(self, root: int, harness: Collection[int] = ()) -> None:
        self._root = root
        self._harness = harness
        self._since = time.time()
        self._before = snapshot(root)

    def end(self, seconds: float, gpus: Sequence[str]) -> Contention:
        """Return what was seen since.

        Args:
            seconds: How long the window was.
            gpus: UUIDs of the GPUs that the experiment uses.
        """
        until, after = time.time(), snapshot(self._root, cpus=self._before.cpus)
        used: list[GpuActivity] = []
        if gpus:
            with Nvml() as nvml:
                own = self._before.tree | after.tree
                used = gpu_activity(nvml, gpus, own, (self._since, until))
        return assess_contention(activity(self._before, after, self._harness), used, seconds)


def root_of(harness: Collection[int]) -> int:
    """Return the process that the experiment's processes descend from: this one, or the supervisor that started it
    and adopts what it leaves behind.
    """
    parent = os.getppid()
    return parent if parent in harness else os.getpid()


def assess_contention(
    cpu: CpuActivity, gpus: Sequence[GpuActivity], seconds: float, limits: Thresholds = THRESHOLDS
) -> Contention:
    """Return whether a window is contended by *limits*, with the figures that show it.

    It is ``uncontended`` only where everything that decides could be seen.

    Args:
        cpu: What was seen of the CPUs.
        gpus: What was seen of each GPU that the experiment uses.
        seconds: How long the window was.
        limits: The thresholds.
    """
    found = list(_contended(cpu, gpus, limits))
    unseen = list(_unseen(cpu, gpus, limits))
    if seconds < limits.min_window_seconds:
        state = "unknown"
        reasons = [f"window too short: {seconds:.2g} s, at least {limits.min_window_seconds:g} s are needed"]
    elif found:
        state, reasons = "contended", found
    elif unseen:
        state, reasons = "unknown", unseen
    else:
        state, reasons = "uncontended", []
    fields = {key: value for key, value in asdict(cpu).items() if key != "own_cpu_seconds"}
    return Contention.model_validate(
        {
            **fields,
            "state": state,
            "reasons": reasons,
            "cpu_received_share": _received(cpu),
            "gpus": [GpuContention.model_validate(asdict(one)) for one in gpus],
        }
    )


def with_prefill(window: Contention, prefill: Contention) -> Contention:
    """Return the contention of an experiment whose prefill was measured in a second window: the worse of the two.

    The figures stay those of the first window; a reason of the second says that it is of that one.
    """
    order = ("uncontended", "unknown", "contended")
    if prefill.state == "uncontended" or order.index(prefill.state) < order.index(window.state):
        return window
    reasons = [reason.replace(":", " in the prefill window:", 1) for reason in prefill.reasons]
    kept = window.reasons if window.state == prefill.state else []
    return window.model_copy(update={"state": prefill.state, "reasons": [*kept, *reasons]})


def contention_warnings(contention: Contention, limits: Thresholds = THRESHOLDS) -> Iterator[QualityWarning]:
    """Yield what a reader of the figures has to know of it, without figures: the record has them."""
    if contention.state == "contended":
        for reason in contention.reasons:
            yield QualityWarning.of("contended", f"contended: {reason.partition(':')[0]}")
    for gpu in contention.gpus:
        if gpu.busy_share is not None and gpu.busy_share < limits.gpu_busy:
            busy = f"{gpu.device} was busy for less than {_percent(limits.gpu_busy)} of the window"
            yield QualityWarning.of("host_bound", f"host-bound: {busy}")


def _received(cpu: CpuActivity) -> float | None:
    if cpu.cpu_seconds is None or cpu.cpu_wait_seconds is None:
        return None
    wanted = cpu.cpu_seconds + cpu.cpu_wait_seconds
    return cpu.cpu_seconds / wanted if wanted else None


def _waited(cpu: CpuActivity, limits: Thresholds) -> bool:
    """Whether the experiment waited for CPUs so long that it matters."""
    received, waited = _received(cpu), cpu.cpu_wait_seconds
    if received is None or waited is None:
        return False
    return received < limits.cpu_received and waited > limits.cpu_lost * cpu.seconds


def _contended(cpu: CpuActivity, gpus: Sequence[GpuActivity], limits: Thresholds) -> Iterator[str]:
    others, received = cpu.others_cpu_share, _received(cpu)
    if (
        others is not None
        and received is not None
        and _waited(cpu, limits)
        and others > limits.others_cpu_with_wait
    ):
        yield (
            f"waited for a CPU: received {_percent(received)} of the CPU time that it wanted, while other "
            f"processes used {_percent(others)} of {_cpus(cpu)}{_by(cpu.others)}"
        )
    elif others is not None and others > limits.others_cpu and not gpus:
        yield f"other processes used the CPUs: {_percent(others)} of {_cpus(cpu)}{_by(cpu.others)}"
    if cpu.steal_share is not None and cpu.steal_share > limits.steal:
        yield f"other virtual machines used the CPUs: {_percent(cpu.steal_share)} of the CPU time was stolen"
    if cpu.throttled_share is not None and cpu.throttled_share > limits.throttled:
        yield (
            f"the control group used up its CPU quota: throttled in {_percent(cpu.throttled_share)} of the "
            "periods; use fewer threads, or raise the quota"
        )
    for gpu in gpus:
        if gpu.others_share is not None and gpu.others_share > limits.others_gpu:
            yield f"other processes used {gpu.device}: {_percent(gpu.others_share)} of it{_by(gpu.others)}"


def _unseen(cpu: CpuActivity, gpus: Sequence[GpuActivity], limits: Thresholds) -> Iterator[str]:
    if cpu.cpu_seconds is None:
        yield "time waited for a CPU cannot be seen: the kernel keeps no /proc/PID/task/TID/schedstat"
    if cpu.others_cpu_share is None:
        yield "CPU time of other processes cannot be seen: /proc/stat does not say"
    elif _waited(cpu, limits) and not _waited_for_itself(cpu, limits):
        received = _received(cpu) or 0.0
        yield (
            f"waited for a CPU, for nothing that can be seen: received {_percent(received)} of the CPU time that "
            "it wanted"
        )
    for gpu in gpus:
        if gpu.others_share is None:
            yield f"use of {gpu.device} by others cannot be seen: the driver does not list the experiment"


def _waited_for_itself(cpu: CpuActivity, limits: Thresholds) -> bool:
    return cpu.own_cpu_seconds is not None and cpu.own_cpu_seconds > limits.own_cpu * cpu.seconds * cpu.cpus


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cpus(cpu: CpuActivity) -> str:
    return "1 CPU" if cpu.cpus == 1 else f"{cpu.cpus} CPUs"


def _by(names: Sequence[str]) -> str:
    return f", most by {', '.join(names)}" if names else ""
