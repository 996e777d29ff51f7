"""Find how a GPU's energy can be read, and determine the GPU's state over a window."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pytest_llem.energy.power import Power
from pytest_llem.energy.protocol import Conditions, MeterUnavailableError, PowerSample
from pytest_llem.hardware.nvml import NotSupportedError, Nvml, NvmlError
from pytest_llem.hardware.sensors import (
    GPU_SCOPE,
    MODULE_SCOPE,
    PowerSource,
    averages_power,
    is_module,
    power_source,
    power_w,
    reads_module_power,
    temperature_c,
    throttled_ns,
)

#: NVML's function that reads the total energy counter, in mJ since the driver was loaded.
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@dataclass(frozen=True)
class MeteredGpu:
    """A GPU, with how its energy can be read.

    Attributes:
        uuid: UUID of the GPU.
        handle: NVML's handle of the GPU.
        uses_counter: Whether the GPU's total energy counter is used.
        source: How the GPU's power is read; None if power cannot be read.
        averages: Whether *source* reports the mean power of the last second, not the current power.
        reads_module: Whether *source* also reports the power of the module that the GPU is on.
        is_module: Whether the GPU's name says that it shares a module with a CPU.
        counter_reason: Why the GPU's counter is not used, found by probing it; None if it is used or missing.
    """

    uuid: str
    handle: Any
    uses_counter: bool
    source: PowerSource | None
    averages: bool = False
    reads_module: bool = False
    is_module: bool = False
    counter_reason: str | None = None


def find_gpu(nvml: Nvml, uuid: str) -> MeteredGpu:
    """Return the GPU with this UUID, with how its energy can be read.

    Raises:
        MeterUnavailableError: Neither energy nor power can be read, NVML fails, or MIG is on.
    """
    try:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", uuid)
        # On a GPU without MIG this call fails. Any other failure happens again when the counter is read.
        modes = nvml.ask("nvmlDeviceGetMigMode", handle)
        if modes is not None and modes[0] == nvml.constant("NVML_DEVICE_MIG_ENABLE"):
            raise MeterUnavailableError(f"{uuid}: MIG is on, and NVML reports no energy of a MIG instance")
        source = power_source(nvml, handle)
        uses_counter = True
        try:
            nvml.call(COUNTER, handle)
        except NotSupportedError as error:
            if source is None:
                raise MeterUnavailableError(
                    f"{uuid}: no energy counter (GPUs have one since Volta), and power cannot be read"
                ) from error
            uses_counter = False
    except NvmlError as error:
        raise MeterUnavailableError(f"{uuid}: {error}") from error
    on_module = is_module(nvml.ask("nvmlDeviceGetName", handle))
    averages = averages_power(nvml, handle, source)
    reads_module = reads_module_power(nvml, handle, source)
    return MeteredGpu(uuid, handle, uses_counter, source, averages, reads_module, on_module)


@dataclass(frozen=True)
class DeviceSnapshot:
    """The state of a GPU at an edge of a window. Values that the driver does not report are None.

    Attributes:
        power: Power of the GPU.
        module_power: Power of the module that the GPU is on.
        temperature_c: Temperature, in °C.
        throttled_ns: Cumulative throttled time by reason, in ns.
    """

    power: Power | None
    temperature_c: float | None
    throttled_ns: Mapping[str, int]
    module_power: Power | None = None


def take_snapshot(nvml: Nvml, gpu: MeteredGpu) -> DeviceSnapshot:
    """Return the current state of a GPU."""
    power = _power(nvml, gpu, GPU_SCOPE)
    module = _power(nvml, gpu, MODULE_SCOPE) if gpu.reads_module else None
    return DeviceSnapshot(power, temperature_c(nvml, gpu.handle), throttled_ns(nvml, gpu.handle), module)


def _power(nvml: Nvml, gpu: MeteredGpu, scope: int) -> Power | None:
    """Return the power of a GPU or of its module, with the midpoint of the call as its time."""
    began = time.monotonic()
    watts = power_w(nvml, gpu.handle, gpu.source, scope) if gpu.source else None
    return Power((began + time.monotonic()) / 2, watts) if watts is not None else None


def conditions(before: DeviceSnapshot, after: DeviceSnapshot, samples: Sequence[PowerSample] | None) -> Conditions:
    """Return a GPU's conditions over a window.

    Args:
        before: State at the start of the window.
        after: State at the end of the window.
        samples: Samples of the window; None if no sampler ran for all of it: the peak
            temperature and the mean clocks are then unknown.
    """
    sampled = samples or ()
    temperatures = [
        temperature
        for temperature in (
            before.temperature_c,
            *(sample.temperature_c for sample in sampled),
            after.temperature_c,
        )
        if temperature is not None
    ]
    # A reason is left out if it was not reported at the start, or if its counter was reset, and so fell.
    throttled_seconds = {
        reason: (nanoseconds - before.throttled_ns[reason]) / 1e9
        for reason, nanoseconds in after.throttled_ns.items()
        if reason in before.throttled_ns and nanoseconds >= before.throttled_ns[reason]
    }
    return Conditions(
        before.temperature_c,
        after.temperature_c,
        max(temperatures) if temperatures and samples is not None else None,
        _mean(sample.sm_clock_mhz for sample in sampled),
        _mean(sample.memory_clock_mhz for sample in sampled),
        throttled_seconds or None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
