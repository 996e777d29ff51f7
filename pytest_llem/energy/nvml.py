"""Measure GPU energy through NVML, from the total energy counter, or else from sampled power."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

from pytest_llem.energy.account import WARN_DISAGREEMENT
from pytest_llem.energy.gpu import COUNTER, DeviceSnapshot, MeteredGpu, conditions, find_gpu, take_snapshot
from pytest_llem.energy.power import NoIntegralError, Power, integrate
from pytest_llem.energy.protocol import (
    Conditions,
    DeviceReading,
    MeterUnavailableError,
    PowerSample,
    Reading,
)
from pytest_llem.energy.sampler import PERIOD_S
from pytest_llem.energy.sampler_process import SamplerProcess
from pytest_llem.energy.ticks import Tick, tick_period, wait_for_ticks
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import busy_share

#: Relative gain error, from NVML's documentation of ``nvmlDeviceGetPowerUsage``, which states it for GPUs up to
#: Kepler. On later GPUs Yang et al. (arXiv 2312.02741) found about the same error, different for each GPU.
GAIN_ERROR = 0.05

#: Minimum share of a window that a GPU has to be busy for its sampled power to contradict the counter.
BUSY_SHARE = 0.9

#: Number of ticks from which the time between two ticks of a counter is determined.
_PROBED_TICKS = 6


class _Span(NamedTuple):
    """The window of one GPU: start and end on the monotonic clock, in s."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class _Energy(NamedTuple):
    """An energy in J, or the reason why there is none."""

    energy_j: float | None
    uncertainty_j: float | None = None
    reason: str | None = None


