"""What a GPU was like over a window: looks at both of its edges, and samples between them."""

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
    """A GPU at an edge of a window. What it does not tell is None.

    Attributes:
        power: What it draws.
        module_power: Power of the module that the board is on, where the driver reports it.
        temperature_c: In °C.
        throttled_ns: For how long it has held its clocks down so far, by reason.
    """

    power: Power | None
    temperature_c: float | None
    throttled_ns: Mapping[str, int]
    module_power: Power | None = None


def take_snapshot(nvml: Nvml, gpu: GpuMeterSource) -> DeviceSnapshot:
    """Look at a board, through what tells its power."""
    power = _power(nvml, gpu, GPU_SCOPE)
    module = _power(nvml, gpu, MODULE_SCOPE) if gpu.reads_module else None
    return DeviceSnapshot(power, temperature_c(nvml, gpu.handle), throttled_ns(nvml, gpu.handle), module)


def _power(nvml: Nvml, gpu: GpuMeterSource, scope: int) -> Power | None:
    began = time.monotonic()
    watts = power_w(nvml, gpu.handle, gpu.source, scope) if gpu.source else None
    return Power((began + time.monotonic()) / 2, watts) if watts is not None else None


def conditions(before: DeviceSnapshot, after: DeviceSnapshot, samples: Sequence[PowerSample] | None) -> Conditions:
    """Return what a GPU was like.

    Args:
        before: As the window began.
        after: As it ended.
        samples: From within; None where there was no sampler all along, and no peak or mean is known.
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
    grown = {
        reason: (nanoseconds - before.throttled_ns[reason]) / 1e9
        for reason, nanoseconds in after.throttled_ns.items()
        if nanoseconds >= before.throttled_ns.get(reason, nanoseconds + 1)  # or it was reset
    }
    return Conditions(
        before.temperature_c,
        after.temperature_c,
        max(known) if known and samples is not None else None,
        _mean(sample.sm_clock_mhz for sample in sampled),
        _mean(sample.memory_clock_mhz for sample in sampled),
        grown or None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
