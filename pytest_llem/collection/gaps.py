"""The idle time before a study's item: before pytest times it, and before any limit on its time runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pytest_llem.collection.experiment import GAP, preflight_of, stopped
from pytest_llem.collection.items import StudyFile, experiment_of
from pytest_llem.isolation.gaps import Gaps
from pytest_llem.options import STUDIES
from pytest_llem.results.models import GapRecord
from pytest_llem.study.config import AUTO


@dataclass
class _Session:
    """What is remembered from item to item.

    Attributes:
        gaps: Waits.
        cycle: File and cycle of the experiment before; None before the first one.
    """

    gaps: Gaps = field(default_factory=Gaps)
    cycle: tuple[str, int] | None = None


_SESSION = pytest.StashKey[_Session]()


def wait_before(item: pytest.Item, *, is_last: bool) -> None:
    """Idle before *item* as its study says, and leave on the item what was done; others start at once.

    Args:
        item: Any item that is about to run.
        is_last: No other item follows in this process.
    """
    if not isinstance(item.parent, StudyFile) or _is_skipped(item):
        return
    studies = item.config.stash[STUDIES]
    file, experiment = item.parent.nodeid, experiment_of(item)
    if preflight_of(item.config, file, studies[file]).reason(experiment.point) is not None:
        return  # it fails without being started
    if stopped(item) is not None:
        return
    execution, cycle = studies[file].execution, (file, experiment.cycle)
    session = item.config.stash.setdefault(_SESSION, _Session())
    if session.cycle is None:
        # NVML is left alone where nothing would come of it.
        if not is_last and any(study.execution.experiment_gap_seconds == AUTO for study in studies.values()):
            session.gaps.note_first()
        item.stash[GAP] = GapRecord(seconds=0.0, reason="skipped", note="the first experiment of its session")
    else:
        at_least = execution.cycle_gap_seconds if cycle != session.cycle else 0.0
        item.stash[GAP] = session.gaps.wait(execution.experiment_gap_seconds, at_least)
    session.cycle = cycle


def _is_skipped(item: pytest.Item) -> bool:
    """Whether *item* is marked to be skipped. A condition that pytest has yet to evaluate is not."""
    conditions = (one for mark in item.iter_markers("skipif") for one in mark.args)
    return item.get_closest_marker("skip") is not None or any(one is True for one in conditions)
