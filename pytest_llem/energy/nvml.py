"""GPU energy from NVML's total energy counter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import pynvml

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

#: The counter moves in ticks of 20 to 100 ms on the boards seen so far; one that stands still for this long
#: is not waited for any longer.
LONGEST_TICK_S = 0.5
_POLL_S = 0.001
_PROBED_TICKS = 3


class NvmlMeter:
    """Reads ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded) at both edges.

    The counter moves in ticks, so that a window cut anywhere between two of them is off by up to a tick's
    energy at either end. Both edges are therefore put on a tick of the first device.
    """

    def __init__(self) -> None:
        self._devices: dict[str, Any] = {}
        self._tick_s: float | None = None
        self._start: dict[str, int | str] = {}
        self._began = 0.0

    def open(self, gpus: Sequence[str]) -> None:
        if not gpus:
            raise MeterUnavailableError("the engine runs on no NVIDIA GPU")
        try:
            pynvml.nvmlInit()
            for uuid in gpus:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                _refuse_mig(handle)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                self._devices[uuid] = handle
        except pynvml.NVMLError as error:
            raise MeterUnavailableError(f"NVML: {error}") from error
        ticks = [tick for _ in range(_PROBED_TICKS + 1) if (tick := self._wait_for_tick()) is not None]
        # The first wait started anywhere within a tick.
        self._tick_s = statistics.median(ticks[1:]) if len(ticks) > 1 else None

    def begin(self) -> None:
        self._wait_for_tick()
        self._start = {uuid: _counter(handle) for uuid, handle in self._devices.items()}
        self._began = time.monotonic()

    def end(self) -> Reading:
        self._wait_for_tick()
        stop = {uuid: _counter(handle) for uuid, handle in self._devices.items()}
        seconds = time.monotonic() - self._began
        devices = tuple(_reading(uuid, self._start[uuid], stop[uuid]) for uuid in self._devices)
        return Reading(devices, seconds, self._tick_s)

    def close(self) -> None:
        self._devices.clear()
        pynvml.nvmlShutdown()

    def _wait_for_tick(self) -> float | None:
        """Return how long the first device's counter took to move, null where it did not."""
        handle = next(iter(self._devices.values()))
        began = time.monotonic()
        first = _counter(handle)
        while (waited := time.monotonic() - began) < LONGEST_TICK_S:
            if _counter(handle) != first:
                return waited
            time.sleep(_POLL_S)
        return None


def _counter(handle: Any) -> int | str:
    """Return the counter in mJ, or why it could not be read."""
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except pynvml.NVMLError as error:
        return str(error)


def _reading(uuid: str, start: int | str, stop: int | str) -> DeviceReading:
    reason = next((edge for edge in (start, stop) if isinstance(edge, str)), None)
    energy_j: float | None = None
    if isinstance(start, int) and isinstance(stop, int):
        if stop > start:
            energy_j = (stop - start) / 1000
        else:  # a board that is on always draws power: the counter was reset, or is stuck
            reason = f"the energy counter did not rise (from {start} to {stop} mJ)"
    return DeviceReading(
        device=uuid,
        boundary="gpu_board",
        energy_j=energy_j,
        method="unavailable" if energy_j is None else "measured",
        source="nvml_total_energy",
        reason=f"NVML: {reason}" if reason else None,
    )


def _refuse_mig(handle: Any) -> None:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return  # a board without MIG says so by an error
    if current == pynvml.NVML_DEVICE_MIG_ENABLE:
        raise MeterUnavailableError("MIG is on: no energy is known for a part of a GPU")
