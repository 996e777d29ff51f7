"""What there is to judge of one metric of one point, or why there is nothing."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.differences import BenchDifferences, bench_differences
from pytest_llem.gates.matching import Pair
from pytest_llem.gates.obstacles import ESTIMATED, allows_estimates, measuring_obstacle, names_boundary
from pytest_llem.gates.statistics import Question, UndecidableError, contrast
from pytest_llem.results.models import PointResult
from pytest_llem.study.gates import GatesConfig

_NEW = "new: not in the reference"


@dataclass(frozen=True)
class Case:
    """One metric of a point and its counterpart, before it is judged.

    Attributes:
        pair: The points.
        metric: The metric.
        question: What is to be decided; None where nothing can be.
        obstacle: Then, why.
        excused: That nothing can be decided is no failure.
        few: There are too few cycles, and otherwise no obstacle.
        bench: Bench facts that differ; None where it did not come to that.
    """

    pair: Pair
    metric: str
    question: Question | None = None
    obstacle: str | None = None
    excused: bool = False
    few: bool = False
    bench: BenchDifferences | None = None


def make_case(pair: Pair, metric: str, settings: GatesConfig, *, paired: bool, anyway: bool) -> Case:
    """Return what there is to judge.

    Args:
        pair: A point, and the same in the reference.
        metric: By its name in the catalogue.
        settings: What the study says of its gates.
        paired: The cycles of one number belong together.
        anyway: Also where bench facts differ.
    """
    here, there = pair.candidate, pair.reference
    if there is None:
        return Case(pair, metric, obstacle=_NEW, excused=True)
    better = CATALOGUE[metric].better
    if better is None:
        return Case(pair, metric, obstacle="neither way of it is better, so that it cannot get worse")
    by_default = settings.metrics is None
    usable = [_is_usable(side, metric, estimates=allows_estimates(here)) for side in (here, there)]
    obstacle = _lack(here, metric, "here") or _lack(there, metric, "in the reference")
    if obstacle is None and not any(usable):
        obstacle = ESTIMATED
    if obstacle is not None:
        return Case(pair, metric, obstacle=obstacle, excused=by_default and not any(usable))
    obstacle = _age(here, metric, "this result") or _age(there, metric, "the reference")
    if obstacle is not None:
        return Case(pair, metric, obstacle=obstacle)
    bench = bench_differences(here, there, metric)
    named = names_boundary(here, metric)
    if bench.stops and not anyway:
        hint = "" if bench.bars else " (--llem-compare-anyway compares all the same)"
        obstacle = f"cannot be compared: {'; '.join(bench.stops)}{hint}"
    elif not all(usable):
        obstacle = ESTIMATED
    else:
        found = (measuring_obstacle(side, metric, any_boundary=named) for side in (here, there))
        obstacle = next(filter(None, found), None)
        if obstacle is None and bench.bars:
            obstacle = f"cannot be compared: {'; '.join(bench.bars)}"
    if obstacle is not None:
        return Case(pair, metric, obstacle=obstacle, bench=bench)
    ours, theirs = _by_cycle(here, metric), _by_cycle(there, metric)
    common = len(ours.keys() & theirs.keys()) if paired else min(len(ours), len(theirs))
    try:
        asked = contrast(ours, theirs, paired=paired)
    except UndecidableError as error:
        nobody = not any(value > 0 for side in (ours, theirs) for value in side.values())
        excused = by_default and nobody  # one that a side has lost is not
        return Case(pair, metric, obstacle=str(error), excused=excused, few=common < 2, bench=bench)
    return Case(pair, metric, Question(asked, better, settings.delta_of(metric)), bench=bench)


def _lack(point: PointResult, metric: str, where: str) -> str | None:
    """Return why there is no value; None where there is one."""
    summary = point.metrics.get(metric)
    if summary is not None and summary.mean is not None:
        return None
    return f"no value {where}" + (f": {summary.reason}" if summary is not None and summary.reason else "")


def _is_usable(point: PointResult, metric: str, *, estimates: bool) -> bool:
    """Whether there is a value that may decide."""
    return _lack(point, metric, "") is None and (estimates or point.metrics[metric].method != "estimated")


def _age(point: PointResult, metric: str, whose: str) -> str | None:
    """Return that the values of the cycles were not kept; None where they were."""
    if 0 < len(point.cycles) == len(point.metrics[metric].values):
        return None
    return f"{whose} was written by a version that kept no cycle values; measure it again"


def _by_cycle(point: PointResult, metric: str) -> dict[int, float]:
    """Return the values of a metric by cycle, those that there are."""
    values = zip(point.cycles, point.metrics[metric].values, strict=True)
    return {cycle: value for cycle, value in values if value is not None}
