"""A GPU, and how its energy can be had."""

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

#: What reads the total energy counter, in mJ since the driver was loaded.
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@dataclass(frozen=True)
class GpuMeterSource:
    """A GPU.

    Attributes:
        uuid: Its identity.
        handle: NVML's.
        counts: It has a total energy counter.
        source: What tells its power; None where nothing does.
        averages: What *source* tells is the mean of the last second, which lags behind.
        reads_module: Whether it reports the module's power, too.
        is_module: By its name it shares a module with a CPU.
        counter_reason: Why its counter is not used though it has one.
    """

    uuid: str
    handle: Any
    counts: bool
    source: PowerSource | None
    averages: bool = False
    reads_module: bool = False
    is_module: bool = False
    counter_reason: str | None = None


def find_source(nvml: Nvml, uuid: str) -> GpuMeterSource:
    """Return a GPU whose energy can be had.

    Raises:
        MeterUnavailableError: It cannot.
    """
    try:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", uuid)
        # A board without MIG says so by an error; any other one comes up again at the counter.
        modes = nvml.ask("nvmlDeviceGetMigMode", handle)
        if modes is not None and modes[0] == nvml.constant("NVML_DEVICE_MIG_ENABLE"):
            raise MeterUnavailableError(f"NVML: {uuid}: MIG is on, and no energy is known for a part of a GPU")
        source = power_source(nvml, handle)
        counts = True
        try:
            nvml.call(COUNTER, handle)
        except NotSupportedError as error:
            if source is None:
                raise MeterUnavailableError(
                    f"NVML: {uuid}: no energy counter (boards have one from Volta on), and no reading of power"
                ) from error
            counts = False
    except NvmlError as error:
        raise MeterUnavailableError(f"NVML: {uuid}: {error}") from error
    named = is_module(nvml.ask("nvmlDeviceGetName", handle))
    averages = averages_power(nvml, handle, source)
    return GpuMeterSource(uuid, handle, counts, source, averages, reads_module_power(nvml, handle, source), named)


#: By what share they may differ before that is warned of, and before the energy is invalid.
MAX_DISAGREEMENT, MAX_VALID_DISAGREEMENT = 0.03, 0.05


def disagreement(device: DeviceReading, seconds: float | None, tick_seconds: float | None) -> float | None:
    """Return integral / counter − 1 of a device where that is more than :data:`MAX_DISAGREEMENT`.

    None where they agree, where one of them is missing, where the difference is within three standard
    uncertainties of the two, and in a window of fewer than :data:`MIN_TICKS` ticks, of which there is a warning
    anyway. A meter whose tick is not known is checked all the same.

    Args:
        device: What was read.
        seconds: What the reading covers.
        tick_seconds: Of the counter; None where it is not known.
    """
    if device.integral_j is None or not device.energy_j:
        return None
    if tick_seconds and (not seconds or seconds < MIN_TICKS * tick_seconds):
        return None
    # Power that changes faster than it is sampled has an integral that is good to no more than this.
    uncertainty_j = 3 * math.hypot(device.integral_uncertainty_j or 0, device.uncertainty_j or 0)
    off = device.integral_j / device.energy_j - 1
    return off if abs(off) > max(MAX_DISAGREEMENT, uncertainty_j / abs(device.energy_j)) else None
