"""A module ``time`` that says what a test has it say."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


def clock(monotonic: Callable[[], float], others: Callable[[], float] | None = None) -> SimpleNamespace:
    """Return what stands in for ``time`` in a module; its other clocks are the monotonic one if none is given."""
    others = others or monotonic
    return SimpleNamespace(monotonic=monotonic, time=others, perf_counter=others)
