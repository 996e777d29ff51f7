"""GPU energy through NVML: from the total energy counter, or from sampled power where a board has none."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from pytest_llem.energy.conditions import Look, conditions, look
from pytest_llem.energy.gpu import COUNTER, Gpu, find
from pytest_llem.energy.power import NoIntegralError, Power, integrate
from pytest_llem.energy.protocol import (
    Conditions,
    DeviceReading,
    MeterUnavailableError,
    PowerSample,
    Reading,
)
from pytest_llem.energy.sampling import Sampling
from pytest_llem.energy.ticks import Tick, period, ticks
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.metrics import Method

#: What NVML's documentation of ``nvmlDeviceGetPowerUsage`` states, for boards up to Kepler; on later ones Yang et
#: al. (arXiv 2312.02741) found a gain that is off by about as much, on each board in its own way.
GAIN_ERROR = 0.05

_PROBED_TICKS = 6


class _Span(NamedTuple):
    """A window of one board, on the monotonic clock in s."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class _Energy(NamedTuple):
    """In J; or why there is none."""

    energy_j: float | None
    uncertainty_j: float | None = None
    reason: str | None = None


class NvmlMeter:
    """Reads ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded) at both edges.

    The counter moves in ticks, so that a window cut anywhere between two of them is off by up to a tick's energy
    at either end. Each board's window therefore goes from a tick of its own to another. Boards tick by themselves,
    and their windows differ by up to a tick: the reading's seconds are the mean over those that gave an energy.

    A sampler beside it looks at power, temperature and clocks. The integral of power is a check of the counter,
    and the energy of a board that has none (before Volta). A sampler that fails costs no more than these.

    Args:
        sampler: Off only to see what the sampler costs.
    """

    def __init__(self, *, sampler: bool = True) -> None:
        self._nvml = Nvml()
        self._sampler = sampler
        self._sampling: Sampling | None = None
        self._gpus: list[Gpu] = []
        self._periods: dict[str, float] = {}
        self._before: dict[str, Look] = {}
        self._start: dict[str, list[Tick] | str] = {}
        self._began = 0.0
        self._show_on: int | None = None

    def show_on(self, fd: int) -> None:
        self._show_on = fd

    def open(self, gpus: Sequence[str]) -> None:
        if not gpus:
            raise MeterUnavailableError("the engine runs on no NVIDIA GPU")
        self._nvml.__enter__()
        try:
            if not self._nvml.is_open:
                raise MeterUnavailableError(f"NVML: {self._nvml.error}")
            self._gpus = [find(self._nvml, uuid) for uuid in dict.fromkeys(gpus)]
            if self._sampler:
                self._sampling = Sampling({gpu.uuid: gpu.source for gpu in self._gpus}, self._show_on)
            self._periods = self._probe()
            if self._sampling is not None:
                self._sampling.wait()  # it got up while ticks were waited for
            if not all(gpu.counts for gpu in self._gpus) and (failure := self._failure()):
                raise MeterUnavailableError(f"NVML: no energy counter, and {failure}")
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        if self._sampling is not None:
            self._sampling.forget()
        self._before = self._looks()
        self._start = self._ticks(self._gpus)
        self._began = time.monotonic()

    def end(self) -> Reading:
        stop = self._ticks([gpu for gpu in self._gpus if isinstance(self._start.get(gpu.uuid), list)])
        whole = _Span(self._began, time.monotonic())
        after = self._looks()
        sampled = self._samples()
        failure = self._failure()
        devices: list[DeviceReading] = []
        spans: list[_Span] = []
        samples: list[PowerSample] = []
        for gpu in self._gpus:
            edges = _edges(self._start.get(gpu.uuid), stop.get(gpu.uuid))
            span = whole if isinstance(edges, str) else _Span(edges[0].at, edges[1].at)
            looks = self._before[gpu.uuid], after[gpu.uuid]
            seen = [one for one in sampled if one.device == gpu.uuid]
            inside = [one for one in seen if span.began <= one.at <= span.ended]
            integral = _Energy(None, reason=failure) if failure else _integrated(looks, seen, span)
            energy = _counted(edges) if gpu.counts else integral
            known = conditions(*looks, None if failure else inside)
            devices.append(_reading(gpu, energy, integral, span, known))
            samples += inside
            if energy.energy_j is not None:
                spans.append(span)
        return Reading(
            tuple(devices),
            fmean(span.seconds for span in spans or [whole]),
            max(self._periods.values(), default=None),
            _skew(spans),
            tuple(sorted(samples, key=lambda one: one.at)),
            self._sampling.cpu_seconds(*whole) if self._sampling is not None else None,
        )

    def close(self) -> None:
        self._gpus = []
        if self._sampling is not None:
            self._sampling.close()
            self._sampling = None
        self._nvml.__exit__(None, None, None)

    def _probe(self) -> dict[str, float]:
        """Return the time between two ticks of each counter in s; without those that stand still."""
        found = self._ticks(self._gpus, _PROBED_TICKS)
        periods = {uuid: period(seen) for uuid, seen in found.items() if not isinstance(seen, str)}
        return {uuid: seconds for uuid, seconds in periods.items() if seconds is not None}

    def _ticks(self, gpus: Sequence[Gpu], count: int = 1) -> dict[str, list[Tick] | str]:
        counters = {gpu.uuid: partial(self._nvml.call, COUNTER, gpu.handle) for gpu in gpus if gpu.counts}
        return ticks(counters, count, self._periods)

    def _looks(self) -> dict[str, Look]:
        return {gpu.uuid: look(self._nvml, gpu.handle, gpu.source) for gpu in self._gpus}

    def _samples(self) -> list[PowerSample]:
        if self._sampling is None:
            return []
        self._sampling.read()
        return self._sampling.samples

    def _failure(self) -> str | None:
        """Why there are no samples; None where there are."""
        return self._sampling.failure if self._sampling is not None else "there is no sampler"


