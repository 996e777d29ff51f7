"""The measured window: whole passes over the prompts, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
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
        began: When, on the monotonic clock, in s.
    """

    passes: list[list[Any]]
    seconds: float
    account: Account
    began: float = 0.0


def measure(engine: Engine, batches: Sequence[Any], meters: Meters, *, min_seconds: float, seed: int) -> Window:
    """Run whole passes over *batches* until *min_seconds* are full; one at least.

    The device is drained before both edges. Every pass is seeded alike, so that it generates the same tokens.
    """
    passes: list[list[Any]] = []
    engine.synchronize()
    meters.begin()
    began = time.monotonic()
    while True:
        engine.seed(seed)
        passes.append([engine.generate(batch) for batch in batches])
        engine.synchronize()
        seconds = time.monotonic() - began
        if seconds >= min_seconds:
            break
    account = meters.end()
    return Window(passes, seconds, account, began)
