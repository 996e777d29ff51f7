"""Which points are best: in one metric, and in energy and throughput together.

Only like is compared with like: energies of one method and one boundary. What was estimated is not cheaper than
what was measured, nor a CPU package cheaper than a GPU's board. A point is best only where its 95 % interval is
apart from those of the others; where they overlap the points are tied, and where no point has an interval none is
either. A value that must not be judged takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import NamedTuple

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary

#: What the Pareto front is of: more of the first, less of the second.
SPEED, COST = "output_tokens_per_second", "energy_per_output_token_j"


class Ranking(NamedTuple):
    """Places of points.

    Attributes:
        first: Those that are best, whatever values their intervals and the others' stand for.
        tied: Those that may be best: no other is certainly better.
    """

    first: set[int]
    tied: set[int]


class _Span(NamedTuple):
    """Where a value lies, turned so that less is better: from ``low``, the best that it may be, to ``high``."""

    low: float
    high: float


def pareto_optimal(points: Sequence[PointResult]) -> Ranking:
    """Return the places of the points for which energy per output token and tokens per second are a fair deal.

    A point is Pareto-optimal where no other is better in one of the two and at least as good in the other. Equal
    ones are so together. A point that lacks either figure, or whose energy is like no other's, is not among them.

    Args:
        points: Of one study.
    """
    ranking = Ranking(set(), set())
    for places in _alike(points, COST):
        whole = [place for place in places if _mean(points[place], SPEED) is not None]
        if len(whole) < 2 or not _has_intervals(points, whole, SPEED, COST):
            continue
        spans = [(_span(points[place], SPEED), _span(points[place], COST), place) for place in whole]
        lows = [(speed.low, cost.low, place) for speed, cost, place in spans]
        highs = [(speed.high, cost.high, place) for speed, cost, place in spans]
        beatable, beaten = _dominated(lows, highs), _dominated(highs, lows)
        ranking.first.update(set(whole) - beatable)
        ranking.tied.update(beatable - beaten)
    return ranking


def best(points: Sequence[PointResult], metric: str) -> Ranking:
    """Return the places of the points that have the best value of *metric*; of each kind of energy.

    None are best where neither way is better, where there is but one, and where all are equal.

    Args:
        points: Of one study.
        metric: By its name in the catalogue.
    """
    ranking = Ranking(set(), set())
    if CATALOGUE[metric].better is None:
        return ranking
    for places in _alike(points, metric):
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


def _dominated(rivals: Sequence[tuple[float, float, int]], points: Sequence[tuple[float, float, int]]) -> set[int]:
    """Return which of *points* some other one of *rivals* is no worse than in both and better in one.

    Both are pairs of values of which less is better, with a place. In O(n log n).
    """
    found: set[int] = set()
    ordered = sorted(rivals)
    at = 0
    # Of the rivals that are better in the first, and of those that are no worse: the two that are least in the
    # other, as one of them may be the point itself.
    better: list[tuple[float, int]] = []
    equal: list[tuple[float, int]] = []
    reached = -math.inf
    for first, second, place in sorted(points):
        if first > reached:
            better, equal, reached = sorted(chain(better, equal))[:2], [], first
        while at < len(ordered) and ordered[at][0] <= first:
            value, other, rival = ordered[at]
            if value < first:
                better = sorted([*better, (other, rival)])[:2]
            else:
                equal = sorted([*equal, (other, rival)])[:2]
            at += 1
        if any(rival != place and other <= second for other, rival in better) or any(
            rival != place and other < second for other, rival in equal
        ):
            found.add(place)
    return found


def _alike(points: Sequence[PointResult], metric: str) -> list[list[int]]:
    """Return the places of points whose *metric* may be compared, a list for each kind. Some may be in none."""
    kinds: dict[Hashable, list[int]] = {}
    for place, point in enumerate(points):
        if _mean(point, metric) is None or (summary := point.metrics[metric]).invalid is not None:
            continue
        if (kind := _kind(summary)) is not None:
            kinds.setdefault(kind, []).append(place)
    return list(kinds.values())


def _kind(summary: Summary) -> Hashable | None:
    """Return what two figures have to share to be compared; None where a figure's own cycles do not."""
    if summary.method is None:  # no energy
        return "any"
    return None if summary.boundary is None else (summary.method, summary.boundary)


def _has_intervals(points: Sequence[PointResult], places: Sequence[int], *metrics: str) -> bool:
    """Whether any point has an interval."""
    return any(all(points[place].metrics[metric].ci95 for metric in metrics) for place in places)


def _span(point: PointResult, metric: str) -> _Span:
    """Return where a value lies; anywhere, where it has no interval."""
    low, high = point.metrics[metric].ci95 or (-math.inf, math.inf)
    return _Span(low, high) if CATALOGUE[metric].better == "lower" else _Span(-high, -low)


def _mean(point: PointResult, metric: str) -> float | None:
    summary = point.metrics.get(metric)
    mean = None if summary is None or summary.not_judged is not None else summary.mean
    return mean if mean is not None and math.isfinite(mean) else None
