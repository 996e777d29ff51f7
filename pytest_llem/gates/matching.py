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


_WHAT_TO_DO = "measure one of the two again"


def shared_cycles(candidate: PointResult, reference: PointResult) -> str | None:
    """Return that two points share measurements, and what to do; None where they do not, as far as is known.

    Results before schema 1.4 hold no digests, so that nothing is known of them.
    """
    known = set(reference.result_digests)
    shared = [
        str(cycle)
        for cycle, digest in zip(candidate.cycles, candidate.result_digests, strict=False)
        if digest in known
    ]
    if not shared:
        return None
    return f"not independent: the reference has the same measurement of cycle {', '.join(shared)}; {_WHAT_TO_DO}"


def same_session(candidate: StudyResult, reference: StudyResult) -> str | None:
    """Return that two results are of one session, such as a baseline and what it was saved from, and what to do.

    None where they are not, and where digests tell more.
    """
    if _digests(candidate) and _digests(reference):
        return None
    began = candidate.started_at
    one, other = ((it.name, it.study_design_hash, it.started_at) for it in (candidate, reference))
    if began is None or one != other:
        return None
    return f"not independent: both are results of the session that began at {began}; {_WHAT_TO_DO}"


def shared_experiments(candidate: StudyResult, reference: StudyResult) -> str | None:
    """Return that two results have experiments in common, and what to do; None where not, as far as is known."""
    ours = _digests(candidate)
    if shared := ours & _digests(reference):
        return f"not independent: both have the same measurement of {len(shared)} experiments; {_WHAT_TO_DO}"
    if candidate == reference:
        return f"not independent: both are the same result; {_WHAT_TO_DO}"
    return same_session(candidate, reference)


def _digests(result: StudyResult) -> set[str]:
    entries = {entry.result_sha256 for entry in result.experiments if entry.result_sha256}
    return entries | {digest for point in result.points for digest in point.result_digests}
