"""The limits of this process: CPU time and memory of its control group, its priority, the CPUs that it may use."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

from pytest_llem.hardware.cgroups import cpu_limit, memory_limit_bytes

_CPUS = Path("/sys/devices/system/cpu")

#: The highest clock of a CPU, in kHz.
_CLOCK = "cpufreq/cpuinfo_max_freq"

#: A CPU whose highest clock is below this share of the machine's highest is of a slower kind: on machines of one
#: kind of core they differ by less than 10 %, and where there are two kinds by more than 20 %.
SLOW = 0.85

_POLICIES = {
    "SCHED_OTHER": "other",
    "SCHED_BATCH": "batch",
    "SCHED_IDLE": "idle",
    "SCHED_FIFO": "fifo",
    "SCHED_RR": "rr",
}


def limits() -> dict[str, Any]:
    """Return the limits of this process.

    Returns:
        ``cpu_limit``, the CPUs' time that its control group may take, and ``memory_limit_mb``, its memory, null
        for no limit; ``nice`` and ``scheduling_policy``; ``cpu_affinity``, the CPUs that it may use, such as
        ``0-3,8``, and ``cpu_layout``, what those are, null where the system does not say.
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
    """Return numbers as the kernel lists CPUs: ``0-3,8``."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda one: one[1] - one[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def layout(cpus: Collection[int], root: Path = _CPUS) -> str | None:
    """Return what some CPUs are, whichever they are: ``4 CPUs on 2 cores``, ``8 CPUs on 8 cores, 4 of them slow``.

    Args:
        cpus: Their numbers.
        root: Where the system describes CPUs.

    Returns:
        None where the system does not say which cores they are on.
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
    slow = sum(0 < clocks.get(cpu, 0) < SLOW * highest for cpu in cpus)
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
