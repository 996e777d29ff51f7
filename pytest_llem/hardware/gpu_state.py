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


class GpuSensors:
    """A context that yields a function, which returns the states of the GPUs that CUDA may use.

    NVML is open while the context is active. No CUDA context is created. Without NVML or GPUs the function returns
    an empty mapping.

    Example:
        with GpuSensors() as read:
            temperatures = {uuid: state.temperature_c for uuid, state in read().items()}
    """

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> Callable[[], GpuStates]:
        self._nvml.__enter__()
        self._handles = visible_handles(self._nvml).by_uuid
        return self._states

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles = {}
        self._nvml.__exit__(kind, error, trace)

    def _states(self) -> GpuStates:
        return {uuid: self._state(handle) for uuid, handle in self._handles.items()}

    def _state(self, handle: Any) -> GpuState:
        memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", handle)
        return GpuState(
            temperature_c(self._nvml, handle),
            power_w(self._nvml, handle, "nvml_power_usage"),
            int(memory.used) if memory is not None else None,
        )
