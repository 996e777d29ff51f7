"""Describe this machine's memory and GPUs without opening a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from pytest_llem.hardware.cgroups import memory_limit_bytes
from pytest_llem.hardware.gpus import gpus_for
from pytest_llem.results.environment import package_version


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
        memory_bytes: Memory of the machine, or the limit of this process's control group if that is lower.
        memory_is_limited: Whether *memory_bytes* is that limit.
        gpus: GPUs that PyTorch would use; empty if it runs on the CPU. GPUs without memory of their own, or whose
            name, memory or compute capability cannot be read, are left out.
    """

    memory_bytes: int
    gpus: tuple[GpuCapacity, ...] = ()
    memory_is_limited: bool = False

    def gpus_of_experiment(self, count: int | None) -> tuple[GpuCapacity, ...]:
        """Return the GPUs that an experiment leases if all are free; empty if there are too few of one kind.

        Args:
            count: Number of GPUs, all of the first kind of which there are enough. None for all GPUs.
        """
        if count is None:
            return self.gpus
        kinds: dict[str, list[GpuCapacity]] = {}
        for gpu in self.gpus:
            kinds.setdefault(gpu.name, []).append(gpu)
        return next((tuple(kind[:count]) for kind in kinds.values() if len(kind) >= count), ())

    def device_memory_bytes(self, count: int | None = 1) -> int:
        """Return the memory that a model has to fit into, in bytes: that of its GPUs together, or the machine's.

        Args:
            count: Number of GPUs, as in :meth:`gpus_of_experiment`; 0 for none.
        """
        if not self.gpus or count == 0:
            return self.memory_bytes
        return sum(gpu.memory_bytes for gpu in self.gpus_of_experiment(count) or self.gpus)


def this_host() -> Host:
    """Return this machine as seen by the torch that is installed in this environment."""
    return host_for(package_version("torch"))


@cache
def host_for(torch: str | None) -> Host:
    """Return this machine as seen by a torch, without opening a CUDA context or importing torch.

    Args:
        torch: Version of torch, which shows whether it is a CPU-only build; None without torch.
    """
    import psutil

    gpus = tuple(
        GpuCapacity(gpu.name, gpu.memory_bytes, gpu.capability)
        for gpu in gpus_for(torch).all
        if gpu.name is not None and gpu.memory_bytes is not None and gpu.capability is not None
    )
    total, limit = psutil.virtual_memory().total, memory_limit_bytes()
    is_limited = limit is not None and limit < total
    return Host(limit if limit is not None and is_limited else total, gpus, is_limited)


def load_warning() -> str | None:
    """Return a warning if the load average exceeds the number of CPUs; None otherwise, or if unknown.

    The load average counts all CPUs, also those that this process may not use.

    Example:
        "load 7.33 on 2 CPUs in the last minute: …"
    """
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    cpus = os.cpu_count()
    if cpus is None or load <= cpus:
        return None
    return (
        f"load {load:.2f} on {cpus} CPU{'s' * (cpus != 1)} in the last minute: other programs may slow down "
        "what is measured; stop them and wait"
    )
