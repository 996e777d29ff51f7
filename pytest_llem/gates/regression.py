"""Compare a study's metrics with a reference, and return the verdict of each regression gate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.associations import associations
from pytest_llem.gates.cases import Case, make_case
from pytest_llem.gates.decisions import MAX_CYCLES, Decision, decide
from pytest_llem.gates.differences import over_points, same_sut, sut_differences
from pytest_llem.gates.eligibility import unknown_contention_reason, workload_differences
from pytest_llem.gates.matching import missing_points, pairs, same_session_problem
from pytest_llem.gates.sequential import Schedule
from pytest_llem.results.metrics import METHODS
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.verdicts import ComparisonRecord, GateVerdict, Outcome, Verdict
from pytest_llem.study.gates import GatesConfig

FailOn = Literal["regression", "inconclusive"]

#: The outcome of a gate's item by verdict. For the other verdicts it depends on ``fail_on`` and on the case.
_OUTCOMES: dict[Verdict, Outcome] = {"REGRESSION": "failed", "SAME": "passed", "IMPROVEMENT": "passed"}


_SAME_SUT = (
    "candidate and reference ran the same code, packages, weights and settings, so that no change can be found: "
    "does the engine import what has changed, and is it installed in the reference's environment?"
)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        record: What was compared, and how candidate and reference differ in facts, workload and points.
        verdicts: A verdict on each metric of each point, in the study's order, then one on each missing point.
    """

    record: ComparisonRecord
    verdicts: list[GateVerdict]


def compare(
    candidate: StudyResult,
    reference: StudyResult,
    settings: GatesConfig,
    *,
    name: str,
    paired: bool = False,
    allow_mismatch: bool = False,
    fail_on: FailOn = "regression",
    points: Collection[str] | None = None,
    not_judged: Mapping[str, str] = MappingProxyType({}),
) -> Comparison:
    """Compare a study's result with a reference, point by point and metric by metric.

    A point of the reference that is no longer in the study fails, even if it is not among *points*. A point that
    the reference does not have is skipped. A gate that cannot be judged fails, with one exception: if the study
    names no metrics, a default metric is skipped if the values of both sides are missing, not above 0, or
    estimates that may not be judged.

    Args:
        candidate: The result to judge.
        reference: The result to compare *candidate* with.
        settings: Metrics, alpha and delta.
        name: Name of the reference.
        paired: Whether candidate and reference were interleaved, so that cycles of the same number form a pair.
        allow_mismatch: Whether to compare although testbed facts differ.
        fail_on: ``regression``: only REGRESSION fails, and INCONCLUSIVE is skipped. ``inconclusive``: both fail.
        points: Ids of the candidate's points to judge; None for all.
        not_judged: Why no gate may judge a point, by the point's id.

    Example:
        >>> compare(StudyResult.load("after"), StudyResult.load("before"), GatesConfig(), name="before").verdicts
    """
    chosen = [point for point in candidate.points if points is None or point.id in points]
    matched = pairs(chosen, reference)
    not_independent, schedule = same_session_problem(candidate, reference), schedule_of(candidate)
    cases = [
        make_case(
            pair,
            requested,
            settings,
            paired=paired,
            allow_mismatch=allow_mismatch,
            not_judged=not_independent or not_judged.get(pair.candidate.id),
            schedule=schedule,
        )
        for pair in matched
        for requested in settings.family_of(pair.candidate.config.get("load"))
    ]
    questions = [case.question for case in cases if case.question is not None]
    pending = sum(_is_pending(case, schedule, paired=paired) for case in cases) if schedule is not None else 0
    decisions = iter(decide(questions, settings.alpha, pending=pending))
    verdicts = [
        _verdict(case, next(decisions) if case.question is not None else None, settings.alpha, fail_on)
        for case in cases
    ]
    missing = missing_points([point.axes for point in candidate.points], reference)
    verdicts += [_verdict_on_missing(point) for point in missing]
    measured = [
        (pair.candidate, pair.reference)
        for pair in matched
        if pair.reference is not None and pair.candidate.cycles and pair.reference.cycles
    ]
    testbeds = [(case.pair.candidate.id, case.testbed) for case in cases if case.testbed is not None]
    contended = [
        (case.pair.candidate.id, [f"judged though contended, since both sides were interleaved: {case.contended}"])
        for case in cases
        if case.contended and case.question
    ]
    unknown = [
        (case.pair.candidate.id, [f"judged though contention is unknown {text}"])
        for case in cases
        if case.question and not paired and case.pair.reference is not None
        if (text := unknown_contention_reason(case.pair.candidate, case.pair.reference, case.metric)) is not None
    ]
    unchanged = [(point.id, [_SAME_SUT]) for point, other in measured if paired and same_sut(point, other)]
    with_points = partial(over_points, points=len(measured))
    blocking = with_points((point, testbed.blocking) for point, testbed in testbeds)
    record = ComparisonRecord(
        reference=name,
        reference_version=reference.pytest_llem_version,
        reference_started_at=reference.started_at,
        paired=paired,
        alpha=settings.alpha,
        family=len(questions) + pending,
        testbed=blocking,
        compared_despite_mismatch=allow_mismatch and bool(blocking),
        warnings=[
            *with_points((point, testbed.warnings) for point, testbed in testbeds),
            *with_points(contended),
            *with_points(unknown),
            *with_points(unchanged),
        ],
        workload=with_points((point.id, workload_differences(point, other)) for point, other in measured),
        sut=with_points((point.id, sut_differences(point, other)) for point, other in measured),
        new_points=[pair.candidate.id for pair in matched if pair.reference is None],
        missing_points=[point.id for point in missing],
    )
    return Comparison(record, [verdict.model_copy(update={"paired": paired}) for verdict in verdicts])


