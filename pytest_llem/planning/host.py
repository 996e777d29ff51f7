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


@cache
def this_host() -> Host:
    """Return this machine. No CUDA context is opened, and torch is not imported."""
    import psutil

    return Host(psutil.virtual_memory().total, tuple(_gpus()) if _torch_may_use_gpus() else ())


def _torch_may_use_gpus() -> bool:
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return False
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
