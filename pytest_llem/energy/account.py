"""Read the meters of one experiment, and sum their readings to one energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain

from pytest_llem import registry
from pytest_llem.energy.protocol import (
    DeviceReading,
    Meter,
    MetersProcesses,
    MeterUnavailableError,
    PowerSample,
    Reading,
    StreamsTelemetry,
    join_readings,
)
from pytest_llem.results.facts import MIN_TICKS
from pytest_llem.results.metrics import Method, weakest
from pytest_llem.results.statistics import total_of
from pytest_llem.study.config import AUTO

#: Reason for missing energy if a study switches metering off.
SWITCHED_OFF = "energy: switched off by energy.backend"

#: Relative difference between counter and integral above which there is a warning.
WARN_DISAGREEMENT = 0.03

#: Relative difference between counter and integral above which the energy is invalid.
INVALID_DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Total:
    """Energy of some devices over one boundary, or over several, whose names are then joined by ``+``.

    ``energy_j`` is None, with a reason, if that of any device is missing. ``invalid`` is a code of
    :data:`~pytest_llem.results.metrics.INVALID` if the energy cannot be right. ``uncertainty_j`` is the standard
    uncertainty (k = 1) of both edges of the window, and of sampling.
    """

    energy_j: float | None
    method: Method
    source: str | None = None
    boundary: str | None = None
    reason: str | None = None
    uncertainty_j: float | None = None
    devices: tuple[str, ...] = ()
    invalid: str | None = None


@dataclass(frozen=True)
class Account:
    """The readings of all meters over one window.

    Attributes:
        devices: Readings of every device of every meter.
        total: Sum over the devices of the first meter. With ``auto`` these are the GPUs if the engine runs on GPUs
            and they can be read, else CPU packages with their memory.
        seconds: Time that the meter of the total covers, in s.
        tick_seconds: Time between two updates of that meter's counter, or between its power samples, in s.
        read_skew_seconds: Largest difference between the starts, or the ends, of its devices' windows, in s.
        samples: Samples of all meters, in order of time.
        harness_cpu_seconds: CPU time of the meters' own processes, in s.
        windows: Number of windows that were joined to this one.
        began: Start of the time that the meter of the total covers, on the monotonic clock in s; None if unknown.
        ended: End of that time, on the same clock; None if unknown.
    """

    devices: tuple[DeviceReading, ...]
    total: Total
    seconds: float | None = None
    tick_seconds: float | None = None
    read_skew_seconds: float | None = None
    samples: tuple[PowerSample, ...] = ()
    harness_cpu_seconds: float | None = None
    windows: int = 1
    began: float | None = None
    ended: float | None = None

    @property
    def ticks(self) -> float | None:
        """Effective number of ticks: those of a single window with the same relative resolution; None if unknown.

        The errors at the edges of joined windows are independent, and add up in quadrature.
        """
        return _ticks(self.seconds, self.tick_seconds, self.windows)

    def of_devices(self, devices: Collection[str]) -> Total:
        """Return the part of the total that *devices* used."""
        parts = [device for device in self.devices if device.device in devices]
        if not parts or {part.device for part in parts} < {*devices}:
            reason = "the engine reported its devices only after loading, and they were not metered before"
            return Total(None, "unavailable", reason=reason)
        return _sum(parts, self.ticks)

    def of_boundary(self, boundary: str) -> Total:
        """Return the sum over the devices of one boundary."""
        parts = [device for device in self.devices if device.boundary == boundary]
        if not parts:
            return Total(None, "unavailable", boundary=boundary, reason=f"no meter read {boundary}")
        return _sum(parts, self.ticks)


def join_accounts(accounts: Sequence[Account]) -> Account:
    """Return the account of successive windows of the same meters, as if they were one window."""
    first = accounts[0]
    if len(accounts) == 1:
        return first
    readings: dict[tuple[str, str], list[DeviceReading]] = {}
    for reading in chain.from_iterable(account.devices for account in accounts):
        readings.setdefault((reading.device, reading.boundary), []).append(reading)
    # A meter that failed in one window has no reading of it. Sampled power, which replaces a failed
    # counter, may cover the board where the counter covered the module.
    reason = "not read in every window"
    devices = tuple(
        join_readings(found)
        if len(found) == len(accounts)
        else replace(found[0], energy_j=None, method="unavailable", reason=reason)
        for found in readings.values()
    )
    seconds = total_of(account.seconds for account in accounts)
    ticks = [account.tick_seconds for account in accounts if account.tick_seconds is not None]
    skews = [account.read_skew_seconds for account in accounts if account.read_skew_seconds is not None]
    tick, windows = max(ticks, default=None), len(accounts)
    totals = [account.total for account in accounts]
    parts = [device for device in devices if any(device.device in total.devices for total in totals)]
    parts = [one for one in parts if any(one.boundary in (total.boundary or "").split("+") for total in totals)]
    missing = next((total for total in totals if total.energy_j is None), None)
    return Account(
        devices,
        missing or _sum(parts, _ticks(seconds, tick, windows)),
        seconds,
        tick,
        max(skews, default=None),
        tuple(chain.from_iterable(account.samples for account in accounts)),
        total_of(account.harness_cpu_seconds for account in accounts),
        windows=windows,
        began=first.began,
        ended=accounts[-1].ended,
    )


@dataclass
class Meters:
    """The open meters of one experiment.

    A meter may be third-party code: an exception makes its values unavailable, with the reason, and never ends
    the run.

    Attributes:
        meters: Open meters by name. The total is over the boundary of the first one.
        refusals: Why a meter could not be opened, or failed in a window, by its name.
    """

    meters: dict[str, Meter] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    _begun: dict[str, Meter] = field(default_factory=dict, init=False, repr=False)
    _telemetry_fd: int | None = field(default=None, repr=False)
    _processes: Sequence[int] = field(default=(), repr=False)

    @classmethod
    def open(
        cls,
        backend: str | None,
        gpus: Sequence[str],
        telemetry_fd: int | None = None,
        processes: Sequence[int] = (),
    ) -> Meters:
        """Open the meters that ``energy.backend`` selects.

        Args:
            backend: ``auto`` (NVML and RAPL, or an estimate if neither can be opened), a meter's name, or None.
            gpus: UUIDs of the GPUs the engine runs on.
            telemetry_fd: Pipe for the live telemetry of meters that support it; None if nothing reads it.
            processes: Pids of the processes that run the model; their descendants are included. Empty for the
                current process.
        """
        opened = cls(_telemetry_fd=telemetry_fd, _processes=processes)
        if backend is None:
            name, _, why = SWITCHED_OFF.partition(": ")
            opened.refusals[name] = why
        elif backend == AUTO:
            for name in ("nvml", "rapl") if gpus else ("rapl",):  # the first meter's boundary is that of the total
                opened._try(name, gpus)
            if not opened.meters:
                opened._try("estimate", gpus)
        else:
            opened._try(backend, gpus)
        return opened

    def _try(self, name: str, gpus: Sequence[str]) -> None:
        try:
            make: Callable[[], Meter] = registry.load(registry.METER_GROUP, name)
        except (LookupError, ImportError) as error:  # of the registry, whose message is enough
            self.refusals[name] = str(error)
            return
        try:
            meter = make()
            if self._telemetry_fd is not None and isinstance(meter, StreamsTelemetry):
                meter.stream_telemetry(self._telemetry_fd)
            if self._processes and isinstance(meter, MetersProcesses):
                meter.set_processes(self._processes)
            meter.open(gpus)
        except Exception as error:
            self._refuse(name, error)
        else:
            self.meters[name] = meter

    def _refuse(self, name: str, error: Exception) -> None:
        is_expected = isinstance(error, MeterUnavailableError | ImportError)
        self.refusals[name] = str(error) if is_expected else f"{type(error).__name__}: {error}"

    def begin(self) -> None:
        """Start a window on every meter.

        The meter of the total starts first: it may wait for a tick, and the others must cover the same window.
        """
        self._begun = {}
        for name, meter in self.meters.items():
            try:
                meter.begin()
            except Exception as error:
                self._refuse(name, error)
            else:
                self._begun[name] = meter

    def end(self) -> Account:
        """End the window on every meter, in the same order."""
        readings: dict[str, Reading] = {}
        for name, meter in self._begun.items():
            try:
                readings[name] = meter.end()
            except Exception as error:
                self._refuse(name, error)
        devices = tuple(device for reading in readings.values() for device in reading.devices)
        samples = tuple(
            sorted(chain.from_iterable(one.samples for one in readings.values()), key=lambda one: one.at)
        )
        harness = [one.harness_cpu_seconds for one in readings.values() if one.harness_cpu_seconds is not None]
        first = readings.get(next(iter(self.meters), ""))
        if first is None:
            reason = "; ".join(f"{name}: {why}" for name, why in self.refusals.items()) or "there is no meter"
            total, seconds, tick, skew = Total(None, "unavailable", reason=reason), None, None, None
            span: tuple[float | None, float | None] = None, None
        else:
            seconds, tick, skew = first.seconds, first.tick_seconds, first.read_skew_seconds
            total, span = _sum(first.devices, _ticks(seconds, tick, 1)), (first.began, first.ended)
        cpu_seconds = sum(harness) if harness else None
        return Account(devices, total, seconds, tick, skew, samples, cpu_seconds, 1, *span)

    def close(self) -> None:
        """Close every meter."""
        while self.meters:
            _, meter = self.meters.popitem()
            with suppress(Exception):  # the values are known by now, and the other meters must be closed too
                meter.close()


def _ticks(seconds: float | None, tick_seconds: float | None, windows: int) -> float | None:
    return seconds / tick_seconds / math.sqrt(windows) if seconds and tick_seconds else None


def _sum(parts: Sequence[DeviceReading], ticks: float | None) -> Total:
    if not parts:
        return Total(None, "unavailable", reason="the meter read no device")
    boundary = "+".join(dict.fromkeys(part.boundary for part in parts))
    source = "+".join(dict.fromkeys(part.source for part in parts))
    devices = tuple(part.device for part in parts)
    missing = [
        f"{part.device}: {part.reason or 'the meter reported no energy and no reason'}"
        for part in parts
        if part.energy_j is None
    ]
    if missing:
        return Total(None, "unavailable", source, boundary, "; ".join(missing), devices=devices)
    total = sum(part.energy_j for part in parts if part.energy_j is not None)
    known = [part.uncertainty_j for part in parts if part.uncertainty_j is not None]
    uncertainty = math.hypot(*known) if len(known) == len(parts) else None
    worst = max((abs(disagreement(part, ticks) or 0.0) for part in parts), default=0.0)
    return Total(
        total,
        weakest(part.method for part in parts) or "unavailable",
        source,
        boundary,
        uncertainty_j=uncertainty,
        devices=devices,
        invalid="counter_disagrees" if worst > INVALID_DISAGREEMENT else None,
    )


def disagreement(device: DeviceReading, ticks: float | None) -> float | None:
    """Return integral / counter − 1 of a device if it is beyond ±:data:`WARN_DISAGREEMENT`.

    Infinite if the counter did not rise. None if they agree, if one is missing, if the difference is within three
    standard uncertainties, or if the window has fewer than :data:`MIN_TICKS` ticks, which has a warning of its
    own. A meter with an unknown tick is checked too.

    Args:
        device: The reading of the device.
        ticks: Effective number of ticks of the window, as :attr:`Account.ticks`; None if unknown.
    """
    if device.integral_j is None or device.energy_j is None:
        return None
    if ticks is not None and ticks < MIN_TICKS:
        return None
    # The integral is inexact if power changes faster than it is sampled.
    uncertainty_j = 3 * math.hypot(device.integral_uncertainty_j or 0, device.uncertainty_j or 0)
    difference_j = device.integral_j - device.energy_j
    if abs(difference_j) <= max(WARN_DISAGREEMENT * abs(device.energy_j), uncertainty_j):
        return None
    return difference_j / device.energy_j if device.energy_j else math.inf
