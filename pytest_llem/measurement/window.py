"""Measure a window: whole passes over the prompts, and nothing else."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_llem.energy.account import Account, Meters
from pytest_llem.engines.protocol import Engine

#: Maximum number of restarts of a window because something was compiled in it.
MAX_RESTARTS = 3


@dataclass(frozen=True)
class Window:
    """A measured window.

    Attributes:
        passes: For each pass whose outputs were kept, the return value of ``generate`` for each batch.
        seconds: Length between device synchronizations, in s.
        account: The meters' readings.
        pass_seconds: Duration of each kept pass, between device synchronizations, in s.
        began: Start on the monotonic clock, in s.
        began_at: Start on the system's clock, in s since 1970.
        call_seconds: For each kept pass, how long ``generate`` took to return for each batch, in s.
        compiled: Message about what was compiled in the window, which is then no steady state; None if nothing.
        restarts: Number of earlier windows that were discarded because something was compiled in them.
        stride: Every how many passes one was kept; 1 if all were kept.
        not_kept: Number of passes that were not kept.
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
    """Run whole passes over *batches* for at least *min_seconds*, and return the window.

    The device is synchronized at both edges. Every pass has the same seed, so that it generates the same tokens.
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


#: A first run has compiled something if it takes this many times as long as later ones, and this many seconds
#: longer. Compilers take tenths of a second and more; delays by the operating system are shorter.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.1


def compilations() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process.

    transformers calls it for static caches on GPUs, and so do some models and attention kernels. torch is not
    imported here.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def first_run_stands_out(first: float, later: Sequence[float]) -> bool:
    """Return whether the *first* run of a batch was so much slower than *later* ones that it compiled something.

    Args:
        first: Duration of the first run, in s.
        later: Durations of later runs of the same batch, in s; if empty, the result is False.
    """
    if not later:
        return False
    typical = statistics.median(later)
    return first > STALL_FACTOR * typical and first - typical > STALL_SECONDS
