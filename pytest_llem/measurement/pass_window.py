"""Measure windows of whole passes over the prompts: every prompt once, in batches, as fast as the engine can."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

from pytest_llem.energy.account import Meters, join_accounts
from pytest_llem.engines.protocol import BatchEngine
from pytest_llem.measurement.window import Window, compilations, first_run_stands_out

#: Maximum number of restarts of a window because something was compiled in it.
MAX_RESTARTS = 3


@dataclass(frozen=True)
class PassWindow(Window):
    """A window of whole passes.

    Attributes:
        passes: For each pass whose outputs were kept, the return value of ``generate`` for each batch.
        pass_seconds: Duration of each kept pass, between device synchronisations, in s.
        call_seconds: For each kept pass, how long ``generate`` took to return for each batch, in s.
        numbers: Number of each kept pass in the window, from 1; empty if all were kept.
        not_kept: Number of passes that were not kept.
    """

    passes: Sequence[Sequence[Any]] = field(default_factory=lambda: [[]])
    pass_seconds: Sequence[float] = ()
    call_seconds: Sequence[Sequence[float]] = ()
    numbers: Sequence[int] = ()
    not_kept: int = 0

    @property
    def count(self) -> int:
        """Number of passes."""
        return len(self.passes) + self.not_kept

    @property
    def pass_fields(self) -> dict[str, Any]:
        return {
            "passes": self.count,
            "recorded_passes": len(self.passes),
            "pass_seconds_cv": self.cv,
            "drift": self.drift,
        }

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
