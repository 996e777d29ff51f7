"""Records of what else used the CPUs and GPUs of an experiment during its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from pytest_llem.results.document import Record

#: ``unknown``: contention can be neither shown nor excluded, such as in a short window.
State = Literal["contended", "uncontended", "unknown"]


class GpuContention(Record):
    """Use of one GPU of the experiment. What the driver does not report is null."""

    device: str
    """UUID of the GPU."""
    busy_share: float | None = None
    """Share of the window in which a kernel ran, 0 to 1, as far back as the driver keeps samples. If it is low,
    the GPU waits for the host.
    """
    others_share: float | None = None
    """Utilisation by other processes, summed; 1 is the whole GPU. Null if the driver does not list the experiment,
    or lists no use by others while another process has memory of the GPU: its samples do not show a process that
    rarely computes.
    """
    others_memory_mb: float | None = None
    """Memory that other processes hold at the end of the window, in MB (10^6 bytes)."""
    others: list[str] = Field(default_factory=list)
    """Other processes on the GPU, as ``name (pid)``."""


class ContendedRun(Record):
    """An earlier measurement of the same cycle, repeated because it was contended."""

    started_at: str
    """Time of its start."""
    completed_at: str
    """Time of its end."""
    seconds: float | None = None
    """Its metric ``seconds``, in s."""
    reasons: list[str] = Field(default_factory=list)
    """Why it was contended."""


class Contention(Record):
    """Whether anything else used the CPUs or GPUs of an experiment during its window, and the evidence.

    Values cover the window from just before it to just after it. "CPUs" are those that the experiment may use.
    What cannot be read is null.
    """

    state: State
    """``contended``, ``uncontended`` or ``unknown``; of the window and that of prefill, the worse."""
    reasons: list[str] = Field(default_factory=list)
    """Why it is contended, or why that is unknown; each as "what: values"."""
    seconds: float | None = None
    """The time covered, in s."""
    cpus: int | None = None
    """Number of CPUs that the experiment may use."""
    cpu_seconds: float | None = None
    """CPU time that the threads of the experiment's processes received, in s."""
    cpu_wait_seconds: float | None = None
    """Time that these threads were runnable and waited for a CPU, in s."""
    cpu_received_share: float | None = None
    """Received ÷ wanted CPU time: ``cpu_seconds`` ÷ (``cpu_seconds`` + ``cpu_wait_seconds``)."""
    involuntary_switches: int | None = None
    """How often a thread was taken off a CPU that it still wanted."""
    others_cpu_share: float | None = None
    """CPU time of other processes ÷ (``cpus`` × ``seconds``)."""
    others: list[str] = Field(default_factory=list)
    """The processes that used most, as ``name (pid)``; empty if they are not visible, as in a container."""
    steal_share: float | None = None
    """Time that the hypervisor gave to other virtual machines ÷ CPU time used and stolen."""
    pressure_share: float | None = None
    """Share of the time in which any task of the machine waited for a CPU (PSI, "some")."""
    cgroup_pressure_share: float | None = None
    """The same for the tasks of the control group."""
    throttled_share: float | None = None
    """Share of the CPU quota's periods in which the control group had used up its quota. Without a quota it is 0,
    or null if the control group has no such counters.
    """
    throttled_seconds: float | None = None
    """Time that the quota kept the control group from running, summed over CPUs, in s."""
    gpus: list[GpuContention] = Field(default_factory=list)
    """The GPUs of the experiment."""
    repeats: list[ContendedRun] = Field(default_factory=list)
    """Earlier, contended measurements of this cycle that this one replaces."""


class PointContention(Record):
    """The contention of a point's cycles."""

    contended: list[int] = Field(default_factory=list)
    """Numbers of the contended cycles."""
    unknown: list[int] = Field(default_factory=list)
    """Numbers of the cycles whose contention is unknown."""
    reasons: list[str] = Field(default_factory=list)
    """Why the contended cycles are contended, each reason once."""
    unknown_reasons: list[str] = Field(default_factory=list)
    """Why the contention of other cycles is unknown, each reason once, without its values."""

    def state(self, cycle: int) -> State:
        """Return the state of one cycle."""
        return "contended" if cycle in self.contended else "unknown" if cycle in self.unknown else "uncontended"


def contended_run(result: Mapping[str, Any]) -> ContendedRun | None:
    """Return the record of a contended experiment, given its *result* as plain data; None for any other."""
    contention = result.get("contention") or {}
    if contention.get("state") != "contended":
        return None
    return ContendedRun(
        started_at=result["started_at"],
        completed_at=result["completed_at"],
        seconds=result["metrics"]["seconds"]["value"],
        reasons=contention["reasons"],
    )
