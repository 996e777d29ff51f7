"""Temperature and power of this host's GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

#: A reading outside of these, in °C and in W, is none.
_TEMPERATURES_C = (-40.0, 150.0)
_POWERS_W = (0.0, 10_000.0)


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    Attributes:
        temperature_c: In °C, or None where it cannot be read.
        power_w: In W, or None where it cannot be read.
    """

    temperature_c: float | None
    power_w: float | None


#: The GPUs' states by UUID.
Look = Mapping[str, GpuState]


class Thermometer:
    """Reads the GPUs that CUDA may use; what it gives on being entered returns a :data:`Look`.

    It opens NVML, and no CUDA context, and lets it go at the end. Where there is no NVML, or no GPU, it sees
    none and raises nothing.
    """

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._initialised = False

    def __enter__(self) -> Callable[[], Look]:
        try:
            import pynvml
        except ImportError:
            return self._look
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return self._look
        self._initialised = True
        self._handles = _handles()
        return self._look

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles = {}
        if self._initialised:
            self._initialised = False
            import pynvml

            _asked(pynvml.nvmlShutdown)

    def _look(self) -> Look:
        return {uuid: _state(handle) for uuid, handle in self._handles.items()}


def visible_boards(uuids: Sequence[str], visible: str | None, *, ordered: bool = True) -> set[str]:
    """Return which of the boards CUDA may use.

    Args:
        uuids: All boards in NVML's order, which is that of the bus.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
        ordered: CUDA counts them in that order too. It may put the fastest first, and on a host of different
            boards an index then tells nothing: all are meant.
    """
    if visible is None:
        return set(uuids)
    found: set[str] = set()
    for entry in map(str.strip, visible.split(",")):
        if entry.startswith("MIG-") or (entry.isdecimal() and not ordered):
            return set(uuids)
        if entry.isdecimal():
            named = list(uuids[int(entry) : int(entry) + 1])
        else:
            named = [uuid for uuid in uuids if entry and uuid.startswith(entry)]
        if len(named) != 1:
            break  # CUDA, too, takes only those before the first entry that names none
        found.add(named[0])
    return found


def _handles() -> dict[str, Any]:
    """Return NVML's handles of the boards that CUDA may use, by UUID."""
    import pynvml

    handles: dict[str, Any] = {}
    names: set[str | None] = set()
    for index in range(_asked(pynvml.nvmlDeviceGetCount) or 0):
        handle = _asked(pynvml.nvmlDeviceGetHandleByIndex, index)
        uuid = _asked(pynvml.nvmlDeviceGetUUID, handle) if handle is not None else None
        # One that does not answer keeps its place all the same.
        handles[uuid or f"lost {index}"] = handle if uuid else None
        names.add(_asked(pynvml.nvmlDeviceGetName, handle) if uuid else None)
    ordered = len(names) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    visible = visible_boards(list(handles), os.environ.get("CUDA_VISIBLE_DEVICES"), ordered=ordered)
    return {uuid: handle for uuid, handle in handles.items() if handle is not None and uuid in visible}


def _state(handle: Any) -> GpuState:
    import pynvml

    temperature = None
    for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # old drivers have only the latter
        if temperature is None and (ask := getattr(pynvml, name, None)):
            temperature = _asked(ask, handle, pynvml.NVML_TEMPERATURE_GPU)
    milliwatts = _asked(pynvml.nvmlDeviceGetPowerUsage, handle)
    power = milliwatts / 1000 if milliwatts is not None else None
    return GpuState(_plausible(temperature, *_TEMPERATURES_C), _plausible(power, *_POWERS_W))


def _plausible(value: float | None, least: float, most: float) -> float | None:
    return float(value) if value is not None and least <= value <= most else None


def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of NVML says, None where it fails."""
    import pynvml

    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None
