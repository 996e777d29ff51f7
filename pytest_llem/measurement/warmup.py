"""Runs the load until the machine is warm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pytest_llem.backends.protocol import Engine
from pytest_llem.results.experiment import WarmupRecord
from pytest_llem.study.config import WarmupConfig


def warm_up(
    engine: Engine, batches: Sequence[Any], config: WarmupConfig, on_run: Callable[[int, int | None], None]
) -> WarmupRecord | None:
    """Run the longest and the median batch ``n_warmup`` times each, then the median one until latencies settle.

    They have settled when the last ``window_size`` of them have a coefficient of variation below
    ``cv_threshold``. The load stays on to the end: an idle pause would throw the warm state away.

    Args:
        engine: Loaded.
        batches: Those of a pass.
        config: When it is enough.
        on_run: Called before each run with its number, from 1, and with how many there may be; None once they only
            fill ``thermal_floor_seconds``.

    Returns:
        What was done, or None where it is switched off.
    """
    if not config.enabled:
        return None
    by_length = sorted(batches, key=engine.positions)
    longest, median = by_length[-1], by_length[len(by_length) // 2]
    began = time.perf_counter()
    runs, most = 0, 2 * config.n_warmup
    if config.convergence_detection:
        most = max(most, config.max_prompts)

    def run(batch: Any) -> float:
        nonlocal runs
        runs += 1
        on_run(runs, most if runs <= most else None)
        started = time.perf_counter()
        engine.generate(batch)
        engine.synchronize()
        return time.perf_counter() - started

    latencies: list[float] = []
    for _ in range(config.n_warmup):
        run(longest)
        latencies.append(run(median))

    converged: bool | None = None
    if config.convergence_detection:
        converged = _settled(latencies, config)
        while not converged and runs < config.max_prompts:
            latencies.append(run(median))
            converged = _settled(latencies, config)
    while time.perf_counter() - began < config.thermal_floor_seconds:
        latencies.append(run(median))
    return WarmupRecord(
        runs=runs, seconds=time.perf_counter() - began, converged=converged, cv=_cv(latencies, config)
    )


def _cv(latencies: Sequence[float], config: WarmupConfig) -> float | None:
    last = latencies[-config.window_size :]
    return statistics.stdev(last) / statistics.fmean(last) if len(last) == config.window_size else None


def _settled(latencies: Sequence[float], config: WarmupConfig) -> bool:
    cv = _cv(latencies, config)
    return cv is not None and len(latencies) >= config.min_prompts and cv < config.cv_threshold
