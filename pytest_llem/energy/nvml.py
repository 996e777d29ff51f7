"""GPU energy from NVML's total energy counter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pynvml

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

#: The counter moves in ticks of 20 to 100 ms on the boards seen so far; one that stands still for this long
#: is not waited for any longer.
LONGEST_TICK_S = 0.5
_POLL_S = 0.001
_PROBED_TICKS = 5


class NvmlMeter:
    """Reads ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded) at both edges.

    The counter moves in ticks, so that a window cut anywhere between two of them is off by up to a tick's
    energy at either end. Both edges are therefore put on a tick of the first device that has one; the others
    are read right after it.
    """

    def __init__(self) -> None:
        self._initialised = False
        self._devices: dict[str, Any] = {}
        self._tick_s: float | None = None
        self._start: dict[str, int | str] = {}
        self._began = 0.0

    def open(self, gpus: Sequence[str]) -> None:
        if not gpus:
            raise MeterUnavailableError("the engine runs on no NVIDIA GPU")
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise MeterUnavailableError(f"NVML: {error}") from error
        self._initialised = True
        try:
            self._devices = {uuid: _handle(uuid) for uuid in gpus}
        except MeterUnavailableError:
            self.close()
            raise
        self._tick_s = self._probe_tick()

    def begin(self) -> None:
        self._next_tick()
        self._start = {uuid: _counter(handle) for uuid, handle in self._devices.items()}
        self._began = time.monotonic()

    def end(self) -> Reading:
        self._next_tick()
        stop = {uuid: _counter(handle) for uuid, handle in self._devices.items()}
        seconds = time.monotonic() - self._began
        devices = tuple(_reading(uuid, self._start[uuid], stop[uuid]) for uuid in self._devices)
        return Reading(devices, seconds, self._tick_s)

    def close(self) -> None:
        self._devices = {}
        if self._initialised:
            self._initialised = False
            with suppress(pynvml.NVMLError):  # the figures are in: nothing is left that this could spoil
                pynvml.nvmlShutdown()

    def _probe_tick(self) -> float | None:
        """Return the median time between two ticks in s, null where the counter stands still."""
        seen: list[float] = []
        while len(seen) <= _PROBED_TICKS and (tick := self._next_tick()) is not None:
            seen.append(tick)
        # One seen late makes one gap too long and the next too short: the median stays.
        return statistics.median(after - before for before, after in pairwise(seen)) if len(seen) > 1 else None

    def _next_tick(self) -> float | None:
        """Wait until a counter moves: the first device's, or the next one's where that is lost or stuck.

        Returns:
            When it was seen to, on the monotonic clock in s; null where none moved.
        """
        for handle in self._devices.values():
            first = now = _counter(handle)
            deadline = time.monotonic() + LONGEST_TICK_S
            while isinstance(now, int):
                seen = time.monotonic()
                if now != first:
                    return seen
                if seen > deadline:
                    break
                time.sleep(_POLL_S)
                now = _counter(handle)
        return None


def _handle(uuid: str) -> Any:
    """Return the handle of a GPU whose energy can be read.

    Raises:
        MeterUnavailableError: It cannot.
    """
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if _is_partitioned(handle):
            raise MeterUnavailableError(f"NVML: {uuid}: MIG is on, and no energy is known for a part of a GPU")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError_NotSupported as error:
        raise MeterUnavailableError(f"NVML: {uuid}: no energy counter (boards have one from Volta on)") from error
    except pynvml.NVMLError as error:
        raise MeterUnavailableError(f"NVML: {uuid}: {error}") from error
    return handle


def _is_partitioned(handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return False  # a board without MIG says so by an error; any other comes up again at the counter
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


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
