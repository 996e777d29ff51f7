"""Measure windows of whole passes. A pass runs every prompt once, in batches, as fast as the engine can."""

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

#: Maximum number of times that a window is measured again because something was compiled in it.
MAX_RESTARTS = 3


@dataclass(frozen=True)
class PassWindow(Window):
    """A window of whole passes. Of an engine's passes, the devices are synchronised at both edges.

    Attributes:
        passes: For each pass whose outputs were kept, the return value of ``generate`` for each batch. The default
            is one pass without batches: the window of a user's command.
        pass_seconds: Duration of each kept pass, between device synchronisations, in s.
        call_seconds: For each kept pass, how long ``generate`` took to return for each batch, in s.
        numbers: Position of each kept pass in the window, from 1; empty if all passes were kept.
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

        A pass in the middle belongs to neither half. None for fewer than 4 passes.
        """
        half = len(self.pass_seconds) // 2
        if half < 2:
            return None
        first, second = self.pass_seconds[:half], self.pass_seconds[-half:]
        return statistics.fmean(second) / statistics.fmean(first) - 1


def join_turns(parts: Sequence[PassWindow], *, may_compile: bool = True) -> PassWindow:
    """Return the windows of an experiment's turns as one window, whose length is the sum of theirs.

    Args:
        parts: The windows, in order.
        may_compile: Whether a batch that is slower in the first pass than later may have compiled something.
            Joined turns are not measured again, as a single window is: a delay would be taken for a compilation.
    """
    earlier_passes = accumulate((turn.count for turn in parts), initial=0)
    numbers = [
        earlier + number
        for earlier, turn in zip(earlier_passes, parts, strict=False)
        for number in turn.numbers or range(1, 1 + turn.count)
    ]
    call_seconds = [*chain.from_iterable(turn.call_seconds for turn in parts)]
    compiled = next((turn.compiled for turn in parts if turn.compiled is not None), None)
    if compiled is None and may_compile:  # it is found by comparing passes, and a turn may have a single one
        compiled = _compilation(0, call_seconds)
    return PassWindow(
        math.fsum(turn.seconds for turn in parts),
        join_accounts([turn.account for turn in parts]),
        parts[0].began,
        parts[0].began_at,
        compiled,
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

    The length is not known in advance. So whenever there are too many, every second kept pass is dropped, and
    from then on half as many passes are kept.

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

    The device is synchronised at both edges. All passes have the same seed, so that they generate the same tokens.
    A window in which something was compiled is discarded and measured again, up to ``MAX_RESTARTS`` times. If
    something was compiled in the last window too, this window is returned with ``compiled`` set.

    Args:
        engine: An engine that is loaded and warmed up.
        batches: Batches of a pass.
        meters: Open meters that have no window in progress.
        min_seconds: Minimum length of the window, in s.
        seed: Seed of every pass.
        generate: Function to call with each batch; None for the engine's ``generate``.
        before: Called at the start of each window, also of those that are then discarded.
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
    """Measure one window. It ends early if something is compiled in it, since it is then measured again.

    If *is_last*, the window runs to its end, since it is returned in any case.
    """
    kept, elapsed = _KeptPasses(keep), 0.0
    compiled_before = compilations()
    engine.synchronize()
    meters.begin()
    began, began_at = time.monotonic(), time.time()
    while True:
        engine.seed(seed)
        outputs, call_seconds = [], []
        for batch in batches:
            called = time.monotonic()
            outputs.append(generate(batch))
            call_seconds.append(time.monotonic() - called)
        engine.synchronize()
        previous, elapsed = elapsed, time.monotonic() - began
        kept.add(outputs, elapsed - previous, call_seconds)
        if elapsed >= min_seconds or (not is_last and compilations() > compiled_before):
            break
    account = meters.end()
    return PassWindow(
        elapsed,
        account,
        began,
        began_at,
        _compilation(compilations() - compiled_before, kept.call_seconds),
        passes=kept.passes,
        pass_seconds=kept.seconds,
        call_seconds=kept.call_seconds,
        numbers=range(1, 1 + kept.count, kept.stride) if kept.stride > 1 else (),
        not_kept=kept.count - len(kept.passes),
    )


def _compilation(graphs: int, call_seconds: Sequence[Sequence[float]]) -> str | None:
    """Return a message about what was compiled in a window; None if no compilation was detected.

    Args:
        graphs: Number of graphs that ``torch.compile`` compiled in the window.
        call_seconds: For each pass, how long ``generate`` took to return for each batch, in s.
    """
    if graphs:
        return f"torch.compile compiled {graphs} graph{'s' * (graphs > 1)} in the window"
    first, *later = call_seconds
    later_calls = [[seconds[batch] for seconds in later] for batch in range(len(first))]
    stalls = [batch for batch, calls in enumerate(later_calls) if first_run_stands_out(first[batch], calls)]
    # The warm-up has run batches of these lengths, so that at most a few of them still need compilation. If most
    # batches were slow in the first pass, the cause is another one.
    if not stalls or 2 * len(stalls) > len(first):
        return None
    batch = stalls[0]
    return (
        f"batch {batch + 1} of {len(first)} took {first[batch]:.3g} s in the window's first pass and "
        f"{statistics.median(later_calls[batch]):.3g} s later: the engine seems to compile in the window"
    )