class NvmlMeter:
    """Reads ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded) at both edges of a window.

    The counter moves in ticks: a window with arbitrary edges would be off by up to the energy of a tick at each
    end. Therefore each GPU's window starts and ends at a tick of its counter. GPUs tick independently, so their
    windows differ by up to a tick: the reading's ``seconds`` is the mean over the GPUs that have an energy.

    A sampler process reads power, temperature and clocks. The integral of power checks the counter. If a GPU has
    no counter (before Volta), or one that is too slow or fails, this integral is the GPU's energy. If the sampler
    fails, the counters are still read.

    The counter's boundary is the GPU's board or the module that it is on. If the driver reports the power of both,
    the boundary is that of the integral that agrees with the counter.

    Args:
        sampler: Whether to run the sampler.
    """

    def __init__(self, *, sampler: bool = True) -> None:
        self._nvml = Nvml()
        self._uses_sampler = sampler
        self._sampler_process: SamplerProcess | None = None
        self._gpus: list[MeteredGpu] = []
        self._tick_periods: dict[str, float] = {}
        self._start_snapshots: dict[str, DeviceSnapshot] = {}
        self._start_ticks: dict[str, list[Tick] | str] = {}
        self._began = 0.0
        self._telemetry_fd: int | None = None

    def stream_telemetry(self, fd: int) -> None:
        self._telemetry_fd = fd

    def open(self, gpus: Sequence[str]) -> None:
        if not gpus:
            raise MeterUnavailableError("what is measured runs on no NVIDIA GPU")
        self._nvml.__enter__()
        try:
            if not self._nvml.is_open:
                raise MeterUnavailableError(self._nvml.error)
            self._gpus = [find_gpu(self._nvml, uuid) for uuid in dict.fromkeys(gpus)]
            if self._uses_sampler:
                self._sampler_process = SamplerProcess(self._gpus, self._telemetry_fd)
            self._probe()
            if self._sampler_process is not None:
                self._sampler_process.wait()  # last, since the sampler starts while the counters are probed
            uncounted = next((gpu for gpu in self._gpus if not gpu.uses_counter), None)
            if uncounted is not None and (failure := self._sampler_failure()):
                raise MeterUnavailableError(f"{uncounted.counter_reason or 'no energy counter'}, and {failure}")
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        if self._sampler_process is not None:
            self._sampler_process.forget()
        # Snapshots before the first tick and after the last one: samples of power then surround the window.
        self._start_snapshots = self._snapshots()
        self._start_ticks = self._ticks(self._gpus)
        self._began = time.monotonic()

    def end(self) -> Reading:
        # A counter that failed at the start is not waited for at the end.
        end_ticks = self._ticks([gpu for gpu in self._gpus if isinstance(self._start_ticks.get(gpu.uuid), list)])
        begin_to_end = _Span(self._began, time.monotonic())  # also the window of a GPU whose counter is not read
        end_snapshots = self._snapshots()
        sampled = self._samples()
        sampler_failure = self._sampler_failure()
        devices: list[DeviceReading] = []
        spans: list[_Span] = []
        samples: list[PowerSample] = []
        for gpu in self._gpus:
            edges = _edges(self._start_ticks.get(gpu.uuid), end_ticks.get(gpu.uuid))
            span = begin_to_end if isinstance(edges, str) else _Span(edges[0].at, edges[1].at)
            snapshots = self._start_snapshots[gpu.uuid], end_snapshots[gpu.uuid]
            of_gpu = [sample for sample in sampled if sample.device == gpu.uuid]
            inside = [sample for sample in of_gpu if span.began <= sample.at <= span.ended]
            sampled_energy = _SampledEnergy.of(snapshots, of_gpu, span, sampler_failure)
            counted = _counted(edges) if gpu.uses_counter else _Energy(None, reason=gpu.counter_reason)
            gpu_conditions = conditions(*snapshots, None if sampler_failure else inside)
            busy = partial(self._busy_share, gpu, span)
            reading = _reading(gpu, counted, sampled_energy, gpu_conditions, busy)
            devices.append(replace(reading, seconds=None if reading.energy_j is None else span.seconds))
            samples += inside
            if reading.energy_j is not None:
                spans.append(span)
        windows = spans or [begin_to_end]
        periods_s = [*self._tick_periods.values(), *(PERIOD_S for one in devices if one.method == "sampled")]
        return Reading(
            tuple(devices),
            fmean(window.seconds for window in windows),
            max(periods_s, default=None),
            _skew(spans),
            tuple(sorted(samples, key=lambda one: one.at)),
            self._sampler_process.cpu_seconds(*begin_to_end) if self._sampler_process is not None else None,
            fmean(window.began for window in windows),
            fmean(window.ended for window in windows),
        )

    def close(self) -> None:
        self._gpus = []
        if self._sampler_process is not None:
            self._sampler_process.close()
            self._sampler_process = None
        self._nvml.__exit__(None, None, None)

    def _probe(self) -> None:
        """Measure the time between two ticks of each counter. A counter that is too slow or fails is not used."""
        probed = self._ticks(self._gpus, _PROBED_TICKS)
        failures = {uuid: result for uuid, result in probed.items() if isinstance(result, str)}
        periods = {uuid: tick_period(result) for uuid, result in probed.items() if not isinstance(result, str)}
        self._tick_periods = {uuid: seconds for uuid, seconds in periods.items() if seconds is not None}
        self._gpus = [
            replace(gpu, uses_counter=False, counter_reason=failures[gpu.uuid]) if gpu.uuid in failures else gpu
            for gpu in self._gpus
        ]

    def _ticks(self, gpus: Sequence[MeteredGpu], count: int = 1) -> dict[str, list[Tick] | str]:
        counters = {gpu.uuid: partial(self._nvml.call, COUNTER, gpu.handle) for gpu in gpus if gpu.uses_counter}
        return wait_for_ticks(counters, count, self._tick_periods)

    def _snapshots(self) -> dict[str, DeviceSnapshot]:
        return {gpu.uuid: take_snapshot(self._nvml, gpu) for gpu in self._gpus}

    def _busy_share(self, gpu: MeteredGpu, span: _Span) -> float | None:
        since_1970 = time.time() - time.monotonic()
        return busy_share(self._nvml, gpu.handle, span.began + since_1970, span.ended + since_1970)

    def _samples(self) -> list[PowerSample]:
        if self._sampler_process is None:
            return []
        self._sampler_process.read()
        return self._sampler_process.samples

    def _sampler_failure(self) -> str | None:
        """Return why there are no samples; None while the sampler runs."""
        return self._sampler_process.failure if self._sampler_process is not None else "there is no sampler"


