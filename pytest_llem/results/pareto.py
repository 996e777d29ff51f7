"""Which points are best in one metric, and Pareto-optimal in energy and throughput.

Values are compared only between hosts of one kind, and energies only if they have the same method and the same
boundary: an estimate is not cheaper than a measurement, nor a CPU package than a GPU's board. A point is best only
if its 95 % interval does not overlap with those of the others. If they overlap, the points are tied; if no point
has an interval, none is best or tied. Values that no gate may judge are left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.points import PointResult, gpu_models
from pytest_llem.results.statistics import Summary

#: Metrics of the Pareto front: the first is to be high, the second low.
SPEED, COST = "output_tokens_per_second", "energy_per_output_token_j"


class Ranking(NamedTuple):
    """Indices of points.

    Attributes:
        first: Points that are best wherever the true values lie in the intervals of all points.
        tied: Points that may be best: no other point is better wherever the true values lie in the intervals.
    """

    first: set[int]
    tied: set[int]


class _Span(NamedTuple):
    """Interval of a value, with its sign changed if higher is better: ``low`` is the best possible value."""

    low: float
    high: float


def pareto_optimal(points: Sequence[PointResult]) -> Ranking:
    """Return the points that are Pareto-optimal in energy per output token and output tokens per second.

    A point is Pareto-optimal if no other is better in one of the two and at least as good in the other; equal
    points can both be. Points that miss one of the values, or whose energy is comparable with no other's, are
    left out.

    Args:
        points: Points of one study.
    """
    ranking = Ranking(set(), set())
    for places in _compared_groups(points):
        spans = [(_span(points[place], SPEED), _span(points[place], COST), place) for place in places]
        lows = [(speed.low, cost.low, place) for speed, cost, place in spans]
        highs = [(speed.high, cost.high, place) for speed, cost, place in spans]
        beatable, beaten = _dominated(lows, highs), _dominated(highs, lows)
        ranking.first.update(set(places) - beatable)
        ranking.tied.update(beatable - beaten)
    return ranking


def compared(points: Sequence[PointResult]) -> set[int]:
    """Return the indices of the points that :func:`pareto_optimal` does not leave out."""
    return {place for places in _compared_groups(points) for place in places}


def _compared_groups(points: Sequence[PointResult]) -> Iterator[list[int]]:
    for places in comparable(points, COST):
        with_both = [place for place in places if _mean(points[place], SPEED) is not None]
        if len(with_both) > 1 and _has_intervals(points, with_both, SPEED, COST):
            yield with_both


def best(points: Sequence[PointResult], metric: str) -> Ranking:
    """Return the points with the best value of *metric*, for each kind of host, method and boundary separately.

    No point is best if the metric has no better direction, if there is only one point, or if all are equal.

    Args:
        points: Points of one study.
        metric: Name of the metric in the catalogue.
    """
    ranking = Ranking(set(), set())
    if CATALOGUE[metric].better is None:
        return ranking
    for places in comparable(points, metric):
        if len(places) < 2 or not _has_intervals(points, places, metric):
            continue
        spans = {place: _span(points[place], metric) for place in places}
        lowest = sorted((span.low, place) for place, span in spans.items())[:2]
        least_high = min(span.high for span in spans.values())
        first = {
            place
            for place, span in spans.items()
            if span.high <= next(low for low, other in lowest if other != place)
        }
        if len(first) == len(spans):  # all are equal
            continue
        ranking.first.update(first)
        ranking.tied.update({place for place, span in spans.items() if span.low <= least_high} - first)
    return ranking


def _dominated(rivals: Iterable[tuple[float, float, int]], points: Iterable[tuple[float, float, int]]) -> set[int]:
    """Return the places of *points* that a rival with another place dominates.

    A rival dominates a point if neither of its values is worse and at least one is better. Both sequences hold two
    values, of which lower is better, and a place.
    """
    ordered = sorted(rivals)
    firsts = [first for first, _, _ in ordered]
    # For each number of rivals, those with the lowest second value: two, as one may have the point's own place.
    lowest: list[list[tuple[float, int]]] = [[]]
    for _, second, place in ordered:
        lowest.append(sorted([*lowest[-1], (second, place)])[:2])
    return {
        place
        for first, second, place in points
        if any(rival <= second and other != place for rival, other in lowest[bisect_left(firsts, first)])
        or any(rival < second and other != place for rival, other in lowest[bisect_right(firsts, first)])
    }


def comparable(points: Sequence[PointResult], metric: str) -> list[list[int]]:
    """Return groups of the indices of points whose *metric* is comparable. Some points may be in no group.

    Args:
        points: Points of one study.
        metric: Name of the metric in the catalogue.
    """
    kinds: dict[Hashable, list[int]] = {}
    for place, (point, host) in enumerate(zip(points, host_kinds(points), strict=True)):
        if _mean(point, metric) is None or (summary := point.metrics[metric]).invalid is not None:
            continue
        if (kind := _kind(summary)) is not None:
            kinds.setdefault((kind, host), []).append(place)
    return list(kinds.values())


def host_kinds(points: Sequence[PointResult]) -> list[str | None]:
    """Return the kind of host of each point: models of CPU and GPU, None for all if they ran on one kind."""
    cpus = [str(point.testbed.get("host_cpu") or point.testbed.get("cpu") or "") for point in points]
    gpus = [gpu_models(str(point.testbed["gpu"])) if "gpu" in point.testbed else None for point in points]
    if len(set(cpus)) == 1 and len({*gpus} - {None}) <= 1:
        return [None] * len(points)
    return [" with ".join(filter(None, kind)) for kind in zip(cpus, gpus, strict=True)]


def _kind(summary: Summary) -> Hashable | None:
    """Return what two values must have in common to be compared; None if the cycles of the value differ in it."""
    if summary.method is None:  # not an energy
        return "any"
    return None if summary.boundary is None else (summary.method, summary.boundary)


def _has_intervals(points: Sequence[PointResult], places: Sequence[int], *metrics: str) -> bool:
    """Whether any of the *points* at *places* has an interval of each of *metrics*."""
    return any(all(points[place].metrics[metric].ci95 for metric in metrics) for place in places)


def _span(point: PointResult, metric: str) -> _Span:
    """Return the interval of a value; from minus to plus infinity if it has none."""
    low, high = point.metrics[metric].ci95 or (-math.inf, math.inf)
    return _Span(low, high) if CATALOGUE[metric].better == "lower" else _Span(-high, -low)


def _mean(point: PointResult, metric: str) -> float | None:
    summary = point.summary_of(metric)
    mean = summary.mean if summary.not_judged is None else None
    return mean if mean is not None and math.isfinite(mean) else None
