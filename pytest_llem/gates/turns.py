"""Compare the two sides of a cycle that were measured in turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pytest_llem.results.models import CycleTurns, PointResult


def pair_log_ratio(candidate: Sequence[float], reference: Sequence[float]) -> float:
    """Return the location of the logarithms of the ratios of neighbouring turns."""
    return fmean(math.log(one / other) for one, other in zip(candidate, reference, strict=True))


def in_pairs(
    candidate: PointResult,
    reference: PointResult,
    metric: str,
    values: Mapping[int, float],
    reference_values: Mapping[int, float],
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the values of cycles that belong together, by cycle.

    The ratio of a cycle that was measured in turns is that of neighbouring turns. Its candidate's value is the one
    that has this ratio to the reference's. A cycle of which one side was measured again, alone, is left out.

    Args:
        candidate: The candidate's point.
        reference: The reference's point.
        metric: Name of the metric.
        values: The metric's values of the candidate, by cycle.
        reference_values: Those of the reference.
    """
    turns, reference_turns = _by_cycle(candidate), _by_cycle(reference)
    found, reference_found = {}, {}
    for cycle in sorted(values.keys() & reference_values.keys()):
        one, other = turns.get(cycle), reference_turns.get(cycle)
        if (one and one.pair) != (other and other.pair):
            continue
        found[cycle], reference_found[cycle] = values[cycle], reference_values[cycle]
        if one is not None and other is not None:
            sides = one.metrics.get(metric, ()), other.metrics.get(metric, ())
            if len(sides[0]) == len(sides[1]) > 0 and min(*sides[0], *sides[1]) > 0:
                found[cycle] = reference_values[cycle] * math.exp(pair_log_ratio(*sides))
    return found, reference_found


def _by_cycle(point: PointResult) -> dict[int, CycleTurns]:
    return {one.cycle: one for one in point.turns}
