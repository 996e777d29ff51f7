"""Records of what else used the CPUs and GPUs of an experiment during its window."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record

#: ``unknown``: no contention was found, but a source that would show it cannot be read on this machine.
State = Literal["contended", "uncontended", "unknown"]


class GpuContention(Record):
    """Use of one GPU of the experiment. What the driver does not report is null.

    Attributes:
        device: UUID of the GPU.
        busy_share: Share of the window in which a kernel ran, 0 to 1, as far back as the driver keeps samples. If
            it is low, the GPU waits for the host.
        others_share: Utilisation by other processes, summed; 1 is the whole GPU.
        others_memory_mb: Memory that other processes hold at the end of the window, in MB (10^6 bytes).
        others: Other processes on the GPU, as ``name (pid)``.
    """

    device: str
    busy_share: float | None = None
    others_share: float | None = None
    others_memory_mb: float | None = None
    others: list[str] = Field(default_factory=list)


class ContendedRun(Record):
    """An earlier measurement of the same cycle, repeated because it was contended.

    Attributes:
        started_at: Time of its start.
        completed_at: Time of its end.
        seconds: Its metric ``seconds``, in s.
        reasons: Why it was contended.
    """

    started_at: str
    completed_at: str
    seconds: float | None = None
    reasons: list[str] = Field(default_factory=list)


class Contention(Record):
    """Whether anything else used the CPUs or GPUs of an experiment during its window, and the evidence.

    Values cover the window from just before it to just after it. "CPUs" are those that the experiment may use.
    What cannot be read is null.

    Attributes:
        state: ``contended``, ``uncontended`` or ``unknown``.
        reasons: Why it is contended, or which source could not be read; each as "what: values".
        seconds: The time covered, in s.
        cpus: Number of CPUs that the experiment may use.
        cpu_seconds: CPU time that the threads of the experiment's processes received, in s.
        cpu_wait_seconds: Time that these threads were runnable and waited for a CPU, in s.
        cpu_received_share: cpu_seconds / (cpu_seconds + cpu_wait_seconds): received ÷ wanted.
        involuntary_switches: How often a thread was taken off a CPU that it still wanted.
        others_cpu_share: CPU time of other processes / (CPUs · seconds).
        others: The processes that used most, as ``name (pid)``; empty if they are not visible, as in a container.
        steal_share: Time that the hypervisor gave to other virtual machines / CPU time used and stolen.
        pressure_share: Share of the time in which any task of the machine waited for a CPU (PSI, "some").
        cgroup_pressure_share: The same for the tasks of the control group.
        throttled_share: Share of the CPU quota's periods in which the control group had used up its quota; 0
            without a quota.
        throttled_seconds: Time that the quota kept the control group from running, summed over CPUs, in s.
        gpus: The GPUs of the experiment.
        repeats: Earlier, contended measurements of this cycle that this one replaces.
    """

    state: State
    reasons: list[str] = Field(default_factory=list)
    seconds: float | None = None
    cpus: int | None = None
    cpu_seconds: float | None = None
    cpu_wait_seconds: float | None = None
    cpu_received_share: float | None = None
    involuntary_switches: int | None = None
    others_cpu_share: float | None = None
    others: list[str] = Field(default_factory=list)
    steal_share: float | None = None
    pressure_share: float | None = None
    cgroup_pressure_share: float | None = None
    throttled_share: float | None = None
    throttled_seconds: float | None = None
    gpus: list[GpuContention] = Field(default_factory=list)
    repeats: list[ContendedRun] = Field(default_factory=list)


class PointContention(Record):
    """The contention of a point's cycles.

    Attributes:
        contended: Numbers of the contended cycles.
        unknown: Numbers of the cycles whose contention is unknown.
        reasons: Why the contended cycles are contended, each reason once.
    """

    contended: list[int] = Field(default_factory=list)
    unknown: list[int] = Field(default_factory=list)
    reasons: list[str] = Field(default_factory=list)

    def state(self, cycle: int) -> State:
        """Return the state of one cycle."""
        return "contended" if cycle in self.contended else "unknown" if cycle in self.unknown else "uncontended"


def contended_run(result: str | None) -> ContendedRun | None:
    """Return what is kept of an experiment's result, as JSON text, that was contended; None for any other."""
    found = json.loads(result) if result is not None else {}
    contention = found.get("contention") or {}
    if contention.get("state") != "contended":
        return None
    return ContendedRun(
        started_at=found["started_at"],
        completed_at=found["completed_at"],
        seconds=found["metrics"]["seconds"]["value"],
        reasons=contention["reasons"],
    )
