"""Record the environment of an experiment: the host, the GPUs, and the limits of this process."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pytest_llem.hardware.cgroups import cpu_limit, memory_limit_bytes
from pytest_llem.hardware.gpus import gpu_settings, newest_cuda
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.environment import host_environment

_CPUS = Path("/sys/devices/system/cpu")

#: File with the maximum clock of a CPU, in kHz.
_CLOCK = "cpufreq/cpuinfo_max_freq"

#: A CPU whose maximum clock is below this share of the machine's highest counts as slow. On machines with one
#: kind of core the maximum clocks differ by less than 10 %, with two kinds by more than 20 %.
SLOW_SHARE = 0.85

_POLICIES = {
    "SCHED_OTHER": "other",
    "SCHED_BATCH": "batch",
    "SCHED_IDLE": "idle",
    "SCHED_FIFO": "fifo",
    "SCHED_RR": "rr",
}


def environment(gpus: Sequence[str], directory: Path | None = None) -> dict[str, Any]:
    """Return the host's environment, and the NVML settings of each GPU that the engine runs on.

    Call it outside of the window: a call to NVML may take 4 ms, and git reads every file.

    Args:
        gpus: UUIDs of the GPUs that the engine runs on.
        directory: Directory whose git commit is recorded; None for the current directory.

    Returns:
        :func:`pytest_llem.results.environment.host_environment`, :func:`limits`,
        ``cuda_driver`` (the newest CUDA version that the driver supports), and ``gpus`` (a mapping for each).
    """
    found = host_environment(directory) | limits()
    if not gpus:
        return found | {"cuda_driver": None, "gpus": []}
    with Nvml() as nvml:
        return found | {"cuda_driver": newest_cuda(nvml), "gpus": [gpu_settings(nvml, uuid) for uuid in gpus]}


def limits() -> dict[str, Any]:
    """Return the limits of this process.

    Returns:
        ``cpu_limit`` (CPU limit of its control group, in CPUs) and ``memory_limit_mb`` (memory limit), None for no
        limit; ``nice`` and ``scheduling_policy``; ``cpu_affinity`` (the CPUs that it may use, such as ``0-3,8``)
        and ``cpu_layout`` (see :func:`layout`), None if unknown.
    """
    memory = memory_limit_bytes()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return {
        "cpu_limit": cpu_limit(),
        "memory_limit_mb": round(memory / 1e6) if memory is not None else None,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "scheduling_policy": _policy(),
        "cpu_affinity": ranges(allowed) or None,
        "cpu_layout": layout(allowed),
    }


def ranges(numbers: Collection[int]) -> str:
    """Return numbers in the kernel's format of CPU lists: ``0-3,8``."""
    groups = groupby(enumerate(sorted(numbers)), key=lambda one: one[1] - one[0])
    spans = [[number for _, number in group] for _, group in groups]
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def layout(cpus: Collection[int], root: Path = _CPUS) -> str | None:
    """Return a description of some CPUs: ``4 CPUs on 2 cores``, ``8 CPUs on 8 cores, 4 of them slow``.

    It does not contain their numbers, so that equivalent sets of CPUs have the same description.

    Args:
        cpus: Numbers of the CPUs.
        root: Folder in which the system describes its CPUs.

    Returns:
        The description; None if the cores of the CPUs are unknown.
    """
    places = ("topology/physical_package_id", "topology/core_id")
    cores = {tuple(_number(root, cpu, place) for place in places) for cpu in cpus}
    if not cpus or any(core is None for _, core in cores):
        return None
    packages = len({package for package, _ in cores})
    text = f"{_counted(len(cpus), 'CPU')} on {_counted(len(cores), 'core')}"
    text += f" of {packages} packages" if packages > 1 else ""
    clocks = {int(one.name[3:]): _number(root, int(one.name[3:]), _CLOCK) or 0 for one in root.glob("cpu[0-9]*")}
    highest = max(clocks.values(), default=0)
    slow = sum(0 < clocks.get(cpu, 0) < SLOW_SHARE * highest for cpu in cpus)
    return f"{text}, {slow} of them slow" if slow else text


def _number(root: Path, cpu: int, name: str) -> int | None:
    try:
        return int((root / f"cpu{cpu}" / name).read_text())
    except (OSError, ValueError):
        return None


def _policy() -> str | None:
    if not hasattr(os, "sched_getscheduler"):
        return None
    names = {getattr(os, name): text for name, text in _POLICIES.items()}
    return names.get(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK, "unknown")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
