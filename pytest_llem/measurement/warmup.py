"""Runs the load until the machine is warm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pytest_llem.engines.protocol import Engine
from pytest_llem.measurement.window import compilations, first_run_stands_out
from pytest_llem.results.experiment import WarmupRecord
from pytest_llem.study.config import WarmupConfig

#: How often at most all shapes are run, as long as something is still compiled: code for one shape is compiled
#: once more, for any shape, when a second one comes, and a CUDA graph is recorded in a shape's second run.
MAX_ROUNDS = 4


def warm_up(
    engine: Engine,
    batches: Sequence[Any],
    config: WarmupConfig,
    on_run: Callable[[int, int | None], None],
    *,
    compiled_before: int | None = None,
) -> WarmupRecord | None:
    """Run the longest and the median batch ``n_warmup`` times each, then the median one until latencies settle.

    They have settled when the last ``window_size`` of them have a coefficient of variation below
    ``cv_threshold``. The load stays on to the end: an idle pause would throw the warm state away.

    Where the engine compiles, a batch of every length runs as well, again and again until nothing is compiled any
    more. It does where ``torch.compile`` has compiled something, or where the first run of the median batch, which
    comes after the longest one, stands out of its later runs.

    Args:
        engine: Loaded.
        batches: Those of a pass.
        config: When it is enough.
        on_run: Called before each run with its number, from 1, and with how many there may be; None once they only
            fill ``thermal_floor_seconds``.
        compiled_before: What :func:`~pytest_llem.measurement.window.compilations` returned before there was
            an engine; None for what it returns now.

    Returns:
        What was done, or None where it is switched off.
    """
    if not config.enabled:
        return None
    if compiled_before is None:
        compiled_before = compilations()
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

    if compilations() > compiled_before or first_run_stands_out(latencies[0], latencies[1:]):
        shapes = list({engine.positions(batch): batch for batch in by_length}.values())
        for _ in range(MAX_ROUNDS):
            compiled = compilations()
            most += len(shapes)
            for batch in reversed(shapes):  # the longest first: what is allocated for it holds the others
                run(batch)
            if compilations() == compiled:
                break

    converged: bool | None = None
    if config.convergence_detection:
        converged = _settled(latencies, config)
        while not converged and runs < most:
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
