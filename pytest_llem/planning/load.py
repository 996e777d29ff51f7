"""Whether the machine is busy before a study starts."""

from __future__ import annotations

import os

from pytest_llem.hardware.cgroups import cpu_limit


def load_warning() -> str | None:
    """Return that more processes want a CPU than there are CPUs for this one; None where not, or where the system
    does not say.

    Example:
        "load 7.33 on 2 CPUs in the last minute: …"
    """
    try:
        load, cpus = os.getloadavg()[0], float(len(os.sched_getaffinity(0)))
    except (OSError, AttributeError):  # not Linux
        return None
    cpus = min(cpus, cpu_limit() or cpus)
    if load <= cpus:
        return None
    return (
        f"load {load:.2f} on {cpus:g} CPU{'s' * (cpus != 1)} in the last minute: other programs may slow down "
        "what is measured; stop them and wait"
    )
