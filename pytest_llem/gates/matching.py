"""Which points of two results are the same: those whose axes have the same values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.models import PointResult, StudyResult
from pytest_llem.study.identity import axes_key


@dataclass(frozen=True)
class Pair:
    """A point, and the same in the reference; None where that lacks it."""

    candidate: PointResult
    reference: PointResult | None


def pairs(candidates: Iterable[PointResult], reference: StudyResult) -> list[Pair]:
    """Return each of *candidates* with its counterpart in *reference*."""
    known = {axes_key(point.axes): point for point in reference.points}
    return [Pair(point, known.get(axes_key(point.axes))) for point in candidates]


def missing_points(study_axes: Iterable[Mapping[str, Any]], reference: StudyResult) -> list[PointResult]:
    """Return the points that *reference* has measured and a study does not have any more.

    Args:
        study_axes: The axes of each of the study's points, run or not.
        reference: What it is compared with.
    """
    known = {axes_key(axes) for axes in study_axes}
    return [point for point in reference.points if is_measured(point) and axes_key(point.axes) not in known]


def is_measured(point: PointResult) -> bool:
    """Whether any cycle of *point* has a value of anything."""
    return any(summary.n for summary in point.metrics.values())


def named(ids: Sequence[str]) -> str:
    """Return ``precision=bf16 and 2 more``."""
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
