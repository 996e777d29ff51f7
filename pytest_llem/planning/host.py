"""What this machine has, as far as it can be told without opening a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from pytest_llem.hardware.cgroups import cpu_limit, memory_limit_bytes
from pytest_llem.hardware.gpus import gpus_for


@dataclass(frozen=True)
class GpuCapacity:
    """A GPU: its name, its memory in bytes, and its CUDA compute capability."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        memory_bytes: Of the machine itself, or what of it this process's control group may have.
        memory_is_limited: It is the latter.
        gpus: Those that PyTorch would use, empty where it runs on the CPU. One that does not tell what it is, or
            has no memory of its own, is left out.
    """

    memory_bytes: int
    gpus: tuple[GpuCapacity, ...] = ()
    memory_is_limited: bool = False

    @property
    def device_memory_bytes(self) -> int:
        """The memory of the device that a model has to fit into: the largest GPU's, or the machine's."""
        return max((gpu.memory_bytes for gpu in self.gpus), default=self.memory_bytes)


def this_host() -> Host:
    """Return this machine, for the torch that is installed here."""
    try:
        return host_for(version("torch"))
    except PackageNotFoundError:
        return host_for(None)


@cache
def host_for(torch: str | None) -> Host:
    """Return this machine. No CUDA context is opened, and torch is not imported.

    Args:
        torch: Version of the torch that is to run on it, which tells a build for CPUs alone; None for no torch.
    """
    import psutil

    gpus = tuple(
        GpuCapacity(board.name, board.memory_bytes, board.capability)
        for board in gpus_for(torch).all
        if board.name is not None and board.memory_bytes is not None and board.capability is not None
    )
    total, limit = psutil.virtual_memory().total, memory_limit_bytes()
    is_limited = limit is not None and limit < total
    return Host(limit if limit is not None and is_limited else total, gpus, is_limited)


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
