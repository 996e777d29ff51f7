"""Warm up an engine, and drive it with whole passes over the prompts of its workload."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from pytest_llem.energy.account import Meters, Total
from pytest_llem.engines.protocol import BatchEngine, SupportsPrefillOnly
from pytest_llem.measurement.accounting import Served, energy, energy_metrics, speed_metrics
from pytest_llem.measurement.driver import Driver, measure_turns
from pytest_llem.measurement.engine_reports import check_engine_reports, recorded_passes, too_fast_reason
from pytest_llem.measurement.load_metrics import not_serving_metrics
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.pass_window import PassWindow, join_turns, measure
from pytest_llem.measurement.quality_warnings import faster_repeats_warning, pass_warnings
from pytest_llem.measurement.records import token_record
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turn, Turns
from pytest_llem.measurement.window import compilations, first_run_stands_out
from pytest_llem.results.experiment import TokenRecord, WarmupRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.study.config import ExperimentConfig, WarmupConfig
from pytest_llem.workload.prompts import Workload, other_prompts

#: Number of requests in a warm-up batch of an engine that has one batch for the whole pass, and does not state how
#: many requests it generates at a time.
REQUESTS_AT_A_TIME = 8


class PassDriver(Driver[PassWindow]):
    """Drives an engine with whole passes over the prompts of *workload*. Every pass has the same seed.

    Args:
        engine: A loaded engine.
        config: The experiment.
        workload: The prompts of a pass.
        sequences: Number of requests that the engine generates at a time; None if unknown.
        compiled_before: Number of graphs that were compiled in this process before the model was loaded.
    """

    def __init__(
        self,
        engine: BatchEngine,
        config: ExperimentConfig,
        workload: Workload,
        sequences: int | None = None,
        compiled_before: int = 0,
    ) -> None:
        self._engine, self._config, self._workload = engine, config, workload
        self._compiled_before = compiled_before
        prompts = other_prompts(config, engine, workload, "warm-up")
        self._warmup, self._final_warmup = _warmup_batches(engine, prompts, sequences)
        # Copies: if the engine changes a prompt, its reports then contradict the workload, and that is an error.
        self.batches = engine.prepare([one if isinstance(one, str) else list(one) for one in workload.prompts])
        engine.seed(config.random_seed)

    @cached_property
    def positions(self) -> int | None:
        """Number of input positions of a pass, padding included; None if unknown."""
        counts = [self._engine.positions(batch) for batch in self.batches]
        return None if None in counts else sum(count for count in counts if count is not None)

    def run_once(self) -> None:
        """Generate for one warm-up batch, so that the engine allocates all that it needs."""
        self._engine.generate(self._warmup[0])
        self._engine.synchronize()

    def warm_up(self, on_run: Callable[[int, int | None], None]) -> WarmupRecord | None:
        """Run warm-up batches until latencies settle; see :func:`warm_up`."""
        return warm_up(
            self._engine,
            self._warmup,
            self._config.warmup,
            on_run,
            compiled_before=self._compiled_before,
            finally_run=self._final_warmup,
        )

    def measure(self, meters: Meters, observers: WindowObservers, turns: Turns | None = None) -> PassWindow:
        generate, min_seconds = self._engine.generate, self._config.measurement.min_window_seconds
        if turns is None:
            return self._measure(generate, meters, observers, min_seconds)
        return join_turns(
            measure_turns(
                turns,
                observers,
                min_seconds,
                lambda seconds, turn: self._measure(generate, meters, observers, seconds, turn),
            ),
            may_compile=not (self._config.warmup.enabled and self._has_one_length),
        )

    @property
    def _has_one_length(self) -> bool:
        """Whether all batches are equally long, so that the warm-up has run that length."""
        lengths = {self._engine.positions(batch) for batch in self.batches}
        return len(lengths) == 1 and None not in lengths

    def measure_prefill(self, meters: Meters, observers: WindowObservers) -> PassWindow:
        """Measure passes over the same batches, with the same seed, that generate one token for each prompt.

        Call it directly after :meth:`measure`, while the machine is equally warm. The first batch runs once
        unmeasured, because stopping after one token may compile something.

        Args:
            meters: Open meters that have no window in progress.
            observers: Observe the window.

        Raises:
            ValueError: The engine generates another number of tokens, or a request fails.
        """
        assert isinstance(self._engine, SupportsPrefillOnly)
        self._engine.generate_first(self.batches[0])
        min_seconds = self._config.measurement.min_window_seconds
        window = self._measure(self._engine.generate_first, meters, observers, min_seconds)
        for request in self.requests(window).all():
            if request.error is not None:
                raise ValueError(f"a request for one token failed in the prefill window: {request.error}")
            if request.output_tokens != 1:
                count = request.output_tokens
                raise ValueError(f"the engine returned {count} tokens for a request for one (generate_first)")
        return window

    def requests(self, window: PassWindow) -> Requests:
        """Return the requests of every recorded pass of *window*."""
        return self._requests(window, self.batches)

    def _requests(self, window: PassWindow, prepared: Sequence[Any]) -> Requests:
        """Return the requests of *window*, whose batches are *prepared*."""
        batches = [
            [self._engine.requests(batch, generated) for batch, generated in zip(prepared, one, strict=True)]
            for one in window.passes
        ]
        engine = self._engine
        return Requests(
            [list(chain.from_iterable(one)) for one in batches],
            engine.latency_unknown_reason,
            [len(batch) for batch in batches[0]] if engine.batch_sizes_known else (),
            window.numbers,
            too_fast_reason(batches, window.pass_seconds),
            engine.tokens_unknown_reason,
            self._config.n,
        )

    def check(self, window: PassWindow, requests: Requests) -> str | None:
        check_engine_reports(requests.passes, self._workload.prompts, self.positions, window.pass_seconds, window)
        found = faster_repeats_warning(window, requests)
        if found is None:
            return None
        # One delay of the machine can slow down most batches of a pass: most of two or three other sets decide.
        votes = [self._is_confirmed(number) for number in range(2)]
        is_cache = votes[0] if votes[0] == votes[1] else self._is_confirmed(2)
        return found if is_cache else None

    def _is_confirmed(self, number: int) -> bool:
        """Run other prompts twice, and return whether the second pass is faster, as a cache makes it."""
        label, seed = f"confirmation {number}", self._config.random_seed
        batches = self._engine.prepare(other_prompts(self._config, self._engine, self._workload, label))
        passes = [measure(self._engine, batches, Meters(), min_seconds=0, seed=seed) for _ in range(2)]
        window = join_turns(passes, may_compile=False)
        return faster_repeats_warning(window, self._requests(window, batches)) is not None

    def metrics(self, window: PassWindow, requests: Requests) -> dict[str, Metric]:
        served = Served.in_passes(window.count, requests)
        return {
            **energy_metrics(window.account, window.seconds, served),
            **speed_metrics(window.seconds, served),
            **requests.latency_metrics(),
            **not_serving_metrics(),
        }

    def loading_metrics(self, seconds: float, total: Total) -> dict[str, Metric]:
        return {
            "load_seconds": metric("load_seconds", seconds),
            "load_energy_j": energy("load_energy_j", total),
        }

    def token_record(self, window: PassWindow, requests: Requests) -> TokenRecord:
        return token_record(self._workload, requests, self.positions)

    def warnings(self, window: PassWindow, requests: Requests) -> Iterator[QualityWarning]:
        """Yield quality warnings about the passes of *window*."""
        return pass_warnings(window, (self._workload.truncated, self._config.n))

    def _measure(
        self,
        generate: Callable[[Any], Any],
        meters: Meters,
        observers: WindowObservers,
        min_seconds: float,
        turn: Turn | None = None,
    ) -> PassWindow:
        window = measure(
            self._engine,
            self.batches,
            meters,
            min_seconds=min_seconds,
            seed=self._config.random_seed,
            generate=generate,
            before=observers.begin,
            keep=recorded_passes(self._config),
        )
        observers.end(window.account, turn)
        return window


def _warmup_batches(
    engine: BatchEngine, prompts: Sequence[Sequence[int]], sequences: int | None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the batches to warm up with, and the batches that run once at the end of the warm-up.

    An engine that schedules requests itself has one batch for the whole pass: warming up with it would take
    2 · ``n_warmup`` passes. So it warms up with batches of as many requests as it generates at a time, and the
    whole batch runs once, at the end. Other engines have no batches for the end.
    """
    batches = engine.prepare(prompts)
    size = sequences or (len(prompts) if len(batches) > 1 else REQUESTS_AT_A_TIME)
    if len(prompts) <= size * len(batches):
        return batches, ()
    by_length = sorted(prompts, key=len)
    middle = (len(prompts) - size) // 2
    parts = by_length[middle : middle + size], by_length[-size:]
    return [batch for part in parts for batch in engine.prepare(part)], batches


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
    ``cv_threshold``. Runs follow each other without a pause: an idle machine cools down.

    If the engine compiles, a batch of every length also runs, until nothing is compiled any more. An engine
    compiles if ``torch.compile`` has compiled something, or if the first run of the median batch, which follows
    the longest one, is much slower than its later runs.

    Args:
        engine: A loaded engine.
        batches: Batches to warm up with.
        config: Settings of the warm-up.
        on_run: Called before each run with its number, from 1, and the maximum number of runs; None for the latter
            once runs only fill ``thermal_floor_seconds``.
        compiled_before: Value of :func:`~pytest_llem.measurement.window.compilations` before the model was
            loaded; None for the current value.
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
