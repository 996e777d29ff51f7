"""Judgement of budgets: whether a metric's mean is within its limits."""

from __future__ import annotations

from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.eligibility import (
    ESTIMATED,
    allows_estimates,
    contention_reason,
    ineligible_reason,
    mixed_hosts_reason,
    replay_ineligible_reason,
)
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import Budget

_NO_CYCLE = "no completed cycle"


def judge_budget(
    budget: Budget, point: PointResult | None, *, not_judged: str | None = None, file: str | None
) -> GateVerdict:
    """Return whether the mean of a metric over a point's cycles is within its limits.

    A judged budget fails if and only if the mean is above the maximum or below the minimum, whatever the scatter.
    ``within_noise`` is set if the 95 % interval straddles a limit, so that another run may give another verdict. A
    budget that cannot be judged fails with the reason.

    Args:
        budget: The limits.
        point: The measured point; None if the result does not have it.
        not_judged: Why no gate may judge the point; None if gates may.
        file: The study file, for the verdict; None if it is unknown.
    """
    summary = None if point is None else point.metrics.get(budget.metric)
    fields: dict[str, Any] = {"verdict": "NOT JUDGED", "outcome": "failed"}
    if point is None or summary is None:
        fields["reason"] = "the result does not have this metric" if point and point.metrics else _NO_CYCLE
    else:
        fields |= {"method": summary.method, "mean": summary.mean, "ci95": summary.ci95, "n": summary.n}
        if (reason := not_judged or summary.not_judged) is not None or (reason := mixed_hosts_reason(point)):
            fields["reason"] = reason
        elif summary.mean is None:
            fields["reason"] = summary.reason or "it has no value"
        elif reason := replay_ineligible_reason(point):
            fields["reason"] = reason
        elif summary.method == "estimated" and not allows_estimates(point):
            fields["reason"] = ESTIMATED
        elif reason := ineligible_reason(point, budget.metric):
            fields["reason"] = reason
        else:
            fields |= _judged(budget, summary, summary.mean, len(point.cycles))
            fields["contended"] = contention_reason(point, budget.metric)
    return GateVerdict(
        gate="budget",
        id=budget.id,
        metric=budget.metric,
        point=budget.point,
        unit=CATALOGUE[budget.metric].unit,
        maximum=budget.maximum,
        minimum=budget.minimum,
        file=file,
        line=budget.line,
        **fields,
    )


def _judged(budget: Budget, summary: Summary, mean: float, cycles: int) -> dict[str, Any]:
    """Return the fields of the verdict on *mean*, given the number of completed *cycles*."""
    too_high = budget.maximum is not None and mean > budget.maximum
    too_low = budget.minimum is not None and mean < budget.minimum
    low, high = summary.ci95 or (mean, mean)
    noisy = any(limit is not None and low < limit < high for limit in (budget.maximum, budget.minimum))
    remarks = ["within noise: the 95 % interval straddles the limit"] if noisy else []
    if summary.n < cycles:
        remarks.append(f"{summary.n} of {cycles} cycles have a value")
    return {
        "verdict": "BEYOND" if too_high or too_low else "WITHIN",
        "outcome": "failed" if too_high or too_low else "passed",
        "within_noise": noisy,
        "reason": "; ".join(remarks) or None,
    }
