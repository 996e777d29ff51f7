"""Whether a point's figures keep to their budgets."""

from __future__ import annotations

from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.eligibility import (
    ESTIMATED,
    allows_estimates,
    contention,
    ineligible_reason,
    names_boundary,
    replay_ineligible_reason,
)
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import Budget

_NO_CYCLE = "no completed cycle"


def judge_budget(
    budget: Budget, point: PointResult | None, *, unfit: str | None = None, file: str | None
) -> GateVerdict:
    """Return whether the mean of a metric over a point's cycles is within its limits.

    It fails if and only if the mean is above the maximum or below the minimum, whatever the scatter: a limit is a
    limit. ``within_noise`` tells that the 95 % interval straddles one: another run may find otherwise. What
    cannot be judged fails, and says why.

    Args:
        budget: The limits.
        point: What was measured; None where the result has no such point.
        unfit: Why nothing of the point may be judged; None where it may.
        file: The study file, as the verdict is to tell it.
    """
    summary = None if point is None else point.metrics.get(budget.metric)
    found: dict[str, Any] = {"verdict": "NOT JUDGED", "outcome": "failed"}
    if point is None or summary is None:
        found["reason"] = "this result does not have it" if point and point.metrics else _NO_CYCLE
    else:
        found |= {"method": summary.method, "mean": summary.mean, "ci95": summary.ci95, "n": summary.n}
        if (reason := unfit or summary.not_judged) is not None:
            found["reason"] = reason
        elif summary.mean is None:
            found["reason"] = summary.reason or "it has no value"
        elif obstacle := replay_ineligible_reason(point):
            found["reason"] = obstacle
        elif summary.method == "estimated" and not allows_estimates(point):
            found["reason"] = ESTIMATED
        elif obstacle := ineligible_reason(
            point, budget.metric, any_boundary=names_boundary(point, budget.metric)
        ):
            found["reason"] = obstacle
        else:
            found |= _judged(budget, summary, summary.mean, len(point.cycles))
            found["contended"] = contention(point, budget.metric)
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
        **found,
    )


def _judged(budget: Budget, summary: Summary, mean: float, cycles: int) -> dict[str, Any]:
    """Return what a verdict says of *mean*, which is that of so many completed *cycles*."""
    too_high = budget.maximum is not None and mean > budget.maximum
    too_low = budget.minimum is not None and mean < budget.minimum
    low, high = summary.ci95 or (mean, mean)
    noisy = any(limit is not None and low < limit < high for limit in (budget.maximum, budget.minimum))
    said = ["within noise: the 95 % interval straddles the limit"] if noisy else []
    if summary.n < cycles:
        said.append(f"{summary.n} of {cycles} cycles have a value")
    return {
        "verdict": "BEYOND" if too_high or too_low else "WITHIN",
        "outcome": "failed" if too_high or too_low else "passed",
        "within_noise": noisy,
        "reason": "; ".join(said) or None,
    }
