"""Which points are best: in one metric, and in energy and throughput together.

Only like is held against like: energies of one method and one boundary. What was estimated is not cheaper than
what was measured, nor a CPU package cheaper than a GPU's board. Points are compared by their means, whatever the
intervals.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import groupby

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary

#: What the Pareto front is of: more of the first, less of the second.
SPEED, COST = "output_tokens_per_second", "energy_per_output_token_j"


def pareto_optimal(points: Sequence[PointResult]) -> set[int]:
    """Return the places of the points for which energy per output token and tokens per second are a fair deal.

    A point is Pareto-optimal where no other is better in one of the two and at least as good in the other. Equal
    ones are so together. A point that lacks either figure, or whose energy is like no other's, is not among them.

    Args:
        points: Of one study.
    """
    found: set[int] = set()
    for places in _alike(points, COST):
        known = [(_mean(points[place], SPEED), _mean(points[place], COST), place) for place in places]
        whole = [(-speed, cost, place) for speed, cost, place in known if speed is not None and cost is not None]
        if len(whole) < 2:
            continue
        cheapest = math.inf
        for _, equally_fast in groupby(sorted(whole), key=lambda one: one[0]):  # the fastest first
            group = list(equally_fast)
            least = group[0][1]
            if least < cheapest:
                cheapest = least
                found |= {place for _, cost, place in group if cost == least}
    return found


def best(points: Sequence[PointResult], metric: str) -> set[int]:
    """Return the places of the points that have the best mean of *metric*; of each kind of energy.

    None are best where neither way is better, where there is but one, and where all are equal.

    Args:
        points: Of one study.
        metric: By its name in the catalogue.
    """
    better = CATALOGUE[metric].better
    if better is None:
        return set()
    found: set[int] = set()
    for places in _alike(points, metric):
        known = [(mean, place) for place in places if (mean := _mean(points[place], metric)) is not None]
        if len({mean for mean, _ in known}) > 1:
            edge = (min if better == "lower" else max)(mean for mean, _ in known)
            found |= {place for mean, place in known if mean == edge}
    return found


def _alike(points: Sequence[PointResult], metric: str) -> list[list[int]]:
    """Return the places of points whose *metric* may be compared, a list for each kind. Some may be in none."""
    kinds: dict[Hashable, list[int]] = {}
    for place, point in enumerate(points):
        summary = point.metrics.get(metric)
        if summary is not None and summary.invalid is None and (kind := _kind(summary)) is not None:
            kinds.setdefault(kind, []).append(place)
    return list(kinds.values())


def _kind(summary: Summary) -> Hashable | None:
    """Return what two figures have to share to be compared; None where a figure's own cycles do not."""
    if summary.method is None:  # no energy
        return "any"
    return None if summary.boundary is None else (summary.method, summary.boundary)


def _mean(point: PointResult, metric: str) -> float | None:
    summary = point.metrics.get(metric)
    mean = None if summary is None else summary.mean
    return mean if mean is not None and math.isfinite(mean) else None
