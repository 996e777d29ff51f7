"""Define the interface of meters: the protocol ``Meter``, and the records that it returns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Protocol, runtime_checkable

from pytest_llem.results.metrics import METHODS, Method, weakest
from pytest_llem.results.statistics import total_of


class MeterUnavailableError(Exception):
    """A meter cannot be used on this machine. The message says why, and what to do. The meter's name is added.

    Example:
        raise MeterUnavailableError("no device at /dev/ttyUSB0: connect it")
    """


class _Finite:
    """A base of dataclasses that refuses infinite and NaN values: an unknown value is None."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, one.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{one.name} must be a finite number (got {value})")


@dataclass(frozen=True)
class Conditions(_Finite):
    """A device's temperature, clocks and throttling over a window. Values that it does not report are None.

    Example:
        Conditions(start_temperature_c=41, end_temperature_c=63, peak_temperature_c=64)

    Attributes:
        start_temperature_c: Temperature at the start of the window, in °C.
        end_temperature_c: Temperature at its end, in °C.
        peak_temperature_c: Highest sampled temperature, in °C.
        mean_sm_clock_mhz: Mean clock of the streaming multiprocessors, in MHz.
        mean_memory_clock_mhz: Mean clock of the memory, in MHz.
        throttled_seconds: Throttled time in the window by reason, in s: the differences of cumulative counters.
            Reasons may overlap. Reasons without a counter are left out.
    """

    start_temperature_c: float | None = None
    end_temperature_c: float | None = None
    peak_temperature_c: float | None = None
    mean_sm_clock_mhz: float | None = None
    mean_memory_clock_mhz: float | None = None
    throttled_seconds: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PowerSample(_Finite):
    """One sample of a device within a window. Values that the device did not report are None.

    Example:
        PowerSample(at=time.monotonic(), device="socket-1", power_w=231.5)

    Attributes:
        at: Time on the monotonic clock, in s.
        device: Name of the device, as in :class:`DeviceReading`.
        power_w: Power at that instant, or the nearest that the device reports, in W.
        temperature_c: Temperature, in °C.
        sm_clock_mhz: Clock of the streaming multiprocessors, in MHz.
        memory_clock_mhz: Clock of the memory, in MHz.
        module_power_w: Power of the module that the GPU shares with a CPU, if reported apart from the GPU's, in W.
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

    Example:
        DeviceReading("socket-1", "wall_socket", 812.4, "measured", "wattmeter", uncertainty_j=1.5)

    Attributes:
        device: Name of the device: a GPU's UUID, ``package-0``, …
        boundary: What the energy covers: ``gpu_board``, ``module`` (a GPU with the CPU and memory that share its
            module), ``cpu_package``, ``dram``, …; without ``+``, which joins the boundaries of a sum.
        energy_j: Energy in J; None if it could not be read, never 0 instead.
        method: How the energy was obtained: ``measured``, ``sampled``, ``estimated``, ``unavailable``, …
        source: What the energy was read from.
        reason: Why ``energy_j`` is None.
        seconds: Time that ``energy_j`` covers, in s; None if it is that of the :class:`Reading`. It may differ, as
            counters tick independently.
        uncertainty_j: Standard uncertainty (k = 1) of reading both edges, and of sampling, in J, without
            ``gain_error``.
        gain_error: Relative constant error against a wall meter. It is kept apart because it cancels in a
            comparison of two energies of one device.
        integral_j: Energy from sampled power, in J, as a check of a counter.
        integral_uncertainty_j: Standard uncertainty of ``integral_j`` from sampling, in J.
        integral_reason: Why a counter has no ``integral_j``, such as that the sampler failed.
        counter_reason: Why power was sampled although the device has an energy counter.
        conditions: Temperature, clocks and throttling of the device.
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
        if "+" in self.boundary:  # which joins the boundaries of a sum
            raise ValueError(f"boundary must have no + (got {self.boundary!r})")


def join_readings(readings: Sequence[DeviceReading]) -> DeviceReading:
    """Return the reading of one device over several windows, as of one window.

    Energies and times are summed; an energy that is missing in one window is missing in the sum. Errors at a
    counter's edges are independent, and their squares are summed. Errors of sampled power are correlated, and are
    summed: at the start of each window, sampled power still shows the power of the pause before. The method is the
    weakest: a counter that failed in one window has sampled power in it.
    """
    first, method = readings[0], weakest(one.method for one in readings)
    assert method is not None
    missing = next((one for one in readings if one.energy_j is None), None)
    return replace(
        missing or first,
        energy_j=total_of(one.energy_j for one in readings),
        method=method,
        source="+".join(dict.fromkeys(one.source for one in readings)),
        seconds=total_of(one.seconds for one in readings),
        uncertainty_j=(total_of if method == "sampled" else _root_sum_square)(
            one.uncertainty_j for one in readings
        ),
        integral_j=total_of(one.integral_j for one in readings),
        integral_uncertainty_j=total_of(one.integral_uncertainty_j for one in readings),
        integral_reason=next((one.integral_reason for one in readings if one.integral_reason), None),
        counter_reason=next((one.counter_reason for one in readings if one.counter_reason), None),
        conditions=_join_conditions([(one.conditions, one.seconds) for one in readings]),
    )


def _root_sum_square(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else math.hypot(*(value for value in known if value is not None))


def _join_conditions(parts: Sequence[tuple[Conditions | None, float | None]]) -> Conditions | None:
    """Return a device's conditions over several windows, given those and the length of each, in s."""
    known = [(one, seconds or 1.0) for one, seconds in parts if one is not None]
    if not known:
        return None
    peaks = [one.peak_temperature_c for one, _ in known if one.peak_temperature_c is not None]
    throttled = [one.throttled_seconds for one, _ in known]
    return Conditions(
        start_temperature_c=known[0][0].start_temperature_c,
        end_temperature_c=known[-1][0].end_temperature_c,
        peak_temperature_c=max(peaks, default=None),
        mean_sm_clock_mhz=_mean([(one.mean_sm_clock_mhz, seconds) for one, seconds in known]),
        mean_memory_clock_mhz=_mean([(one.mean_memory_clock_mhz, seconds) for one, seconds in known]),
        throttled_seconds=None
        if None in throttled
        else {
            reason: math.fsum(one.get(reason, 0.0) for one in throttled if one is not None)
            for reason in dict.fromkeys(chain.from_iterable(one for one in throttled if one is not None))
        },
    )