def _edges(start: list[Tick] | str | None, end: list[Tick] | str | None) -> tuple[Tick, Tick] | str:
    """Return the ticks at both edges of a GPU's window, or why a tick is missing."""
    if isinstance(start, list) and isinstance(end, list):
        return start[0], end[0]
    return next((reason for reason in (start, end) if isinstance(reason, str)), "no energy counter")


def _counted(edges: tuple[Tick, Tick] | str) -> _Energy:
    """Return the energy between two ticks of a counter, or why there is none."""
    if isinstance(edges, str):
        return _Energy(None, reason=edges)
    start, end = edges
    if end.millijoules <= start.millijoules:  # a GPU that is on always draws power
        reason = f"the energy counter did not rise (from {start.millijoules} to {end.millijoules} mJ)"
        return _Energy(None, reason=reason)
    energy_j = (end.millijoules - start.millijoules) / 1000
    # The time of a tick is uniformly distributed over its width, so that u² = P²·(w² + w'²)/12.
    uncertainty_s = math.hypot(start.width, end.width) / math.sqrt(12)
    return _Energy(energy_j, energy_j / (end.at - start.at) * uncertainty_s)


@dataclass(frozen=True)
class _SampledEnergy:
    """The integrals of sampled power over a window of one GPU.

    Attributes:
        gpu: Integral of the GPU's power.
        module: Integral of the power of the GPU's module; None if this power is not read.
        at_both_edges: Whether the GPU's power was read at both edges of the window.
    """

    gpu: _Energy
    module: _Energy | None
    at_both_edges: bool

    @classmethod
    def of(
        cls,
        snapshots: tuple[DeviceSnapshot, DeviceSnapshot],
        samples: Sequence[PowerSample],
        span: _Span,
        failure: str | None,
    ) -> _SampledEnergy:
        at_both_edges = all(one.power is not None for one in snapshots)
        if failure:
            return cls(_Energy(None, reason=failure), None, at_both_edges)
        edges = [one.power for one in snapshots if one.power is not None]
        gpu = [Power(one.at, one.power_w) for one in samples if one.power_w is not None]
        edges_of_module = [one.module_power for one in snapshots if one.module_power is not None]
        module = [Power(one.at, one.module_power_w) for one in samples if one.module_power_w is not None]
        return cls(
            _integrated(gpu + edges, span),
            _integrated(module + edges_of_module, span) if module else None,
            at_both_edges,
        )


def _integrated(samples: Sequence[Power], span: _Span) -> _Energy:
    """Return the integral of power over *span*, or why there is none."""
    try:
        return _Energy(*integrate(sorted(samples), *span))
    except NoIntegralError as error:
        return _Energy(None, reason=str(error))


def _boundary(gpu: MeteredGpu, counted: _Energy, sampled: _SampledEnergy) -> str:
    """Return the boundary of a GPU's counter: that of the integral of power which is nearer to the counter.

    If the power of the module is not read, or both integrals agree, the GPU's name decides.
    """
    if sampled.module is not None:
        energy, board, module = counted.energy_j, sampled.gpu, sampled.module
        if energy is not None and board.energy_j is not None and module.energy_j is not None:
            # Three standard uncertainties of the difference between the integrals.
            uncertainty = 3 * math.hypot(board.uncertainty_j or 0, module.uncertainty_j or 0)
            if abs(module.energy_j - board.energy_j) > max(uncertainty, WARN_DISAGREEMENT * energy):
                is_module_nearer = abs(module.energy_j - energy) < abs(board.energy_j - energy)
                return "module" if is_module_nearer else "gpu_board"
    return "module" if gpu.is_module else "gpu_board"


