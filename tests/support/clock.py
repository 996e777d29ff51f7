"""A replacement for the module ``time`` with a clock that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


def clock(monotonic: Callable[[], float], others: Callable[[], float] | None = None) -> SimpleNamespace:
    """Return a replacement for the module ``time``. By default all of its clocks are *monotonic*."""
    others = others or monotonic
    return SimpleNamespace(monotonic=monotonic, time=others, perf_counter=others)
