"""What this machine has, as far as it can be told without opening a device."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its memory in bytes, and its CUDA compute capability."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        memory_bytes: Of the machine itself.
        gpus: Those that PyTorch would use, empty where it runs on the CPU.
    """

    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()

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

    return Host(psutil.virtual_memory().total, tuple(_gpus()) if torch and _may_use_gpus(torch) else ())


def _may_use_gpus(torch: str) -> bool:
    build = torch.partition("+")[2]
    return not build.startswith("cpu") and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")


def _gpus() -> list[Gpu]:
    import pynvml

    found = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found.append(
                    Gpu(
                        pynvml.nvmlDeviceGetName(handle),
                        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                        tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    )
                )
        finally:
            pynvml.nvmlShutdown()
    return found
