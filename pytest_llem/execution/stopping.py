"""Find out why an experiment is not started any more."""

from __future__ import annotations

import time

import pytest

from pytest_llem._plugin.node_ids import file_of
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import DECIDED, STOPPED, SharedState
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import experiment_of, run_of, study_of_item
from pytest_llem.execution.jobs import preflight_of_item
from pytest_llem.planning.estimate import duration_text
from pytest_llem.planning.forecast import expected
from pytest_llem.study.design import Experiment

#: Start of the time budget, on the monotonic clock in s.
_BEGAN = pytest.StashKey[float]()


def begin_time_budget(config: pytest.Config) -> None:
    """Start the time budget, in each process of the session."""
    elapsed = getattr(config, "workerinput", {}).get("llem_elapsed", 0.0)
    config.stash[_BEGAN] = time.monotonic() - elapsed


def elapsed_seconds(config: pytest.Config) -> float:
    """Return how much of the time budget has passed, for a worker that starts now; in s."""
    return time.monotonic() - config.stash[_BEGAN] if _BEGAN in config.stash else 0.0


def not_needed_reason(shared_state: SharedState, run: str, experiment: Experiment) -> str | None:
    """Return why *experiment* is not needed: its study was stopped, or its point has enough cycles; else None."""
    reason: str | None = shared_state.read(run, STOPPED)
    if reason is None:
        decided = shared_state.read(file_of(run), f"{DECIDED}-{experiment.point.config_hash}")
        if decided is not None:
            cycles, why = decided
            reason = str(why) if experiment.cycle > cycles else None
    return reason


def not_started_reason(item: pytest.Item) -> str | None:
    """Return why *item*'s experiment does not start any more: it is not needed, or time is up; None if it may."""
    run, experiment = run_of(item), experiment_of(item)
    if (reason := not_needed_reason(item.config.stash[SHARED_STATE], run, experiment)) is not None:
        return reason
    budget = Settings.from_config(item.config).time_budget
    if budget is None:
        return None
    known = expected(experiment.point, study_of_item(item), preflight_of_item(item))
    each, left = 0.0 if known is None else known.each, item.config.stash[_BEGAN] + budget - time.monotonic()
    if each <= left:
        return None
    takes = f"it takes about {duration_text(each)}, and " if each else ""
    return f"time budget of {duration_text(budget)}: {takes}{duration_text(max(0.0, left))} are left"
