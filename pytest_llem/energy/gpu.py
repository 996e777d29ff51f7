"""A GPU, and how its energy can be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.hardware.nvml import NotSupportedError, Nvml, NvmlError
from pytest_llem.hardware.sensors import (
    PowerSource,
    averages_power,
    is_module,
    power_source,
    reads_module_power,
)

#: What reads the total energy counter, in mJ since the driver was loaded.
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@dataclass(frozen=True)
class Gpu:
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


def find(nvml: Nvml, uuid: str) -> Gpu:
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
    return Gpu(uuid, handle, counts, source, averages, reads_module_power(nvml, handle, source), named)
