"""Find out how the energy of a GPU can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError
from pytest_llem.hardware.nvml import NotSupportedError, Nvml, NvmlError
from pytest_llem.hardware.sensors import (
    PowerSource,
    averages_power,
    is_module,
    power_source,
    reads_module_power,
)
from pytest_llem.results.facts import MIN_TICKS

#: NVML's function that reads the total energy counter, in mJ since the driver was loaded.
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@dataclass(frozen=True)
class GpuMeterSource:
    """A GPU, with the sources of its energy.

    Attributes:
        uuid: UUID of the GPU.
        handle: NVML's handle.
        uses_counter: Whether its total energy counter is used.
        source: Source of its power; None if power cannot be read.
        averages: Whether *source* is the mean of the last second, which lags behind.
        reads_module: Whether *source* also reports the power of the module.
        is_module: Whether the GPU shares a module with a CPU, by its name.
        counter_reason: Why an existing counter is not used.
    """

    uuid: str
    handle: Any
    uses_counter: bool
    source: PowerSource | None
    averages: bool = False
    reads_module: bool = False
    is_module: bool = False
    counter_reason: str | None = None


def find_source(nvml: Nvml, uuid: str) -> GpuMeterSource:
    """Return a GPU with the sources of its energy.

    Raises:
        MeterUnavailableError: Neither energy nor power can be read.
    """
    try:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", uuid)
        # A GPU without MIG returns an error here. Any other error repeats when the counter is read.
        modes = nvml.ask("nvmlDeviceGetMigMode", handle)
        if modes is not None and modes[0] == nvml.constant("NVML_DEVICE_MIG_ENABLE"):
            raise MeterUnavailableError(f"NVML: {uuid}: MIG is on, and NVML reports no energy of a MIG instance")
        source = power_source(nvml, handle)
        uses_counter = True
        try:
            nvml.call(COUNTER, handle)
        except NotSupportedError as error:
            if source is None:
                raise MeterUnavailableError(
                    f"NVML: {uuid}: no energy counter (GPUs have one since Volta), and power cannot be read"
                ) from error
            uses_counter = False
    except NvmlError as error:
        raise MeterUnavailableError(f"NVML: {uuid}: {error}") from error
    named = is_module(nvml.ask("nvmlDeviceGetName", handle))
    averages = averages_power(nvml, handle, source)
    reads_module = reads_module_power(nvml, handle, source)
    return GpuMeterSource(uuid, handle, uses_counter, source, averages, reads_module, named)


#: Relative difference between counter and integral above which there is a warning, and the energy is invalid.
MAX_DISAGREEMENT, MAX_VALID_DISAGREEMENT = 0.03, 0.05


def disagreement(device: DeviceReading, seconds: float | None, tick_seconds: float | None) -> float | None:
    """Return integral / counter − 1 of a device if it is beyond ±:data:`MAX_DISAGREEMENT`.

    None if they agree, if one is missing, if the difference is within three standard uncertainties, or if the
    window has fewer than :data:`MIN_TICKS` ticks, which has a warning of its own. A meter with an unknown tick is
    checked too.

    Args:
        device: The reading of the device.
        seconds: Time that the reading covers, in s.
        tick_seconds: Tick of the counter, in s; None if unknown.
    """
    if device.integral_j is None or not device.energy_j:
        return None
    if tick_seconds and (not seconds or seconds < MIN_TICKS * tick_seconds):
        return None
    # The integral is inexact if power changes faster than it is sampled.
    uncertainty_j = 3 * math.hypot(device.integral_uncertainty_j or 0, device.uncertainty_j or 0)
    off = device.integral_j / device.energy_j - 1
    return off if abs(off) > max(MAX_DISAGREEMENT, uncertainty_j / abs(device.energy_j)) else None
