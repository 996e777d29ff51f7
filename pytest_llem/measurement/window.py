"""The measured window: whole passes over the prompts, and nothing else."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.backends.protocol import Engine
from pytest_llem.energy.account import Account, Meters


@dataclass(frozen=True)
class Window:
    """What happened in it.

    Attributes:
        passes: For each pass whose outputs were kept, what ``generate`` gave for each batch.
        seconds: From sync to sync.
        account: What the meters saw.
        pass_seconds: Of each of these passes, from sync to sync.
        began: When, on the monotonic clock, in s.
        stride: Passes from one kept to the next: 1 where all were kept.
        not_kept: How many passes there were beside.
    """

    passes: list[list[Any]]
    seconds: float
    account: Account
    pass_seconds: Sequence[float] = ()
    began: float = 0.0
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
        self.stride, self.count = 1, 0
        self._most = most

    def add(self, outputs: list[Any], seconds: float) -> None:
        if self.count % self.stride == 0:
            self.passes.append(outputs)
            self.seconds.append(seconds)
            if len(self.passes) > self._most:
                del self.passes[1::2], self.seconds[1::2]
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
    keep: int = sys.maxsize,
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
        keep: Passes whose outputs are kept, at most.
    """
    generate = generate or engine.generate
    kept, ended = _Kept(keep), 0.0
    engine.synchronize()
    meters.begin()
    began = time.monotonic()
    while True:
        engine.seed(seed)
        outputs = [generate(batch) for batch in batches]
        engine.synchronize()
        started, ended = ended, time.monotonic() - began
        kept.add(outputs, ended - started)
        if ended >= min_seconds:
            break
    account = meters.end()
    not_kept = kept.count - len(kept.passes)
    return Window(kept.passes, ended, account, kept.seconds, began, kept.stride, not_kept)