def _mean(weighted: Sequence[tuple[float | None, float]]) -> float | None:
    """Return the mean of pairs of a value and its weight; None if a value is None."""
    known = [(value, weight) for value, weight in weighted if value is not None]
    if len(known) < len(weighted):
        return None
    return math.fsum(value * weight for value, weight in known) / math.fsum(weight for _, weight in known)


@dataclass(frozen=True)
class Reading(_Finite):
    """A meter's reading between ``begin`` and ``end``.

    Example:
        Reading(devices=(reading_of_socket_1,), seconds=10.02, tick_seconds=0.1)

    Attributes:
        devices: One reading for each device.
        seconds: Time that the reading covers on the monotonic clock, in s; the mean if devices differ.
        tick_seconds: Time between two ticks of the counter, or between two samples of power, in s; the longest if
            devices differ.
        read_skew_seconds: Largest difference between the starts, or the ends, of the devices' windows, in s; None
            for one device.
        samples: Samples of the window, in order of time.
        harness_cpu_seconds: CPU time of the meter's own processes in the window, in s.
        began: Start of the reading on the monotonic clock, in s; the mean if devices differ. None if unknown.
        ended: End of the reading, likewise.
    """

    devices: tuple[DeviceReading, ...]
    seconds: float
    tick_seconds: float | None = None
    read_skew_seconds: float | None = None
    samples: Sequence[PowerSample] = ()
    harness_cpu_seconds: float | None = None
    began: float | None = None
    ended: float | None = None


class Meter(Protocol):
    """Reads energy over windows that do not overlap.

    ``open`` is called once, then ``begin`` and ``end`` any number of times, then ``close``. A class is registered
    by name in the entry-point group ``pytest_llem.meters``, and created without arguments.

    Example:
        class Wattmeter:
            def open(self, gpus):
                self._port = connect()

            def begin(self):
                self._start = time.monotonic(), self._port.joules()

            def end(self):
                began, joules = self._start
                energy_j = self._port.joules() - joules
                device = DeviceReading("socket-1", "wall_socket", energy_j, "measured", "wattmeter")
                return Reading((device,), time.monotonic() - began)

            def close(self):
                self._port.close()
    """

    def open(self, gpus: Sequence[str]) -> None:
        """Prepare for reading.

        Args:
            gpus: UUIDs of the GPUs that the engine runs on; empty if it runs on the CPU.

        Raises:
            MeterUnavailableError: The meter cannot be used on this machine.
        """

    def begin(self) -> None:
        """Start a window. A meter whose counter has ticks waits for a tick first.

        If a counter fails here, do not raise: return None as its energy in ``end``, with the reason.
        """

    def end(self) -> Reading:
        """End the window, and return its reading. If a counter has failed, its energy is None, with a reason."""

    def close(self) -> None:
        """Release what ``open`` has acquired. Not called if ``open`` raised: it must clean up itself."""


@runtime_checkable
class StreamsTelemetry(Protocol):
    """A meter that also reports the current power and temperature of its devices while it measures.

    Example:
        class Wattmeter:
            def stream_telemetry(self, fd):
                self._telemetry_fd = fd  # os.write(fd, b'{"power_w": 231.5}\\n') once a second
    """

    def stream_telemetry(self, fd: int) -> None:
        """Request telemetry: from ``open`` on, the meter writes to the pipe *fd* about once a second.

        Each line is a JSON object: ``power_w`` of all devices in W, ``temperature_c`` of the hottest in °C. If the
        pipe is full, nothing is written. Called before ``open``.
        """


@runtime_checkable
class MetersProcesses(Protocol):
    """A meter that measures what processes use, and not devices.

    Example:
        class EstimateMeter:
            def set_processes(self, pids):
                self._root_pids = pids
    """

    def set_processes(self, pids: Sequence[int]) -> None:
        """Set the processes that are measured with all their descendants. Called before ``open``.

        Without this call, they are the experiment's process and its descendants.
        """
