"""What there is to judge of one metric of one point, or why there is nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.differences import TestbedDifferences, testbed_differences
from pytest_llem.gates.eligibility import (
    ESTIMATED,
    allows_estimates,
    contention,
    ineligible_reason,
    judged_metric,
    names_boundary,
    replay_ineligible_reason,
)
from pytest_llem.gates.matching import Pair, is_measured, shared_cycles
from pytest_llem.gates.statistics import Question, UndecidableError, contrast
from pytest_llem.results.models import PointResult
from pytest_llem.study.gates import GatesConfig

_NEW = "new: not in the reference"


@dataclass(frozen=True)
class Case:
    """One metric of a point and its counterpart, before it is judged.

    Attributes:
        pair: The points.
        gate: The metric that the gate is called after.
        metric: The metric that it judges.
        note: Why that is another one.
        question: What is to be decided; None where nothing can be.
        obstacle: Then, why.
        excused: That nothing can be decided is no failure.
        inconclusive: There are too few cycles, or a side was contended, and there is otherwise no obstacle.
        contended: How the two sides were contended; None where neither was.
        testbed: Testbed facts that differ; None where it did not come to that.
    """

    pair: Pair
    gate: str
    metric: str
    note: str | None = None
    question: Question | None = None
    obstacle: str | None = None
    excused: bool = False
    inconclusive: bool = False
    contended: str | None = None
    testbed: TestbedDifferences | None = None


def make_case(
    pair: Pair, gate: str, settings: GatesConfig, *, paired: bool, anyway: bool, dependent: str | None = None
) -> Case:
    """Return what there is to judge.

    Args:
        pair: A point, and the same in the reference.
        gate: The metric that the gate is called after. Of the default ones, those per token are judged per request
            where answers differ in length.
        settings: What the study says of its gates.
        paired: The cycles of one number belong together.
        anyway: Also where testbed facts differ.
        dependent: Why nothing of the pair may be compared, as where the two results were not measured apart.
    """
    here, there = pair.candidate, pair.reference
    if there is None:
        return Case(pair, gate, gate, obstacle=_NEW, excused=True)
    by_default = settings.metrics is None
    metric, note = judged_metric(gate, here, there) if by_default else (gate, None)
    case = partial(Case, pair, gate, metric, note)
    if dependent := dependent or shared_cycles(here, there):
        return case(obstacle=dependent)
    for side, where in ((here, "here"), (there, "in the reference")):
        summary = side.metrics.get(metric)
        if summary is not None and summary.not_judged is not None:
            return case(obstacle=f"{where}: {summary.not_judged}")
    better = CATALOGUE[metric].better
    if better is None:
        return case(obstacle="neither way of it is better, so that it cannot get worse")
    usable = [_is_usable(side, metric, estimates=allows_estimates(here)) for side in (here, there)]
    obstacle = _lack(here, metric, "here") or _lack(there, metric, "in the reference")
    if obstacle is None and not any(usable):
        obstacle = ESTIMATED
    if obstacle is not None:
        # Left out is what neither side can have: not what a side has lost, and not a point that was not measured.
        measured = is_measured(here) and is_measured(there)
        return case(obstacle=obstacle, excused=by_default and measured and not any(usable))
    if (obstacle := replay_ineligible_reason(here) or replay_ineligible_reason(there)) is not None:
        return case(obstacle=obstacle)
    obstacle = _age(here, metric, "this result") or _age(there, metric, "the reference")
    if obstacle is not None:
        return case(obstacle=obstacle)
    testbed = testbed_differences(here, there, metric)
    named = names_boundary(here, metric)
    if testbed.stops and not anyway:
        hint = "" if testbed.bars else " (--llem-compare-mismatch compares all the same)"
        obstacle = f"cannot be compared: {'; '.join(testbed.stops)}{hint}"
    elif not all(usable):
        obstacle = ESTIMATED
    else:
        found = (ineligible_reason(side, metric, any_boundary=named) for side in (here, there))
        obstacle = next(filter(None, found), None)
        if obstacle is None and testbed.bars:
            obstacle = f"cannot be compared: {'; '.join(testbed.bars)}"
    if obstacle is not None:
        return case(obstacle=obstacle, testbed=testbed)
    contended = _contended(here, there, metric)
    if contended is not None and not paired:
        obstacle = f"{contended} (repeat the measurement on a machine where nothing else runs)"
        return case(obstacle=obstacle, inconclusive=True, contended=contended, testbed=testbed)
    ours, theirs = _by_cycle(here, metric), _by_cycle(there, metric)
    common = len(ours.keys() & theirs.keys()) if paired else min(len(ours), len(theirs))
    try:
        asked = contrast(ours, theirs, paired=paired)
    except UndecidableError as error:
        nobody = not any(value > 0 for side in (ours, theirs) for value in side.values())
        excused = by_default and nobody  # one that a side has lost is not
        return case(obstacle=str(error), excused=excused, inconclusive=common < 2, testbed=testbed)
    question = Question(asked, better, settings.delta_of(gate))
    return case(question=question, contended=contended, testbed=testbed)


def _contended(here: PointResult, there: PointResult, metric: str) -> str | None:
    """Return how the two sides were contended; None where neither was."""
    sides = {"here": contention(here, metric), "in the reference": contention(there, metric)}
    return "; ".join(f"{where}, {said}" for where, said in sides.items() if said is not None) or None


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
