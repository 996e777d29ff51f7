"""The state of the GPUs of this host now: temperature, power and memory in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pytest_llem.hardware.gpus import visible_handles
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import power_w, temperature_c


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    Attributes:
        temperature_c: In °C, or None where it cannot be read.
        power_w: In W, or None where it cannot be read.
        used_bytes: Memory in use by whoever, or None where it cannot be read.
    """

    temperature_c: float | None = None
    power_w: float | None = None
    used_bytes: int | None = None


#: The GPUs' states by UUID.
GpuStates = Mapping[str, GpuState]


class GpuSensors:
    """Reads the GPUs that CUDA may use; what it gives on being entered returns a :data:`Look`.

    It opens NVML, and no CUDA context, and lets it go at the end. Where there is no NVML, or no GPU, it sees
    none and raises nothing.
    """

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> Callable[[], GpuStates]:
        self._nvml.__enter__()
        self._handles = visible_handles(self._nvml).by_uuid
        return self._look

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles = {}
        self._nvml.__exit__(kind, error, trace)

    def _look(self) -> GpuStates:
        return {uuid: self._state(handle) for uuid, handle in self._handles.items()}

    def _state(self, handle: Any) -> GpuState:
        memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", handle)
        return GpuState(
            temperature_c(self._nvml, handle),
            power_w(self._nvml, handle, "nvml_power_usage"),
            int(memory.used) if memory is not None else None,
        )