def _reading(
    gpu: MeteredGpu,
    counted: _Energy,
    sampled: _SampledEnergy,
    gpu_conditions: Conditions,
    busy: Callable[[], float | None],
) -> DeviceReading:
    """Return a GPU's reading: the energy of the counter, or of sampled power if the counter has none."""
    # If a counter fails in the window, sampled power replaces it only if the GPU still reports power at the end: a
    # GPU that stopped responding has samples up to that time, but no energy of the whole window.
    if (
        counted.energy_j is None
        and (not gpu.uses_counter or sampled.at_both_edges)
        and sampled.gpu.energy_j is not None
    ):
        return DeviceReading(
            device=gpu.uuid,
            # nvmlDeviceGetPowerUsage takes no scope, so that the GPU's name decides.
            boundary="module" if gpu.is_module and gpu.source == "nvml_power_usage" else "gpu_board",
            energy_j=sampled.gpu.energy_j,
            method="sampled",
            source=str(gpu.source),
            uncertainty_j=sampled.gpu.uncertainty_j,
            gain_error=GAIN_ERROR,
            counter_reason=counted.reason,
            conditions=gpu_conditions,
        )
    boundary = _boundary(gpu, counted, sampled)
    has_counter = gpu.uses_counter or gpu.counter_reason is not None
    check = _check(gpu, counted, sampled, boundary, busy) if has_counter else _Energy(None)
    reason = counted.reason or (None if has_counter else sampled.gpu.reason)
    return DeviceReading(
        device=gpu.uuid,
        boundary=boundary,
        energy_j=counted.energy_j,
        method="unavailable" if counted.energy_j is None else "measured",
        source="nvml_total_energy" if has_counter else str(gpu.source),
        reason=f"NVML: {reason}" if reason else None,
        uncertainty_j=counted.uncertainty_j,
        gain_error=None if counted.energy_j is None else GAIN_ERROR,
        integral_j=check.energy_j,
        integral_uncertainty_j=check.uncertainty_j,
        integral_reason=check.reason,
        conditions=gpu_conditions,
    )


def _check(
    gpu: MeteredGpu, counted: _Energy, sampled: _SampledEnergy, boundary: str, busy: Callable[[], float | None]
) -> _Energy:
    """Return the integral of power that the counter of *boundary* is compared with."""
    if gpu.averages:  # the average is half a second late, and its integral would differ from a correct counter
        return _Energy(None, reason="power is only reported as an average over a second")
    check = sampled.module if boundary == "module" and sampled.module is not None else sampled.gpu
    # Drivers measure power in a part of each of their periods. Bursts of work that are in step with these periods
    # may be in no sample, and the samples do not show that they are missing.
    if _differs(check, counted) and (share := busy()) is not None and share < BUSY_SHARE:
        limit = f"{100 * BUSY_SHARE:.0f} %"
        return _Energy(None, reason=f"busy for less than {limit}, so that sampled power may miss bursts of work")
    if boundary != "module" or sampled.module is not None:
        return check
    # Only the GPU's name says that the counter is a module's, and the power of the module is not read. The GPU's
    # power can confirm the counter then, but not contradict it.
    energy, board = counted.energy_j, sampled.gpu.energy_j
    if energy is not None and board is not None and abs(board / energy - 1) > WARN_DISAGREEMENT:
        return _Energy(None, reason="the driver reports the power of the GPU, but not of its module")
    return sampled.gpu


def _differs(check: _Energy, counted: _Energy) -> bool:
    """Return whether an integral of power differs from the counter by more than both are uncertain."""
    if check.energy_j is None or counted.energy_j is None:
        return False
    uncertainty = 3 * math.hypot(check.uncertainty_j or 0, counted.uncertainty_j or 0)
    return abs(check.energy_j - counted.energy_j) > max(uncertainty, WARN_DISAGREEMENT * counted.energy_j)


def _skew(spans: Sequence[_Span]) -> float | None:
    """Return the largest difference between the starts, or the ends, of windows, in s; None for fewer than two."""
    if len(spans) < 2:
        return None
    began, ended = [span.began for span in spans], [span.ended for span in spans]
    return max(max(began) - min(began), max(ended) - min(ended))
