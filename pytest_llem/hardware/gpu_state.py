"""Read the current state of this host's GPUs: temperature, power and memory in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_llem.hardware.gpus import visible_handles
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import power_w, temperature_c


@dataclass(frozen=True)
class GpuState:
    """State of a GPU. Values that cannot be read are None.

    Attributes:
        temperature_c: Temperature, in °C.
        power_w: Power, in W.
        used_bytes: Memory in use by all processes, in bytes.
    """

    temperature_c: float | None = None
    power_w: float | None = None
    used_bytes: int | None = None


#: States of GPUs by UUID.
GpuStates = Mapping[str, GpuState]


@contextmanager
def gpu_sensors() -> Iterator[Callable[[], GpuStates]]:
    """Yield a function that returns the states of the GPUs that CUDA may use.

    NVML is open while the context is active. No CUDA context is created. Without NVML or GPUs, and after the
    context, the function returns an empty mapping.

    Example:
        with gpu_sensors() as read:
            temperatures = {uuid: state.temperature_c for uuid, state in read().items()}
    """
    with Nvml() as nvml:
        handles = visible_handles(nvml).by_uuid
        try:
            yield lambda: {uuid: _state(nvml, handle) for uuid, handle in handles.items()}
        finally:
            handles.clear()


def _state(nvml: Nvml, handle: Any) -> GpuState:
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    return GpuState(
        temperature_c(nvml, handle),
        power_w(nvml, handle, "nvml_power_usage"),
        int(memory.used) if memory is not None else None,
    )
