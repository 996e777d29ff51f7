"""What this host's GPUs are like at the moment: temperature, power, memory in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pytest_llem.hardware.gpus import visible_handles
from pytest_llem.hardware.nvml import Nvml

#: A reading outside of these, in °C and in W, is none.
_TEMPERATURES_C = (-40.0, 150.0)
_POWERS_W = (0.0, 10_000.0)


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
Look = Mapping[str, GpuState]


class Gauges:
    """Reads the GPUs that CUDA may use; what it gives on being entered returns a :data:`Look`.

    It opens NVML, and no CUDA context, and lets it go at the end. Where there is no NVML, or no GPU, it sees
    none and raises nothing.
    """

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> Callable[[], Look]:
        self._nvml.__enter__()
        self._handles = visible_handles(self._nvml).by_uuid
        return self._look

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles = {}
        self._nvml.__exit__(kind, error, trace)

    def _look(self) -> Look:
        return {uuid: self._state(handle) for uuid, handle in self._handles.items()}

    def _state(self, handle: Any) -> GpuState:
        ask, sensor = self._nvml.ask, self._nvml.constant("NVML_TEMPERATURE_GPU")
        temperature = None
        for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # old drivers have only the latter
            if temperature is None:
                temperature = ask(name, handle, sensor)
        milliwatts = ask("nvmlDeviceGetPowerUsage", handle)
        power = milliwatts / 1000 if milliwatts is not None else None
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        return GpuState(
            _plausible(temperature, *_TEMPERATURES_C),
            _plausible(power, *_POWERS_W),
            int(memory.used) if memory is not None else None,
        )


def _plausible(value: float | None, least: float, most: float) -> float | None:
    return float(value) if value is not None and least <= value <= most else None
