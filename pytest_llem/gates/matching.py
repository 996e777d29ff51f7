"""Matching of the points of two results, and of their cycles, and detection of shared measurements."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.pair_log_ratio import pair_log_ratio, process_share
from pytest_llem.results.points import CycleTurns, PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.identity import axes_key


@dataclass(frozen=True)
class Pair:
    """A point and its counterpart in the reference, which is None if the reference does not have the point."""

    candidate: PointResult
    reference: PointResult | None


def pairs(candidates: Iterable[PointResult], reference: StudyResult) -> list[Pair]:
    """Return each of *candidates* with its counterpart in *reference*."""
    known = {axes_key(point.axes): point for point in reference.points}
    return [Pair(point, known.get(axes_key(point.axes))) for point in candidates]


def missing_points(study_axes: Iterable[Mapping[str, Any]], reference: StudyResult) -> list[PointResult]:
    """Return the measured points of *reference* that are no longer in a study.

    Args:
        study_axes: Axes of each of the study's points, selected or not.
        reference: The result that the study is compared with.
    """
    known = {axes_key(axes) for axes in study_axes}
    return [point for point in reference.points if is_measured(point) and axes_key(point.axes) not in known]


def is_measured(point: PointResult) -> bool:
    """Whether any metric of *point* has a value."""
    return any(summary.n for summary in point.metrics.values())


def named(ids: Sequence[str]) -> str:
    """Return *ids* as text: ``precision=bf16 and 2 more``."""
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"


_WHAT_TO_DO = "measure one of the two again"


def shared_cycles_problem(candidate: PointResult, reference: PointResult) -> str | None:
    """Return an error message if two points share measurements; None if no shared measurement is known.

    Results of schema 1.3 and older have no digests, so that shared measurements are not detected.
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


def same_session_problem(candidate: StudyResult, reference: StudyResult) -> str | None:
    """Return an error message if two results are of one run, such as a baseline and the run it was saved from.

    None if they are not. Also None if both have digests, which :func:`shared_cycles_problem` uses: it is more
    precise.
    """
    if _digests(candidate) and _digests(reference):
        return None
    started_at = candidate.started_at
    runs = {(result.name, result.study_design_hash, result.started_at) for result in (candidate, reference)}
    if started_at is None or len(runs) > 1:
        return None
    return f"not independent: both are results of the run that began at {started_at}; {_WHAT_TO_DO}"


def shared_experiments_problem(candidate: StudyResult, reference: StudyResult) -> str | None:
    """Return an error message if two results share experiments; None if no shared experiment is known."""
    if shared := _digests(candidate) & _digests(reference):
        experiments = "1 experiment" if len(shared) == 1 else f"{len(shared)} experiments"
        return f"not independent: both have the same measurement of {experiments}; {_WHAT_TO_DO}"
    if candidate == reference:
        return f"not independent: both are the same result; {_WHAT_TO_DO}"
    return same_session_problem(candidate, reference)


def _digests(result: StudyResult) -> set[str]:
    entries = {entry.result_sha256 for entry in result.experiments if entry.result_sha256}
    return entries | {digest for point in result.points for digest in point.result_digests}


def values_by_cycle(point: PointResult, metric: str) -> dict[int, float]:
    """Return the existing values of *metric* by cycle; empty if the point has none."""
    summary = point.summary_of(metric)
    if not summary.n:
        return {}
    return {cycle: value for cycle, value in zip(point.cycles, summary.values, strict=True) if value is not None}


def in_pairs(
    candidate: PointResult,
    reference: PointResult,
    metric: str,
    values: Mapping[int, float],
    reference_values: Mapping[int, float],
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the values of cycles that belong together, by cycle.

    For a cycle that was measured alternately, the candidate's value is the reference's value × the ratio of
    neighbouring turns. A cycle of which one side was measured again, alone, is left out.

    Args:
        candidate: The candidate's point.
        reference: The reference's point.
        metric: Name of the metric.
        values: The metric's values of the candidate, by cycle.
        reference_values: Those of the reference.
    """
    turns, reference_turns = _turns_by_cycle(candidate), _turns_by_cycle(reference)
    found, reference_found = {}, {}
    for cycle in sorted(values.keys() & reference_values.keys()):
        one, other = turns.get(cycle), reference_turns.get(cycle)
        if (one and one.pair) != (other and other.pair):
            continue
        found[cycle], reference_found[cycle] = values[cycle], reference_values[cycle]
        if one is not None and other is not None:
            with suppress(UndecidableError):  # a metric of the cycle alone, or one that is 0 in a turn
                log_ratio = pair_log_ratio(one.metrics.get(metric, ()), other.metrics.get(metric, ()))
                found[cycle] = reference_values[cycle] * math.exp(log_ratio)
    return found, reference_found


def share_of_processes(
    candidate: PointResult, reference: PointResult, metric: str, cycles: Collection[int]
) -> float | None:
    """Return the share of the variance between pairs of *cycles* that turns do not explain; None if unknown."""
    own, others = _turns_by_cycle(candidate), _turns_by_cycle(reference)
    sides = [(own[one], others[one]) for one in cycles if one in own and one in others]
    with suppress(UndecidableError):
        return process_share(
            [(one.metrics.get(metric, ()), other.metrics.get(metric, ())) for one, other in sides]
        )
    return None


def _turns_by_cycle(point: PointResult) -> dict[int, CycleTurns]:
    return {one.cycle: one for one in point.turns}