def schedule_of(result: StudyResult) -> Schedule | None:
    """Return the schedule on which the gates of *result* were judged; None if its number of cycles was fixed."""
    protocol = result.measurement_protocol
    if protocol.get("n_cycles") != "auto":
        return None
    return Schedule(protocol["min_cycles"], protocol["max_cycles"])


def _is_pending(case: Case, schedule: Schedule, *, paired: bool) -> bool:
    """Return whether a gate has nothing to decide yet, and fewer cycles than its first look needs."""
    cycles = set(case.pair.candidate.cycles)
    if paired and case.pair.reference is not None:  # the cycles of a saved reference do not become more
        cycles &= set(case.pair.reference.cycles)
    return case.question is None and len(cycles) < schedule.min_cycles


def _verdict(case: Case, decision: Decision | None, alpha: float, fail_on: FailOn) -> GateVerdict:
    candidate, reference = case.pair.candidate, case.pair.reference
    summary = candidate.summary_of(case.metric)
    reference_summary = reference.summary_of(case.metric) if reference is not None else None
    fields: dict[str, Any] = {
        "unit": CATALOGUE[case.metric].unit,
        "method": _weakest_method(summary, reference_summary),
        "mean": summary.mean,
        "ci95": summary.ci95,
        "n": summary.n,
        "reference_mean": reference_summary.mean if reference_summary else None,
        "reference_n": reference_summary.n if reference_summary else 0,
        "contended": case.contended,
        "note": case.note,
    }
    undecided: Outcome = "failed" if fail_on == "inconclusive" else "skipped"
    if case.inconclusive:
        fields |= {"verdict": "INCONCLUSIVE", "outcome": undecided, "reason": case.reason}
    elif decision is None or case.question is None:
        outcome = "skipped" if case.skip_undecided else "failed"
        fields |= {"verdict": "NOT JUDGED", "outcome": outcome, "reason": case.reason}
    else:
        fields |= {
            "verdict": decision.verdict,
            "outcome": _OUTCOMES.get(decision.verdict, undecided),
            "reason": _reason(decision),
            "ratio": decision.ratio,
            "interval": decision.interval,
            "confidence": decision.confidence,
            "p": decision.p,
            "alpha": alpha,
            "delta": case.question.delta,
            "cycles_to_decide": decision.cycles_to_decide,
            "judged_after": decision.n if case.question.looks else None,
            "process_share": case.process_share,
        }
        if decision.verdict in ("REGRESSION", "IMPROVEMENT") and reference is not None:
            paired = case.question.contrast.paired
            fields["associated"] = associations(candidate, reference, case.metric, paired=paired)
    return GateVerdict(
        gate="regression",
        id=f"{case.requested}-{candidate.id}",
        metric=case.metric,
        point=candidate.id,
        **fields,
    )


def _weakest_method(*summaries: Summary | None) -> str | None:
    methods = {summary.method for summary in summaries if summary is not None}
    return next((method for method in reversed(METHODS) if method in methods), None)


def _reason(decision: Decision) -> str | None:
    """Return how many cycles would decide an inconclusive gate; None for another verdict."""
    if decision.verdict != "INCONCLUSIVE":
        return None
    if decision.cycles_to_decide is None:
        return f"not even {MAX_CYCLES:,} cycles on either side would decide it"
    return f"about {decision.cycles_to_decide} cycles on either side would decide it"


def _verdict_on_missing(point: PointResult) -> GateVerdict:
    """Return the verdict on a point that is only in the reference."""
    return GateVerdict(
        gate="regression",
        id=f"missing-{point.id}",
        metric="",
        point=point.id,
        verdict="NOT JUDGED",
        outcome="failed",
        reason="in the reference, but no longer in the study: measure it, or save the reference again",
        unit="",
        reference_n=max(summary.n for summary in point.metrics.values()),
    )
