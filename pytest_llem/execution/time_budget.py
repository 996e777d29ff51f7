"""``--llem-time-budget``: start no experiment that would probably end later."""

from __future__ import annotations

import time

import pytest

from pytest_llem._plugin.options import Settings
from pytest_llem.planning.estimate import duration_text

_BEGAN = pytest.StashKey[float]()


def begin(config: pytest.Config) -> None:
    """Start the time budget, in each process of the session."""
    config.stash[_BEGAN] = time.monotonic()


def exceeded(config: pytest.Config, expected_s: float) -> str | None:
    """Return why an experiment that takes *expected_s* does not start any more; None if it may."""
    budget = Settings.from_config(config).time_budget
    if budget is None:
        return None
    left = config.stash[_BEGAN] + budget - time.monotonic()
    if expected_s <= left:
        return None
    takes = f"it takes about {duration_text(expected_s)}, and " if expected_s else ""
    return f"time budget of {duration_text(budget)}: {takes}{duration_text(max(0.0, left))} are left"
