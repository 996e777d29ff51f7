"""Judge the gates of a study's merged results, without pytest."""

from __future__ import annotations

from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.gate import gates_of
from pytest_llem.gates.regression import Comparison, FailOn, compare
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import Budget


def judge_budgets(result: StudyResult) -> list[GateVerdict]:
    """Judge the budgets of a study, add the verdicts to the points of its *result*, and return them.

    Budgets of points that the study skips or expects to fail are not judged.
    """
    points = {point.id: point for point in result.points}
    verdicts = []
    for fields in result.measurement_protocol.get("budgets", ()):
        budget = Budget(**fields)
        point = points.get(budget.point)
        verdict = _with_cycles(judge_budget(budget, point, file=None), result)
        if point is not None:
            point.verdicts.append(verdict)
        verdicts.append(verdict)
    return verdicts


def judge_comparison(
    result: StudyResult, reference: StudyResult, *, name: str, paired: bool, fail_on: FailOn
) -> Comparison:
    """Compare a study's *result* with a reference, add the verdicts to its points, and return the comparison.

    Points that the study skips or expects to fail are not judged.

    Args:
        result: The judged result.
        reference: The result that it is compared with.
        name: Name of the reference.
        paired: Whether both were interleaved.
        fail_on: The mildest verdict that fails.
    """
    points = {point.id: point for point in result.points}
    judged = points.keys() - result.measurement_protocol.get("ungated_points", ())
    gates = gates_of(result, result.name)
    found = compare(result, reference, gates, name=name, paired=paired, fail_on=fail_on, points=judged)
    verdicts = [_with_cycles(verdict, result) for verdict in found.verdicts]
    for verdict in verdicts:
        if verdict.point in points:  # not one that only the reference has
            points[verdict.point].verdicts.append(verdict)
    result.comparison = found.record
    return Comparison(found.record, verdicts)


def _with_cycles(verdict: GateVerdict, result: StudyResult) -> GateVerdict:
    """Return *verdict*, with a reason that counts the point's cycles if some are missing."""
    wanted = result.min_cycles
    measured = next((len(point.cycles) for point in result.points if point.id == verdict.point), 0)
    if not 0 < measured < wanted:
        return verdict
    reason = "; ".join(filter(None, (verdict.reason, f"{measured} of {wanted} cycles")))
    return verdict.model_copy(update={"reason": reason})
