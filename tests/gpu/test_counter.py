"""The energy counter: its ticks, its windows, and its agreement with sampled power."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import IsolatedExperiment
from pytest_llem.energy.gpu import COUNTER
from pytest_llem.hardware.gpus import Gpu
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.statistics import mean_interval
from tests.support.narrow import not_none

Found = Callable[[str, object], None]
OnGpu = Callable[..., Any]


def _variation(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values)


def test_counter_rises_in_ticks(gpu: Gpu, found: Found) -> None:
    seen: list[tuple[float, int]] = []
    with Nvml() as nvml:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", gpu.uuid)
        ends = time.monotonic() + 10
        while time.monotonic() < ends:
            shown = nvml.call(COUNTER, handle)
            if not seen or shown != seen[-1][1]:
                seen.append((time.monotonic(), shown))
            time.sleep(0.002)
    assert all(after > before for (_, before), (_, after) in pairwise(seen))
    found("ticks in 10 s", len(seen) - 1)
    found("s from tick to tick", statistics.median(after - before for (before, _), (after, _) in pairwise(seen)))
    assert len(seen) > 50


def test_integral_of_power_agrees_with_counter(
    isolated_experiment: IsolatedExperiment, llama_1b: Path, found: Found
) -> None:
    result = isolated_experiment(
        {
            "model": str(llama_1b),
            "n": 8,
            "max_input_tokens": 128,
            "max_output_tokens": 128,
            "pytorch": {"batch_size": 8},
            "warmup": {"n_warmup": 1, "convergence_detection": False},
            "baseline": {"enabled": False},
            "measurement": {"min_window_seconds": 30},
        }
    )
    [device] = result.devices
    assert device.energy_j is not None
    assert device.integral_j is not None
    found("decode, W", device.energy_j / (device.seconds or 0))
    found("integral / counter", device.integral_j / device.energy_j)
    found("tick in the result, s", result.window.tick_seconds)
    found("boundary", device.boundary)
    assert result.metrics["energy_j"].covers_engine
    assert result.metrics["energy_j"].invalid is None
    assert device.integral_j == pytest.approx(device.energy_j, rel=0.03)
    assert result.window.tick_seconds == pytest.approx(0.1, rel=0.9)
    assert result.engine.random_weights
    assert result.metrics["energy_per_output_token_j"].method == "measured"


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_power_that_changes_quickly_does_not_contradict_the_counter(
    on_gpu: OnGpu, found: Found, share: float
) -> None:
    """The driver measures power in a part of each of its periods: short bursts may be in no sample, or in all."""
    ratio, reason, off = on_gpu("bursts", share, 10.0)
    found(f"integral / counter, busy for {share:.0%} of each 0.2 s", reason or ratio)
    assert off is None


def test_windows_aligned_to_ticks_vary_less(on_gpu: OnGpu, found: Found) -> None:
    """Windows are ten ticks long: where they cut a tick matters more than how the power itself varies."""
    aligned, unaligned = on_gpu("alignment", 20, 1.0)
    found("windows of 1 s, CV in %", 100 * _variation(aligned))
    found("unaligned, CV in %", 100 * _variation(unaligned))
    found("W", statistics.fmean(aligned))
    assert _variation(aligned) < _variation(unaligned)


def test_adjacent_windows_add_up(on_gpu: OnGpu, found: Found) -> None:
    parts, whole, watts, tick = on_gpu("adjacent", 3, 3.0)
    found("whole, J", whole)
    found("sum of 3 parts - whole, J", sum(parts) - whole)
    found("a tick, J", watts * tick)
    assert abs(sum(parts) - whole) <= max(watts * tick, 0.005 * whole)


def test_queued_work_counts_in_the_window(on_gpu: OnGpu, found: Found) -> None:
    trapped, explicit, unsynchronised = on_gpu("queued", 3.0)
    found("queued / waited for", trapped / explicit)
    found("not waited for / waited for", unsynchronised / explicit)
    assert trapped == pytest.approx(explicit, rel=0.02)
    assert unsynchronised < 0.8 * explicit


def test_sampling_does_not_change_power(on_gpu: OnGpu, found: Found) -> None:
    ratios = on_gpu("observed", 6, 4.0)
    for at, what in enumerate(("time", "energy")):
        mean, _, interval = mean_interval([one[at] for one in ratios], 0.99)
        low, high = not_none(interval)
        found(f"sampler at 10 Hz / none, {what}", f"{mean:.4f}, 99 %: {low:.4f} to {high:.4f}")
        assert low <= 1.005
        assert high >= 0.995
        assert high - low <= 0.04, "the interval is narrow enough to mean something"