def _edges(start: list[Tick] | str | None, stop: list[Tick] | str | None) -> tuple[Tick, Tick] | str:
    """Return the ticks that a board's window goes from and to; or why there are none."""
    if isinstance(start, list) and isinstance(stop, list):
        return start[0], stop[0]
    return next((reason for reason in (start, stop) if isinstance(reason, str)), "no energy counter")


def _counted(edges: tuple[Tick, Tick] | str) -> _Energy:
    if isinstance(edges, str):
        return _Energy(None, reason=edges)
    start, stop = edges
    if stop.millijoules <= start.millijoules:  # a board that is on always draws power
        reason = f"the energy counter did not rise (from {start.millijoules} to {stop.millijoules} mJ)"
        return _Energy(None, reason=reason)
    energy_j = (stop.millijoules - start.millijoules) / 1000
    # Each tick lies anywhere in its width: u² = P²·(w² + w'²)/12.
    blur_s = math.hypot(start.width, stop.width) / math.sqrt(12)
    return _Energy(energy_j, energy_j / (stop.at - start.at) * blur_s)


def _integrated(looks: tuple[Look, Look], samples: Sequence[PowerSample], span: _Span) -> _Energy:
    course = [Power(one.at, one.power_w) for one in samples if one.power_w is not None]
    course += [one.power for one in looks if one.power is not None]
    try:
        return _Energy(*integrate(sorted(course), *span))
    except NoIntegralError as error:
        return _Energy(None, reason=str(error))


def _reading(gpu: Gpu, energy: _Energy, integral: _Energy, span: _Span, known: Conditions) -> DeviceReading:
    missing = energy.energy_j is None
    method: Method = "measured" if gpu.counts else "sampled"
    check = integral if gpu.counts else _Energy(None)
    if gpu.counts and gpu.source == "nvml_power_average":  # it lags behind by half a second, and would seem off
        check = _Energy(None, reason="power is told only as an average over a second")
    return DeviceReading(
        device=gpu.uuid,
        boundary="gpu_board",
        energy_j=energy.energy_j,
        method="unavailable" if missing else method,
        source="nvml_total_energy" if gpu.counts else str(gpu.source),
        reason=f"NVML: {energy.reason}" if energy.reason else None,
        seconds=None if missing else span.seconds,
        uncertainty_j=energy.uncertainty_j,
        gain_error=None if missing else GAIN_ERROR,
        integral_j=check.energy_j,
        integral_uncertainty_j=check.uncertainty_j,
        integral_reason=check.reason,
        conditions=known,
    )


def _skew(spans: Sequence[_Span]) -> float | None:
    """Return how far apart the windows begin or end at most, in s; None for a single one."""
    if len(spans) < 2:
        return None
    began, ended = [span.began for span in spans], [span.ended for span in spans]
    return max(max(began) - min(began), max(ended) - min(ended))
