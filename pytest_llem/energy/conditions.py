"""Determine a GPU's temperature, clocks and throttling over a window."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pytest_llem.energy.gpu_source import GpuMeterSource
from pytest_llem.energy.power import Power
from pytest_llem.energy.protocol import Conditions, PowerSample
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import GPU_SCOPE, MODULE_SCOPE, power_w, temperature_c, throttled_ns


@dataclass(frozen=True)
class DeviceSnapshot:
    """The state of a GPU at an edge of a window. Values that it does not report are None.

    Attributes:
        power: Power of the GPU.
        module_power: Power of the module that the GPU is on, if the driver reports it.
        temperature_c: Temperature, in °C.
        throttled_ns: Cumulative throttled time by reason, in ns.
    """

    power: Power | None
    temperature_c: float | None
    throttled_ns: Mapping[str, int]
    module_power: Power | None = None


def take_snapshot(nvml: Nvml, gpu: GpuMeterSource) -> DeviceSnapshot:
    """Return the current state of a GPU."""
    power = _power(nvml, gpu, GPU_SCOPE)
    module = _power(nvml, gpu, MODULE_SCOPE) if gpu.reads_module else None
    return DeviceSnapshot(power, temperature_c(nvml, gpu.handle), throttled_ns(nvml, gpu.handle), module)


def _power(nvml: Nvml, gpu: GpuMeterSource, scope: int) -> Power | None:
    began = time.monotonic()
    watts = power_w(nvml, gpu.handle, gpu.source, scope) if gpu.source else None
    return Power((began + time.monotonic()) / 2, watts) if watts is not None else None


def conditions(before: DeviceSnapshot, after: DeviceSnapshot, samples: Sequence[PowerSample] | None) -> Conditions:
    """Return a GPU's conditions over a window.

    Args:
        before: State at the start of the window.
        after: State at its end.
        samples: Samples of the window; None if no sampler ran for all of it, so that peak and mean are unknown.
    """
    sampled = samples or ()
    known = [
        temperature
        for temperature in (
            before.temperature_c,
            *(sample.temperature_c for sample in sampled),
            after.temperature_c,
        )
        if temperature is not None
    ]
    throttled_seconds = {
        reason: (nanoseconds - before.throttled_ns[reason]) / 1e9
        for reason, nanoseconds in after.throttled_ns.items()
        if nanoseconds >= before.throttled_ns.get(reason, nanoseconds + 1)  # a lower value: the counter was reset
    }
    return Conditions(
        before.temperature_c,
        after.temperature_c,
        max(known) if known and samples is not None else None,
        _mean(sample.sm_clock_mhz for sample in sampled),
        _mean(sample.memory_clock_mhz for sample in sampled),
        throttled_seconds or None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
