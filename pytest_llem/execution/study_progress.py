"""Show how far a study is while its experiments run on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pytest_llem._plugin.node_ids import file_of, is_reference
from pytest_llem._plugin.stash import STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, run_of
from pytest_llem.execution.live_line import live_line
from pytest_llem.execution.live_progress import LiveProgress, StudyPosition
from pytest_llem.execution.plans import make_forecast
from pytest_llem.planning.forecast import Forecast
from pytest_llem.study.design import Experiment
from pytest_llem.study.identity import CYCLE, value_text


class _StudyProgress:
    """Progress of one study in a session, its reference included.

    Args:
        items: The study's items in run order.
    """

    def __init__(self, items: list[pytest.Item]) -> None:
        self.count = len(items)
        self.began = time.monotonic()
        self._number = {item.nodeid: number for number, item in enumerate(items, 1)}
        self._forecast = _forecast(items)
        self._reached = 0  # number of the last item that has begun
        self._items = items

    def position(self, item: pytest.Item) -> StudyPosition:
        """Return the position of *item*. Earlier items no longer count as remaining, whatever their outcome."""
        number = self._number[item.nodeid]
        for one in self._items[self._reached : number - 1]:
            self._forecast.remove(_key(one))
        self._reached = max(self._reached, number)
        expected_s = self._forecast.seconds(_key(item))
        self._forecast.start(_key(item))
        experiment, reference = experiment_of(item), "reference " if is_reference(run_of(item)) else ""
        return StudyPosition(
            number=number,
            count=self.count,
            name=f"{reference}{experiment.id}",
            short=f"{reference}{_short(experiment)}",
            expected_s=expected_s,
            study_began=self.began,
            study_left_s=self._forecast.left(),
        )

    def record_duration(self, item: pytest.Item, seconds: float, *, completed: bool) -> None:
        """Record in the forecast that *item* has ended."""
        self._forecast.end(_key(item), seconds, completed=completed)


_STUDY_PROGRESS = pytest.StashKey[dict[str, _StudyProgress]]()


@contextmanager
def live_progress(item: pytest.Item) -> Iterator[LiveProgress | None]:
    """Show an experiment's progress while its devices are leased; yield None without a terminal."""
    with live_line(item.config) as line:
        if line is None:
            yield None
            return
        study = _study_progress(item)
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        progress = LiveProgress(line, study.position(item), colours=bool(reporter and reporter.hasmarkup))
        try:
            yield progress
        finally:
            if progress.completed is not None:
                study.record_duration(item, progress.elapsed_s, completed=progress.completed)


def _study_progress(item: pytest.Item) -> _StudyProgress:
    by_file, file = item.config.stash.setdefault(_STUDY_PROGRESS, {}), file_of(run_of(item))
    if file not in by_file:
        items = [one for one in item.session.items if is_experiment(one) and file_of(run_of(one)) == file]
        by_file[file] = _StudyProgress(items)
    return by_file[file]


def _forecast(items: list[pytest.Item]) -> Forecast:
    by_run: dict[str, list[Experiment]] = {}
    for item in items:
        by_run.setdefault(run_of(item), []).append(experiment_of(item))
    studies = items[0].config.stash[STUDIES]
    return make_forecast(items[0].config, studies, by_run)


def _key(item: pytest.Item) -> tuple[str, str]:
    return run_of(item), experiment_of(item).id


def _short(experiment: Experiment) -> str:
    """Return an experiment's id without the names of axes."""
    values = [value_text(value) for value in experiment.point.axes.values()]
    cycle = experiment.id.removeprefix(experiment.point.id).rpartition("=")[2]
    return ", ".join([*values, *([f"{CYCLE} {cycle}"] if cycle else [])]) or experiment.id
