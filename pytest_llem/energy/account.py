"""The meters of one experiment, and the one figure they come to."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

from pytest_llem import registry
from pytest_llem.energy.gpu_source import MAX_VALID_DISAGREEMENT, disagreement
from pytest_llem.energy.protocol import (
    DeviceReading,
    Meter,
    MeterUnavailableError,
    PowerSample,
    Reading,
    StreamsTelemetry,
)
from pytest_llem.results.metrics import Method, weakest
from pytest_llem.study.config import AUTO

#: Why there is no energy where nobody wants one.
SWITCHED_OFF = "energy: switched off by energy.backend"


@dataclass(frozen=True)
class Total:
    """Energy over one boundary, of these devices. ``energy_j`` is null, with a reason, where any part of it is
    missing; ``invalid`` is a code of :data:`~pytest_llem.results.metrics.INVALID` where it cannot be right.
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
    """What all meters saw over one window.

    Attributes:
        devices: Every device of every meter.
        total: The sum over the boundary that ``energy_j`` stands for: GPU boards where the engine runs on
            GPUs and they can be read, else CPU packages with their memory.
        seconds: What the meter of that boundary covers.
        tick_seconds: Of its counter, or from one sample of its power to the next.
        read_skew_seconds: How far apart its devices' windows begin or end at most.
        samples: What all meters sampled, in order of time.
        harness_cpu_seconds: Processor time that the meters' own processes took.
    """

    devices: tuple[DeviceReading, ...]
    total: Total
    seconds: float | None = None
    tick_seconds: float | None = None
    read_skew_seconds: float | None = None
    samples: tuple[PowerSample, ...] = ()
    harness_cpu_seconds: float | None = None

    def of(self, devices: Collection[str]) -> Total:
        """Return the part of the total that is of *devices*."""
        parts = [device for device in self.devices if device.device in devices]
        if len(parts) < len(devices) or not parts:
            reason = "the engine named its devices only once it was loaded, and they were not metered before"
            return Total(None, "unavailable", reason=reason)
        return _sum(parts, self.seconds, self.tick_seconds)

    def over(self, boundary: str) -> Total:
        """Return the sum over the devices of one boundary."""
        parts = [device for device in self.devices if device.boundary == boundary]
        if not parts:
            return Total(None, "unavailable", boundary=boundary, reason=f"no meter read {boundary}")
        return _sum(parts, self.seconds, self.tick_seconds)


@dataclass
class Meters:
    """The open meters of one experiment.

    A meter is anyone's code: whatever it raises costs its figures, with the reason, and never the run.

    Attributes:
        meters: By name. The first one decides: the total is over its boundary.
        refusals: Why the others could not be opened, or failed later, by name.
    """

    meters: dict[str, Meter] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    _begun: dict[str, Meter] = field(default_factory=dict, init=False, repr=False)
    _show_on: int | None = field(default=None, repr=False)

    @classmethod
    def open(cls, backend: str | None, gpus: Sequence[str], show_on: int | None = None) -> Meters:
        """Open what ``energy.backend`` asks for.

        Args:
            backend: ``auto`` (all that can measure, an estimate only where none can), a meter's name, or None.
            gpus: UUIDs of the GPUs the engine runs on.
            show_on: The pipe on which those that can show what the devices are like; None where nobody looks.
        """
        opened = cls(_show_on=show_on)
        if backend is None:
            name, _, why = SWITCHED_OFF.partition(": ")
            opened.refusals[name] = why
        elif backend == AUTO:
            for name in ("nvml", "rapl") if gpus else ("rapl",):  # a GPU's board before the CPU that feeds it
                opened._try(name, gpus)
            if not opened.meters:
                opened._try("estimate", gpus)
        else:
            opened._try(backend, gpus)
        return opened

    def _try(self, name: str, gpus: Sequence[str]) -> None:
        try:
            meter: Meter = registry.load(registry.METER_GROUP, name)()
            if self._show_on is not None and isinstance(meter, StreamsTelemetry):
                meter.show_on(self._show_on)
            meter.open(gpus)
        except Exception as error:
            self._refuse(name, error)
        else:
            self.meters[name] = meter

    def _refuse(self, name: str, error: Exception) -> None:
        foreseen = isinstance(error, MeterUnavailableError | LookupError | ImportError)
        self.refusals[name] = str(error) if foreseen else f"{type(error).__name__}: {error}"

    def begin(self) -> None:
        """Start a window on every meter. The one that decides starts first: it may wait for a tick, and the
        others are to cover the same window.
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
        took = [one.harness_cpu_seconds for one in readings.values() if one.harness_cpu_seconds is not None]
        deciding = readings.get(next(iter(self.meters), ""))
        if deciding is None:
            reason = "; ".join(f"{name}: {why}" for name, why in self.refusals.items()) or "there is no meter"
            total, seconds, tick, skew = Total(None, "unavailable", reason=reason), None, None, None
        else:
            seconds, tick, skew = deciding.seconds, deciding.tick_seconds, deciding.read_skew_seconds
            total = _sum(deciding.devices, seconds, tick)
        return Account(devices, total, seconds, tick, skew, samples, sum(took) if took else None)

    def close(self) -> None:
        """Close every meter."""
        while self.meters:
            _, meter = self.meters.popitem()
            with suppress(Exception):  # the figures are in, and the others are to be closed as well
                meter.close()


def _sum(parts: Sequence[DeviceReading], seconds: float | None, tick_seconds: float | None) -> Total:
    if not parts:
        return Total(None, "unavailable", reason="the meter read no device")
    boundary = "+".join(dict.fromkeys(part.boundary for part in parts))
    source = "+".join(dict.fromkeys(part.source for part in parts))
    devices = tuple(part.device for part in parts)
    missing = [
        f"{part.device}: {part.reason or 'the meter gave none, and no reason'}"
        for part in parts
        if part.energy_j is None
    ]
    if missing:
        return Total(None, "unavailable", source, boundary, "; ".join(missing), devices=devices)
    total = sum(part.energy_j for part in parts if part.energy_j is not None)
    edges = [part.uncertainty_j for part in parts]
    uncertainty = None if None in edges else math.hypot(*(edge for edge in edges if edge is not None))
    off = max((abs(disagreement(part, seconds, tick_seconds) or 0.0) for part in parts), default=0.0)
    return Total(
        total,
        weakest(part.method for part in parts) or "unavailable",
        source,
        boundary,
        uncertainty_j=uncertainty,
        devices=devices,
        invalid="counter_disagrees" if off > MAX_VALID_DISAGREEMENT else None,
    )
