"""Find the sources of a GPU's energy, integrate its power, and determine its state over a window."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

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

#: Longest accepted time without a sample, in s: ten samples are missing by then.
MAX_GAP_S = 1.0


@dataclass(frozen=True)
class MeteredGpu:
    """A GPU, with the sources of its energy.

    Attributes:
        uuid: UUID of the GPU.
        handle: NVML's handle of the GPU.
        uses_counter: Whether the GPU's total energy counter is used.
        source: Source of the GPU's power; None if power cannot be read.
        averages: Whether *source* reports the mean power of the last second, not the current power.
        reads_module: Whether *source* also reports the power of the module that the GPU is on.
        is_module: Whether the GPU's name says that it shares a module with a CPU.
        counter_reason: Why the counter is not used although the GPU has one.
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
    """Return the GPU with this UUID, with the sources of its energy.

    Raises:
        MeterUnavailableError: Neither energy nor power can be read.
    """
    try:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", uuid)
        # On a GPU without MIG this call fails. Any other failure happens again when the counter is read.
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
    """Return the power of a GPU or of its module, at the middle of the time that reading it took."""
    began = time.monotonic()
    watts = power_w(nvml, gpu.handle, gpu.source, scope) if gpu.source else None
    return Power((began + time.monotonic()) / 2, watts) if watts is not None else None


def conditions(before: DeviceSnapshot, after: DeviceSnapshot, samples: Sequence[PowerSample] | None) -> Conditions:
    """Return a GPU's conditions over a window.

    Args:
        before: State at the start of the window.
        after: State at the end of the window.
        samples: Samples of the window; None if no sampler ran for all of it, so that peak and mean are unknown.
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
    # A reason is left out if it was not reported at the start, or if its counter fell, so that it was reset.
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


class Power(NamedTuple):
    """Power at an instant of the monotonic clock: in s, and in W."""

    at: float
    watts: float


class NoIntegralError(Exception):
    """The samples do not suffice for an integral."""


class Integral(NamedTuple):
    """Energy over a window, and its standard uncertainty (k = 1) from sampling at intervals, both in J."""

    energy_j: float
    uncertainty_j: float


def integrate(samples: Sequence[Power], began: float, ended: float) -> Integral:
    """Return the energy from *began* to *ended*, by the trapezoidal rule.

    Power is interpolated linearly between two samples, including the nearest ones outside of the window. It is
    constant before the first and after the last sample: a constant 70 W is 700 J in 10 s for any sample times.

    The uncertainty has two parts. Each edge is known only to the mean time Δ between samples, like a counter's
    tick. Each change between two samples may have happened at any time between them. With the mean power P:
    u² = 2·(P·Δ)²/12 + Σ(ΔP·Δt)²/12.

    Args:
        samples: Samples in order of time.
        began: Start of the window on the monotonic clock, in s.
        ended: End of the window, in s.

    Raises:
        NoIntegralError: There are fewer than two samples, or none for :data:`MAX_GAP_S`.
    """
    first = max(bisect_right(samples, began, key=_at) - 1, 0)  # the last sample at or before the edge
    last = bisect_left(samples, ended, key=_at) + 1
    known = samples[first:last]
    if len(known) < 2:
        raise NoIntegralError(f"{len(known)} samples of power in {ended - began:.1f} s")
    gap = max(*(b.at - a.at for a, b in pairwise(known)), known[0].at - began, ended - known[-1].at)
    if gap > MAX_GAP_S:
        raise NoIntegralError(f"no sample of power for {gap:.1f} s")
    inside = [began, *(one.at for one in known if began < one.at < ended), ended]
    points = [Power(at, _watts(known, at)) for at in inside]
    energy_j = sum((b.at - a.at) * (a.watts + b.watts) / 2 for a, b in pairwise(points))
    interval = (known[-1].at - known[0].at) / (len(known) - 1)
    edges = 2 * (energy_j / (ended - began) * interval) ** 2
    steps = sum(((b.watts - a.watts) * (b.at - a.at)) ** 2 for a, b in pairwise(known))
    return Integral(energy_j, math.sqrt((edges + steps) / 12))


def _at(sample: Power) -> float:
    return sample.at


def _watts(samples: Sequence[Power], at: float) -> float:
    """Return the power at an instant: interpolated between two samples, or that of the nearest one."""
    after = bisect_left(samples, at, key=_at)
    if after in (0, len(samples)):
        return samples[min(after, len(samples) - 1)].watts
    a, b = samples[after - 1], samples[after]
    return a.watts + (b.watts - a.watts) * (at - a.at) / (b.at - a.at)
