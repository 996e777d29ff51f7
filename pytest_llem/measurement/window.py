"""The measured window: whole passes over the prompts, and nothing else."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_llem.energy.account import Account, Meters
from pytest_llem.engines.protocol import Engine

#: How often at most a window begins anew because something was compiled in it.
MAX_RESTARTS = 3


@dataclass(frozen=True)
class Window:
    """What happened in it.

    Attributes:
        passes: For each pass whose outputs were kept, what ``generate`` gave for each batch.
        seconds: From sync to sync.
        account: What the meters saw.
        pass_seconds: Of each of these passes, from sync to sync.
        began: When, on the monotonic clock, in s.
        began_at: When, on the system's clock, in s since 1970.
        call_seconds: For each of these passes, how long ``generate`` took to return for each batch.
        compiled: What was compiled in it, so that it is no steady state; null where nothing was.
        restarts: How many windows before it were thrown away because something was compiled in them.
        stride: Passes from one kept to the next: 1 where all were kept.
        not_kept: How many passes there were beside.
    """

    passes: list[list[Any]]
    seconds: float
    account: Account
    pass_seconds: Sequence[float] = ()
    began: float = 0.0
    began_at: float = 0.0
    call_seconds: Sequence[Sequence[float]] = ()
    compiled: str | None = None
    restarts: int = 0
    stride: int = 1
    not_kept: int = 0

    @property
    def count(self) -> int:
        """Whole passes in it."""
        return len(self.passes) + self.not_kept

    @property
    def cv(self) -> float | None:
        """Coefficient of variation of the passes' times; null for a single pass."""
        times = self.pass_seconds
        return statistics.stdev(times) / statistics.fmean(times) if len(times) > 1 else None

    @property
    def drift(self) -> float | None:
        """By what share a pass takes longer in the window's second half than in its first, as means; a pass in the
        middle belongs to neither. Null for fewer than 4 passes.
        """
        half = len(self.pass_seconds) // 2
        if half < 2:
            return None
        first, second = self.pass_seconds[:half], self.pass_seconds[-half:]
        return statistics.fmean(second) / statistics.fmean(first) - 1


class _Kept:
    """Passes spread evenly over a window, however long it is.

    Args:
        most: How many of them.
    """

    def __init__(self, most: int) -> None:
        self.passes: list[list[Any]] = []
        self.seconds: list[float] = []
        self.call_seconds: list[list[float]] = []
        self.stride, self.count = 1, 0
        self._most = most

    def add(self, outputs: list[Any], seconds: float, call_seconds: list[float]) -> None:
        if self.count % self.stride == 0:
            self.passes.append(outputs)
            self.seconds.append(seconds)
            self.call_seconds.append(call_seconds)
            if len(self.passes) > self._most:
                del self.passes[1::2], self.seconds[1::2], self.call_seconds[1::2]
                self.stride *= 2
        self.count += 1


def measure(
    engine: Engine,
    batches: Sequence[Any],
    meters: Meters,
    *,
    min_seconds: float,
    seed: int,
    generate: Callable[[Any], Any] | None = None,
    before: Callable[[], None] = lambda: None,
    keep: int = sys.maxsize,
) -> Window:
    """Run whole passes over *batches* until *min_seconds* are full; one at least.

    The device is drained before both edges. Every pass is seeded alike, so that it generates the same tokens.
    A window in which something was compiled is thrown away and begins anew, ``MAX_RESTARTS`` times at most: the
    last one is returned even so, and says what was compiled.

    Args:
        engine: Loaded, and warm.
        batches: Those of a pass.
        meters: Open; no window has begun.
        min_seconds: Of the window.
        seed: Of every pass.
        generate: What is done with each batch; the engine's ``generate`` where it is not given.
        before: Called before the window begins, each time that it does.
        keep: Passes whose outputs are kept, at most.
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
    engine: Engine,
    batches: Sequence[Any],
    meters: Meters,
    *,
    min_seconds: float,
    seed: int,
    generate: Callable[[Any], Any],
    keep: int,
    is_last: bool,
) -> Window:
    """Measure one window. It ends early where something is compiled in it, unless it is the last one."""
    kept, ended = _Kept(keep), 0.0
    compiled_before = compilations()
    engine.synchronize()
    meters.begin()
    began, began_at = time.monotonic(), time.time()
    while True:
        engine.seed(seed)
        outputs, calls = [], []
        for batch in batches:
            called = time.perf_counter()
            outputs.append(generate(batch))
            calls.append(time.perf_counter() - called)
        engine.synchronize()
        started, ended = ended, time.monotonic() - began
        kept.add(outputs, ended - started, calls)
        if ended >= min_seconds or (not is_last and compilations() > compiled_before):
            break
    account = meters.end()
    return Window(
        kept.passes,
        ended,
        account,
        kept.seconds,
        began,
        began_at,
        kept.call_seconds,
        _compiled(compilations() - compiled_before, kept.call_seconds),
        stride=kept.stride,
        not_kept=kept.count - len(kept.passes),
    )


def _compiled(graphs: int, call_seconds: Sequence[Sequence[float]]) -> str | None:
    """Return what was compiled in a window, in words; None where nothing was, as far as is known.

    Args:
        graphs: How many graphs ``torch.compile`` has compiled in it.
        call_seconds: For each pass, how long each batch took.
    """
    if graphs:
        return f"torch.compile compiled {graphs} graph{'s' * (graphs > 1)} in the window"
    first, *later = call_seconds
    later_runs = [[one[place] for one in later] for place in range(len(first))]
    stalls = [place for place, runs in enumerate(later_runs) if first_run_stands_out(first[place], runs)]
    if not stalls or 2 * len(stalls) > len(first):  # of most batches it is no compilation: their lengths have run
        return None
    place = stalls[0]
    return (
        f"batch {place + 1} of {len(first)} took {first[place]:.3g} s in the window's first pass and "
        f"{statistics.median(later_runs[place]):.3g} s later, as where something is compiled"
    )


#: A first run has compiled something if it takes so many times as long as later ones, and so many seconds longer:
#: compilers take tenths of a second and more, hiccups of an operating system less.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process, whoever called it.

    transformers calls it for static caches on GPUs, and some models and attention kernels do. torch is not
    imported for it.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch took so much longer than *later* ones that it did something else.

    Args:
        first: In s.
        later: Runs of the same batch, in s; where there are none, nothing is known.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS
