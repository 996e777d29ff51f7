"""What there is to judge of one metric of one point, or why there is nothing."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.differences import BenchDifferences, bench_differences, too_few_ticks
from pytest_llem.gates.matching import Pair
from pytest_llem.gates.statistics import Question, UndecidableError, contrast
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.gates import GatesConfig

ALLOW_ESTIMATED = "with energy: {allow_estimated: true} in the study it may decide"

_NEW = "new: not in the reference"
_ESTIMATED = f"energy is estimated, not measured: {ALLOW_ESTIMATED}"


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
    candidate, reference = pair.candidate, pair.reference
    if reference is None:
        return Case(pair, metric, obstacle=_NEW, excused=True)
    excusable = settings.metrics is None
    better = CATALOGUE[metric].better
    if better is None:
        return Case(pair, metric, obstacle="neither way of it is better, so that it cannot get worse")
    here, there = candidate.metrics.get(metric), reference.metrics.get(metric)
    allowed = bool(candidate.config.get("energy", {}).get("allow_estimated"))
    usable = [
        summary is not None and summary.mean is not None and (allowed or summary.method != "estimated")
        for summary in (here, there)
    ]
    excused = excusable and not any(usable)
    for summary, where in ((here, "here"), (there, "in the reference")):
        if summary is None or summary.mean is None:
            reason = f": {summary.reason}" if summary is not None and summary.reason else ""
            return Case(pair, metric, obstacle=f"no value {where}{reason}", excused=excused)
    assert here is not None
    assert there is not None
    if not any(usable):
        return Case(pair, metric, obstacle=_ESTIMATED, excused=excused)
    for point, summary, what in ((candidate, here, "this result"), (reference, there, "the reference")):
        if not summary.values or len(summary.values) != len(point.cycles):
            too_old = f"{what} was written by a version that kept no cycle values; measure it again"
            return Case(pair, metric, obstacle=too_old)
    bench = bench_differences(candidate, reference, metric)
    obstacle: str | None
    if bench.stops and not anyway:
        obstacle = f"cannot be compared: {'; '.join(bench.stops)} (--llem-compare-anyway compares all the same)"
    elif not all(usable):
        obstacle = _ESTIMATED
    else:
        obstacle = too_few_ticks(candidate, metric) or too_few_ticks(reference, metric)
    if obstacle is not None:
        return Case(pair, metric, obstacle=obstacle, bench=bench)
    ours, theirs = _by_cycle(candidate, here), _by_cycle(reference, there)
    few = min(len(ours), len(theirs), len(ours.keys() & theirs.keys()) if paired else len(ours)) < 2
    try:
        asked = contrast(ours, theirs, paired=paired)
    except UndecidableError as error:
        return Case(pair, metric, obstacle=str(error), excused=excusable, few=few, bench=bench)
    return Case(pair, metric, Question(asked, better, settings.delta_of(metric)), bench=bench)


def _by_cycle(point: PointResult, summary: Summary) -> dict[int, float]:
    """Return the values of a metric by cycle, those that there are."""
    return {cycle: value for cycle, value in zip(point.cycles, summary.values, strict=True) if value is not None}
