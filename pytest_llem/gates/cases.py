"""The question that a regression gate decides for one metric of one point, or why it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.decisions import Look, Question, UndecidableError, contrast
from pytest_llem.gates.differences import TestbedDifferences, testbed_differences
from pytest_llem.gates.eligibility import (
    ESTIMATED,
    allows_estimates,
    contention_reason,
    ineligible_reason,
    judged_metric,
    replay_ineligible_reason,
)
from pytest_llem.gates.matching import (
    Pair,
    in_pairs,
    is_measured,
    share_of_processes,
    shared_cycles_problem,
    values_by_cycle,
)
from pytest_llem.gates.sequential import Schedule, paired_looks, unpaired_looks
from pytest_llem.results.points import PointResult
from pytest_llem.study.gates import GatesConfig

_NEW = "new: not in the reference"


@dataclass(frozen=True)
class Case:
    """One metric of a point and of its counterpart in the reference, before the gate is judged.

    Attributes:
        pair: The points.
        requested: The metric that the study compares, which is in the gate's id.
        metric: The metric that the gate judges.
        note: Why that is another metric; None if it is the requested one.
        question: What is to be decided; None if nothing can be.
        reason: Why nothing can be decided.
        skip_undecided: Whether the gate is skipped, instead of failing, if nothing can be decided.
        inconclusive: Whether only too few cycles, runs that are no repetitions, or contention prevent a decision.
        contended: Which side's cycles were contended, and by what; None if none was.
        testbed: Differences in testbed facts; None if they were not compared.
        process_share: Share of the variance between pairs that their turns do not explain; None if unknown.
    """

    pair: Pair
    requested: str
    metric: str
    note: str | None = None
    question: Question | None = None
    reason: str | None = None
    skip_undecided: bool = False
    inconclusive: bool = False
    contended: str | None = None
    testbed: TestbedDifferences | None = None
    process_share: float | None = None


def make_case(
    pair: Pair,
    requested: str,
    settings: GatesConfig,
    *,
    paired: bool,
    allow_mismatch: bool,
    not_judged: str | None = None,
    schedule: Schedule | None = None,
) -> Case:
    """Return what the gate has to decide about a pair of points, or the first reason why it cannot decide.

    Args:
        pair: A point and its counterpart in the reference.
        requested: The metric to compare. If the study names no metrics, another may be judged instead: see
            :func:`~pytest_llem.gates.eligibility.judged_metric`.
        settings: The study's settings of gates.
        paired: Whether cycles of the same number belong together.
        allow_mismatch: Whether to compare although testbed facts differ.
        not_judged: Why nothing of the pair may be compared, for example because the two results share
            measurements; None if it may.
        schedule: When the candidate's gates were judged, if its cycles ran until they were decided; else None.
    """
    candidate, reference = pair.candidate, pair.reference
    if reference is None:
        return Case(pair, requested, requested, reason=_NEW, skip_undecided=True)
    by_default = settings.metrics is None
    metric, note = judged_metric(requested, candidate, reference) if by_default else (requested, None)
    case = partial(Case, pair, requested, metric, note)
    if reason := not_judged or shared_cycles_problem(candidate, reference):
        return case(reason=reason)
    for point, side in ((candidate, "candidate"), (reference, "reference")):
        if (reason := point.summary_of(metric).not_judged) is not None:
            return case(reason=f"in the {side}: {reason}")
    better = CATALOGUE[metric].better
    if better is None:
        return case(reason="neither higher nor lower is better, so the metric cannot get worse")
    usable = [
        _is_usable(point, metric, allow_estimated=allows_estimates(candidate)) for point in (candidate, reference)
    ]
    reason = _missing_value(candidate, metric, "candidate") or _missing_value(reference, metric, "reference")
    if reason is None and not any(usable):
        reason = ESTIMATED
    if reason is not None:
        # Skip the gate if neither side can have a value. If only one side has none, that is a loss, and it fails.
        measured = is_measured(candidate) and is_measured(reference)
        return case(reason=reason, skip_undecided=by_default and measured and not any(usable))
    reason = replay_ineligible_reason(candidate) or replay_ineligible_reason(reference)
    reason = reason or _missing_cycle_values(candidate, metric, "candidate")
    reason = reason or _missing_cycle_values(reference, metric, "reference")
    if reason is not None:
        return case(reason=reason)
    testbed = testbed_differences(candidate, reference, metric)
    if testbed.blocking and not allow_mismatch:
        hint = (
            ""
            if testbed.binding
            else " (--llem-compare-mismatch, or llem compare --allow-mismatch, compares despite this)"
        )
        reason = f"cannot be compared: {'; '.join(testbed.blocking)}{hint}"
    elif not all(usable):
        reason = ESTIMATED
    else:
        found = (ineligible_reason(point, metric, candidate=candidate) for point in (candidate, reference))
        reason = next(filter(None, found), None)
        if reason is None and testbed.binding:
            reason = f"cannot be compared: {'; '.join(testbed.binding)}"
    if reason is not None:
        return case(reason=reason, testbed=testbed)
    if (reason := candidate.not_repeated or reference.not_repeated) is not None:
        return case(reason=reason, inconclusive=True, testbed=testbed)
    contended = _contended(candidate, reference, metric)
    if contended is not None and not paired:
        reason = f"{contended} (repeat the measurement on a machine where nothing else runs)"
        return case(reason=reason, inconclusive=True, contended=contended, testbed=testbed)
    values, reference_values = values_by_cycle(candidate, metric), values_by_cycle(reference, metric)
    if paired:
        values, reference_values = in_pairs(candidate, reference, metric, values, reference_values)
    n = min(len(values), len(reference_values))
    try:
        looks: tuple[Look, ...] = ()
        found_contrast = contrast(values, reference_values, paired=paired)
        if schedule is not None:
            looks = _looks(values, reference_values, schedule, paired=paired)
            found_contrast = looks[-1].contrast
    except UndecidableError as error:
        # Skip the gate if no value on either side is above 0. If only one side has none, it fails.
        none_positive = not any(value > 0 for side in (values, reference_values) for value in side.values())
        too_few = n < (2 if schedule is None else schedule.min_cycles)
        return case(
            reason=str(error), skip_undecided=by_default and none_positive, inconclusive=too_few, testbed=testbed
        )
    question = Question(found_contrast, better, settings.delta_of(requested), looks)
    share = share_of_processes(candidate, reference, metric, values) if paired else None
    return case(question=question, contended=contended, testbed=testbed, process_share=share)


def _looks(
    values: Mapping[int, float], reference_values: Mapping[int, float], schedule: Schedule, *, paired: bool
) -> tuple[Look, ...]:
    """Return the looks so far at values that are given by cycle."""
    in_order = [values[cycle] for cycle in sorted(values)]
    if not paired:
        return unpaired_looks(in_order, [*reference_values.values()], schedule)
    log_ratios = [math.log(values[cycle] / reference_values[cycle]) for cycle in sorted(values)]
    return paired_looks(log_ratios, schedule)


def _contended(candidate: PointResult, reference: PointResult, metric: str) -> str | None:
    """Return how the two sides were contended; None if neither was."""
    sides = {
        "in the candidate": contention_reason(candidate, metric),
        "in the reference": contention_reason(reference, metric),
    }
    return "; ".join(f"{side}, {text}" for side, text in sides.items() if text is not None) or None


def _missing_value(point: PointResult, metric: str, side: str) -> str | None:
    """Return why there is no value; None if there is one."""
    summary = point.summary_of(metric)
    if summary.mean is not None:
        return None
    return f"no value in the {side}" + (f": {summary.reason}" if summary.reason else "")


def _is_usable(point: PointResult, metric: str, *, allow_estimated: bool) -> bool:
    """Whether there is a value that the gate may judge."""
    if _missing_value(point, metric, "") is not None:
        return False
    return allow_estimated or point.metrics[metric].method != "estimated"


def _missing_cycle_values(point: PointResult, metric: str, side: str) -> str | None:
    """Return a message if the values of the cycles were not kept; None if they were."""
    if 0 < len(point.cycles) == len(point.metrics[metric].values):
        return None
    return f"the {side} was written by a version that kept no cycle values: measure it again"
