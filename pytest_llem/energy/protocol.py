"""What a meter is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from pytest_llem.results.metrics import METHODS, Method


class MeterUnavailableError(Exception):
    """A meter that cannot read anything here; the message says why, and what would help."""


class _Finite:
    """A dataclass whose figures are numbers: what a meter makes of nothing is None."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # those that inherit it are dataclasses
            figure = getattr(self, one.name)
            if isinstance(figure, float) and not math.isfinite(figure):
                raise ValueError(f"{one.name} must be a finite number (got {figure})")


@dataclass(frozen=True)
class Conditions(_Finite):
    """What a device was like over a window. What it does not tell is None.

    Attributes:
        start_temperature_c: As the window began, in °C.
        end_temperature_c: As it ended.
        peak_temperature_c: The highest that was seen.
        mean_sm_clock_mhz: Of the processors, in MHz.
        mean_memory_clock_mhz: Of the memory.
        throttled_seconds: For each reason, for how many seconds of the window it held the clocks down: the
            difference of cumulative counters. Reasons may overlap. What is not counted is not in it.
    """

    start_temperature_c: float | None = None
    end_temperature_c: float | None = None
    peak_temperature_c: float | None = None
    mean_sm_clock_mhz: float | None = None
    mean_memory_clock_mhz: float | None = None
    throttled_seconds: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PowerSample(_Finite):
    """One look at a device while a window was open. What it did not tell is None.

    Attributes:
        at: When, on the monotonic clock, in s.
        device: As in :class:`DeviceReading`.
        power_w: At that instant, or as near to it as the device tells, in W.
        temperature_c: In °C.
        sm_clock_mhz: Of the processors, in MHz.
        memory_clock_mhz: Of the memory.
        module_power_w: Of the whole module, where that is read apart from the GPU's.
    """

    at: float
    device: str
    power_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    module_power_w: float | None = None


@dataclass(frozen=True)
class DeviceReading(_Finite):
    """Energy of one device between ``begin`` and ``end``.

    Attributes:
        device: Its identity: a GPU's UUID, ``package-0``, …
        boundary: What the figure covers: ``gpu_board``, ``module`` (a GPU with the CPU and memory that share its
            module), ``cpu_package``, ``dram``, …
        energy_j: In joules; null where it could not be read, never 0 in its place.
        method: How it was obtained.
        source: What it was read from.
        reason: Why ``energy_j`` is null.
        seconds: What ``energy_j`` covers, where that is not the whole reading's: each counter ticks by itself.
        uncertainty_j: Standard uncertainty (k = 1) of reading both edges, in J; without the gain's.
        gain_error: By what share the counter may be off a wall meter, throughout; stated apart, since it cancels
            between two figures of one device.
        integral_j: The same from sampled power, where both are to be had: a check.
        integral_uncertainty_j: Standard uncertainty of that, which comes of looking only now and then, in J.
        integral_reason: Why there is no ``integral_j`` beside a counter that it could check: the sampler failed,
            or power cannot be read.
        counter_reason: Why power was sampled though the device has an energy counter.
        conditions: What the device was like.
    """

    device: str
    boundary: str
    energy_j: float | None
    method: Method
    source: str
    reason: str | None = None
    seconds: float | None = None
    uncertainty_j: float | None = None
    gain_error: float | None = None
    integral_j: float | None = None
    integral_uncertainty_j: float | None = None
    integral_reason: str | None = None
    counter_reason: str | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} (got {self.method!r})")


@dataclass(frozen=True)
class Reading(_Finite):
    """What a meter saw between ``begin`` and ``end``.

    Attributes:
        devices: One entry a device.
        seconds: What it covers, on the monotonic clock, in seconds; where devices have their own, their mean.
        tick_seconds: Of the counter, where it moves in ticks; where power is sampled, from one sample to the next.
        read_skew_seconds: How far apart the devices' windows begin or end at most; None for a single one.
        samples: What was sampled meanwhile, in order of time.
        harness_cpu_seconds: Processor time that the meter's own processes took meanwhile.
    """

    devices: tuple[DeviceReading, ...]
    seconds: float
    tick_seconds: float | None = None
    read_skew_seconds: float | None = None
    samples: Sequence[PowerSample] = ()
    harness_cpu_seconds: float | None = None


class Meter(Protocol):
    """Reads energy over windows that do not overlap: ``open``, then ``begin`` … ``end`` any number of times,
    then ``close``. Found by name under the entry-point group ``pytest_llem.meters``; made without arguments.
    """

    def open(self, gpus: Sequence[str]) -> None:
        """Get ready to read.

        Args:
            gpus: UUIDs of the GPUs the engine runs on, empty on a CPU.

        Raises:
            MeterUnavailableError: Nothing can be read here.
        """

    def begin(self) -> None:
        """Start a window. A meter that ticks waits for a tick first. A counter that fails here gives its null
        at ``end``.
        """

    def end(self) -> Reading:
        """End the window. A counter that fails meanwhile gives a null with its reason and raises nothing."""

    def close(self) -> None:
        """Let go of what ``open`` took. Not called where ``open`` raised: it has let go by then."""


@runtime_checkable
class StreamsTelemetry(Protocol):
    """A meter that can also show, while it measures, what its devices are like."""

    def show_on(self, fd: int) -> None:
        """From ``open`` on write to the pipe *fd*, about once a second, what the devices are like.

        A JSON object a line: ``power_w`` of all of them in W, ``temperature_c`` of the hottest in °C. Where
        the pipe is full nothing is written.
        """
