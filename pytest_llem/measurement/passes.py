"""Drive an engine with whole passes over the prompts: every prompt once, in batches, as fast as it can."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

from pytest_llem.energy.account import Meters, join_accounts
from pytest_llem.engines.protocol import BatchEngine, SupportsPrefillOnly
from pytest_llem.measurement.engine_reports import recorded_passes
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turns, progress
from pytest_llem.measurement.warmup import warm_up
from pytest_llem.measurement.window import Window, compilations, first_run_stands_out
from pytest_llem.results.experiment import WarmupRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.workload.prompts import Workload, warmup_prompts

#: Maximum number of restarts of a window because something was compiled in it.
MAX_RESTARTS = 3

#: Requests of a warm-up run of an engine that has one batch and does not state how many it generates at a time.
REQUESTS_AT_A_TIME = 8


@dataclass(frozen=True)
class PassWindow(Window):
    """A window of whole passes.

    Attributes:
        passes: For each pass whose outputs were kept, the return value of ``generate`` for each batch.
        pass_seconds: Duration of each kept pass, between device synchronisations, in s.
        call_seconds: For each kept pass, how long ``generate`` took to return for each batch, in s.
        numbers: Number of each kept pass in the window, from 1; empty if all were kept.
        not_kept: Number of passes that were not kept.
        turns: The windows that this one was joined from, if it was measured alternately with another experiment.
    """

    passes: Sequence[Sequence[Any]] = field(default_factory=lambda: [[]])
    pass_seconds: Sequence[float] = ()
    call_seconds: Sequence[Sequence[float]] = ()
    numbers: Sequence[int] = ()
    not_kept: int = 0
    turns: Sequence[PassWindow] = ()

    @property
    def ended(self) -> float:
        """End on the monotonic clock, in s."""
        return self.turns[-1].ended if self.turns else super().ended

    @property
    def count(self) -> int:
        """Number of passes."""
        return len(self.passes) + self.not_kept

    @property
    def cv(self) -> float | None:
        """Coefficient of variation of the pass durations; None for a single pass."""
        times = self.pass_seconds
        return statistics.stdev(times) / statistics.fmean(times) if len(times) > 1 else None

    @property
    def drift(self) -> float | None:
        """Relative change of the mean pass duration from the window's first half to its second.

        A pass in the middle belongs to neither. None for fewer than 4 passes.
        """
        half = len(self.pass_seconds) // 2
        if half < 2:
            return None
        first, second = self.pass_seconds[:half], self.pass_seconds[-half:]
        return statistics.fmean(second) / statistics.fmean(first) - 1


class PassDriver:
    """Drives an engine with whole passes over the prompts of *workload*. Every pass has the same seed.

    Args:
        engine: A loaded engine.
        config: The experiment.
        workload: The prompts of a pass.
        sequences: Number of requests that the engine generates at a time; None if unknown.
    """

    def __init__(
        self, engine: BatchEngine, config: ExperimentConfig, workload: Workload, sequences: int | None = None
    ) -> None:
        self._engine, self._config = engine, config
        self._warmup = _WarmupBatches(engine, warmup_prompts(config, engine, workload), sequences)
        self.batches = engine.prepare(workload.prompts)
        engine.seed(config.random_seed)

    @cached_property
    def positions(self) -> int | None:
        """Number of input positions of a pass, padding included; None if unknown."""
        counts = [self._engine.positions(batch) for batch in self.batches]
        return None if None in counts else sum(count for count in counts if count is not None)

    def run_once(self) -> None:
        """Generate for one warm-up batch, so that the engine allocates all that it needs."""
        self._engine.generate(self._warmup.batches[0])
        self._engine.synchronize()

    def warm_up(self, on_run: Callable[[int, int | None], None], compiled_before: int) -> WarmupRecord | None:
        """Run warm-up batches until latencies settle; see :func:`~pytest_llem.measurement.warmup.warm_up`."""
        return warm_up(
            self._engine,
            self._warmup.batches,
            self._config.warmup,
            on_run,
            compiled_before=compiled_before,
            finally_run=self._warmup.whole,
        )

    def measure(self, meters: Meters, observers: WindowObservers, turns: Turns | None = None) -> PassWindow:
        """Measure whole passes for at least ``measurement.min_window_seconds``.

        Args:
            meters: Open meters, outside of a window.
            observers: Observe each window, or turn.
            turns: Turns with another experiment; None to measure without interruption.
        """
        min_seconds = self._config.measurement.min_window_seconds
        if turns is None:
            window = self._measure(self._engine.generate, meters, min_seconds, observers.begin)
            observers.end(window)
            return window
        taken: list[PassWindow] = []
        while True:
            measured = math.fsum(one.seconds for one in taken)
            turn = turns.next_turn(progress(len(taken), measured, min_seconds, observers.waiting_cpus))
            if turn is None:
                break
            taken.append(self._measure(self._engine.generate, meters, turns.min_seconds, observers.begin))
            observers.end(taken[-1], turn)
        return join_turns(taken)

    def measure_prefill(self, meters: Meters, observers: WindowObservers) -> PassWindow:
        """Measure passes over the same batches, with the same seed, that generate one token for each prompt.

        Call it directly after :meth:`measure`, while the machine is equally warm. The first batch runs once
        unmeasured, because stopping after one token may compile something.

        Args:
            meters: Open meters, outside of a window.
            observers: Observe the window.

        Raises:
            ValueError: The engine generates another number of tokens, or a request fails.
        """
        assert isinstance(self._engine, SupportsPrefillOnly)
        self._engine.generate_first(self.batches[0])
        min_seconds = self._config.measurement.min_window_seconds
        window = self._measure(self._engine.generate_first, meters, min_seconds, observers.begin)
        observers.end(window)
        for request in self.requests(window).all():
            if request.error is not None:
                raise ValueError(f"a request for one token failed in the prefill window: {request.error}")
            if request.output_tokens != 1:
                count = request.output_tokens
                raise ValueError(f"the engine returned {count} tokens for a request for one (generate_first)")
        return window

    def requests(self, window: PassWindow) -> Requests:
        """Return the requests of every recorded pass of *window*."""
        batches = [
            [self._engine.requests(batch, generated) for batch, generated in zip(self.batches, one, strict=True)]
            for one in window.passes
        ]
        requests = Requests.of(batches, self._engine.no_latency, window.numbers, window.pass_seconds)
        sizes = requests.sizes if self._engine.batch_sizes_known else ()
        return replace(requests, sizes=sizes, no_tokens=self._engine.no_tokens)

    def _measure(
        self, generate: Callable[[Any], Any], meters: Meters, min_seconds: float, before: Callable[[], None]
    ) -> PassWindow:
        return measure(
            self._engine,
            self.batches,
            meters,
            min_seconds=min_seconds,
            seed=self._config.random_seed,
            generate=generate,
            before=before,
            keep=recorded_passes(self._config),
        )


def join_turns(parts: Sequence[PassWindow]) -> PassWindow:
    """Return turns of one experiment as one window, which lasts as long as they do together."""
    before = accumulate((turn.count for turn in parts), initial=0)
    numbers = [
        passed + number
        for passed, turn in zip(before, parts, strict=False)
        for number in turn.numbers or range(1, 1 + turn.count)
    ]
    call_seconds = [*chain.from_iterable(turn.call_seconds for turn in parts)]
    return PassWindow(
        math.fsum(turn.seconds for turn in parts),
        join_accounts([turn.account for turn in parts]),
        parts[0].began,
        parts[0].began_at,
        next((turn.compiled for turn in parts if turn.compiled is not None), _compiled(0, call_seconds)),
        sum(turn.restarts for turn in parts),
        passes=[*chain.from_iterable(turn.passes for turn in parts)],
        pass_seconds=[*chain.from_iterable(turn.pass_seconds for turn in parts)],
        call_seconds=call_seconds,
        numbers=numbers,
        not_kept=sum(turn.not_kept for turn in parts),
        turns=parts,
    )


class _WarmupBatches:
    """Batches for warm-up, of no more requests than the engine generates at a time.

    An engine that schedules requests itself has one batch for the whole pass: warming up with it would take ten
    passes. So its warm-up batches are parts of it, and the whole one runs once, at the end.

    Attributes:
        batches: The batches to warm up with.
        whole: Batches of a whole pass if ``batches`` are parts of them, else empty.
    """

    def __init__(self, engine: BatchEngine, prompts: Sequence[Sequence[int]], sequences: int | None) -> None:
        self.batches = engine.prepare(prompts)
        self.whole: Sequence[Any] = ()
        size = sequences or (len(prompts) if len(self.batches) > 1 else REQUESTS_AT_A_TIME)
        if len(prompts) > size * len(self.batches):
            by_length = sorted(prompts, key=len)
            middle = (len(prompts) - size) // 2
            parts = by_length[middle : middle + size], by_length[-size:]
            self.whole = self.batches
            self.batches = [batch for part in parts for batch in engine.prepare(part)]


class _KeptPasses:
    """Keeps a limited number of passes, spread evenly over a window of any length.

    Args:
        max_passes: Maximum number of passes to keep.
    """

    def __init__(self, max_passes: int) -> None:
        self.passes: list[list[Any]] = []
        self.seconds: list[float] = []
        self.call_seconds: list[list[float]] = []
        self.stride, self.count = 1, 0
        self._max_passes = max_passes

    def add(self, outputs: list[Any], seconds: float, call_seconds: list[float]) -> None:
        if self.count % self.stride == 0:
            self.passes.append(outputs)
            self.seconds.append(seconds)
            self.call_seconds.append(call_seconds)
            if len(self.passes) > self._max_passes:
                del self.passes[1::2], self.seconds[1::2], self.call_seconds[1::2]
                self.stride *= 2
        self.count += 1


def measure(
    engine: BatchEngine,
    batches: Sequence[Any],
    meters: Meters,
    *,
    min_seconds: float,
    seed: int,
    generate: Callable[[Any], Any] | None = None,
    before: Callable[[], None] = lambda: None,
    keep: int = sys.maxsize,
) -> PassWindow:
    """Run whole passes over *batches* for at least *min_seconds*, and return the window.

    The device is synchronised at both edges. Every pass has the same seed, so that it generates the same tokens.
    A window in which something was compiled is discarded and measured again, up to ``MAX_RESTARTS`` times. The
    last one is returned in any case: its ``compiled`` is then set.

    Args:
        engine: A loaded and warm engine.
        batches: Batches of a pass.
        meters: Open meters, outside of a window.
        min_seconds: Minimum length of the window, in s.
        seed: Seed of every pass.
        generate: Function to call with each batch; None for the engine's ``generate``.
        before: Called at the start of each window, discarded ones included.
        keep: Maximum number of passes whose outputs are kept.
    """
    for restarts in range(MAX_RESTARTS + 1):
        before()
        window = _measure_once(
            engine,
            batches,
            meters,
            min_seconds=min_seconds,
            seed=seed,
            generate=generate or engine.generate,
            keep=keep,
            is_last=restarts == MAX_RESTARTS,
        )
        if window.compiled is None:
            break
    return replace(window, restarts=restarts)


def _measure_once(
    engine: BatchEngine,
    batches: Sequence[Any],
    meters: Meters,
    *,
    min_seconds: float,
    seed: int,
    generate: Callable[[Any], Any],
    keep: int,
    is_last: bool,
) -> PassWindow:
    """Measure one window. It ends early if something is compiled in it, unless it is the last one."""
    kept, ended = _KeptPasses(keep), 0.0
    compiled_before = compilations()
    engine.synchronize()
    meters.begin()
    began, began_at = time.monotonic(), time.time()
    while True:
        engine.seed(seed)
        outputs, calls = [], []
        for batch in batches:
            called = time.monotonic()
            outputs.append(generate(batch))
            calls.append(time.monotonic() - called)
        engine.synchronize()
        started, ended = ended, time.monotonic() - began
        kept.add(outputs, ended - started, calls)
        if ended >= min_seconds or (not is_last and compilations() > compiled_before):
            break
    account = meters.end()
    return PassWindow(
        ended,
        account,
        began,
        began_at,
        _compiled(compilations() - compiled_before, kept.call_seconds),
        passes=kept.passes,
        pass_seconds=kept.seconds,
        call_seconds=kept.call_seconds,
        numbers=range(1, 1 + kept.count, kept.stride) if kept.stride > 1 else (),
        not_kept=kept.count - len(kept.passes),
    )


def _compiled(graphs: int, call_seconds: Sequence[Sequence[float]]) -> str | None:
    """Return a message about what was compiled in a window; None if no compilation was detected.

    Args:
        graphs: Number of graphs that ``torch.compile`` compiled in it.
        call_seconds: For each pass, the duration of each batch, in s.
    """
    if graphs:
        return f"torch.compile compiled {graphs} graph{'s' * (graphs > 1)} in the window"
    first, *later = call_seconds
    later_runs = [[one[place] for one in later] for place in range(len(first))]
    stalls = [place for place, runs in enumerate(later_runs) if first_run_stands_out(first[place], runs)]
    # If most batches are slow at first, the cause is not compilation: the warm-up has run their lengths.
    if not stalls or 2 * len(stalls) > len(first):
        return None
    place = stalls[0]
    return (
        f"batch {place + 1} of {len(first)} took {first[place]:.3g} s in the window's first pass and "
        f"{statistics.median(later_runs[place]):.3g} s later: the engine seems to compile in the window"
    )
