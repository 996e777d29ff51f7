"""The measured window: whole passes over the prompts, and nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pytest_llem.backends.protocol import Engine
from pytest_llem.energy.account import Account, Meters


@dataclass(frozen=True)
class Window:
    """What happened in it.

    Attributes:
        passes: For each pass, what ``generate`` gave for each batch.
        seconds: From sync to sync.
        account: What the meters saw.
        pass_seconds: Of each pass, from sync to sync.
        began: When, on the monotonic clock, in s.
        began_at: When, on the system's clock, in s since 1970.
    """

    passes: list[list[Any]]
    seconds: float
    account: Account
    pass_seconds: Sequence[float] = ()
    began: float = 0.0
    began_at: float = 0.0

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


def measure(
    engine: Engine,
    batches: Sequence[Any],
    meters: Meters,
    *,
    min_seconds: float,
    seed: int,
    generate: Callable[[Any], Any] | None = None,
) -> Window:
    """Run whole passes over *batches* until *min_seconds* are full; one at least.

    The device is drained before both edges. Every pass is seeded alike, so that it generates the same tokens.

    Args:
        engine: Loaded, and warm.
        batches: Those of a pass.
        meters: Open; no window has begun.
        min_seconds: Of the window.
        seed: Of every pass.
        generate: What is done with each batch; the engine's ``generate`` where it is not given.
    """
    generate = generate or engine.generate
    passes: list[list[Any]] = []
    ends: list[float] = []
    engine.synchronize()
    meters.begin()
    began, began_at = time.monotonic(), time.time()
    while True:
        engine.seed(seed)
        passes.append([generate(batch) for batch in batches])
        engine.synchronize()
        ends.append(time.monotonic() - began)
        if ends[-1] >= min_seconds:
            break
    account = meters.end()
    times = [end - start for start, end in pairwise([0.0, *ends])]
    return Window(passes, ends[-1], account, times, began, began_at)
