"""Warm up: run batches until latencies settle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pytest_llem.engines.protocol import BatchEngine
from pytest_llem.measurement.window import compilations, first_run_stands_out
from pytest_llem.results.experiment import WarmupRecord
from pytest_llem.study.config import WarmupConfig

#: Maximum number of rounds over batches of all lengths while something is still compiled. torch.compile compiles
#: again, now for any length, at the second length, and a CUDA graph is recorded when a length runs again.
MAX_ROUNDS = 4


def warm_up(
    engine: BatchEngine,
    batches: Sequence[Any],
    config: WarmupConfig,
    on_run: Callable[[int, int | None], None],
    *,
    compiled_before: int | None = None,
    finally_run: Sequence[Any] = (),
) -> WarmupRecord | None:
    """Run the longest and the median batch ``n_warmup`` times each, then the median one until latencies settle.

    Latencies have settled when the coefficient of variation of the last ``window_size`` is below
    ``cv_threshold``. There is no pause: an idle machine cools down.

    If the engine compiles, a batch of every length also runs, until nothing is compiled any more. An engine
    compiles if ``torch.compile`` has compiled something, or if the first run of the median batch, which follows
    the longest one, is much slower than its later runs.

    Args:
        engine: A loaded engine.
        batches: Batches of a pass.
        config: Settings of the warm-up.
        on_run: Called before each run with its number, from 1, and the maximum number of runs; None for the latter
            once runs only fill ``thermal_floor_seconds``.
        compiled_before: Value of :func:`~pytest_llem.measurement.window.compilations` before the engine was
            created; None for the current value.
        finally_run: Batches to run once afterwards.

    Returns:
        The record of the warm-up, or None if it is switched off.
    """
    if not config.enabled:
        return None
    if compiled_before is None:
        compiled_before = compilations()
    by_length = sorted(batches, key=lambda batch: engine.positions(batch) or 0)
    longest, median = by_length[-1], by_length[len(by_length) // 2]
    began = time.monotonic()
    runs, max_runs = 0, 2 * config.n_warmup
    if config.convergence_detection:
        max_runs = max(max_runs, config.max_prompts)

    def run(batch: Any) -> float:
        nonlocal runs
        runs += 1
        on_run(runs, max_runs if runs <= max_runs else None)
        started = time.monotonic()
        engine.generate(batch)
        engine.synchronize()
        return time.monotonic() - started

    latencies: list[float] = []
    for _ in range(config.n_warmup):
        run(longest)
        latencies.append(run(median))

    if compilations() > compiled_before or first_run_stands_out(latencies[0], latencies[1:]):
        one_per_length = list({engine.positions(batch): batch for batch in by_length}.values())
        for _ in range(MAX_ROUNDS):
            compiled = compilations()
            max_runs += len(one_per_length)
            for batch in reversed(one_per_length):  # the longest first: its allocations suffice for the others
                run(batch)
            if compilations() == compiled:
                break

    while config.convergence_detection and runs < max_runs and not _settled(latencies, config):
        latencies.append(run(median))
    max_runs += len(finally_run)
    for batch in finally_run:
        run(batch)
    max_runs = runs  # the runs from here on have no maximum
    while time.monotonic() - began < config.thermal_floor_seconds:
        latencies.append(run(median))
    return WarmupRecord(
        runs=runs,
        seconds=time.monotonic() - began,
        converged=_settled(latencies, config) if config.convergence_detection else None,
        cv=_cv(latencies, config),
    )


def _cv(latencies: Sequence[float], config: WarmupConfig) -> float | None:
    last = latencies[-config.window_size :]
    return statistics.stdev(last) / statistics.fmean(last) if len(last) == config.window_size else None


def _settled(latencies: Sequence[float], config: WarmupConfig) -> bool:
    cv = _cv(latencies, config)
    return cv is not None and len(latencies) >= config.min_prompts and cv < config.cv_threshold
