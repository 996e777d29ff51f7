"""What a gate came to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record

Gate = Literal["budget", "regression"]

#: Of a pytest item.
Outcome = Literal["passed", "failed", "skipped"]

#: Of a budget: whether the mean is within its limits. Of a regression gate: whether the metric has changed.
#: ``NOT JUDGED``: it could not be told; the reason says why.
Verdict = Literal["WITHIN", "BEYOND", "SAME", "REGRESSION", "IMPROVEMENT", "INCONCLUSIVE", "NOT JUDGED"]


class GateVerdict(Record):
    """What one gate says of one metric of one point.

    Attributes:
        gate: Of which kind it is.
        id: As in the item's id, inside the brackets.
        metric: By its name in the catalogue.
        point: Id of the point.
        verdict: What it says.
        outcome: What its item comes to.
        reason: Why it was not judged, or what else there is to say of it; in words, on one line.
        note: Why it judges another metric than the one that its id names; null where it does not.
        unit: The metric's unit.
        method: For energies, the weakest method among the cycles of either side.
        mean: Of the candidate's cycles, null where none has a value.
        ci95: Its 95 % t-interval.
        n: Cycles of the candidate that have a value.
        maximum: Of a budget; null where it has none.
        minimum: Likewise.
        within_noise: Of a budget: ``ci95`` straddles the limit.
        reference_mean: Of the reference's cycles.
        reference_n: Of them, those that have a value.
        paired: Reference and candidate were interleaved, and are compared cycle by cycle.
        ratio: Candidate / reference: of the geometric means.
        interval: Two-sided interval of ``ratio`` at ``confidence``: the one that the verdict follows from.
        confidence: 1 − 2 · the level that decided: alpha for ``SAME``, the part of alpha that Holm's procedure
            gave this gate for any other verdict.
        p: One-sided, Holm-adjusted over the family: of there being no change beyond delta in the direction found.
        alpha: What p is held against.
        delta: Relative change that does not count.
        contended: Which cycles of which side were contended, and by what; null for none. A comparison of two
            sessions is INCONCLUSIVE then; a budget, and interleaved sides, are judged all the same.
        cycles_to_decide: Cycles on either side after which an inconclusive verdict is likely to be decided; null
            where it is decided, or where no number would.
        file: Where the gate is written, relative to the root of the run; null where it is written nowhere.
        line: Likewise, from 1.
    """

    gate: Gate
    id: str
    metric: str
    point: str
    verdict: Verdict
    outcome: Outcome
    reason: str | None = None
    note: str | None = None
    unit: str
    method: str | None = None
    mean: float | None = None
    ci95: tuple[float, float] | None = None
    n: int = 0
    maximum: float | None = None
    minimum: float | None = None
    within_noise: bool = False
    reference_mean: float | None = None
    reference_n: int = 0
    paired: bool = False
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    p: float | None = None
    alpha: float | None = None
    delta: float | None = None
    contended: str | None = None
    cycles_to_decide: int | None = None
    file: str | None = None
    line: int | None = None


#: From worst to best, among those of one outcome.
_WORST_FIRST = ("BEYOND", "REGRESSION", "NOT JUDGED", "INCONCLUSIVE", "SAME", "WITHIN", "IMPROVEMENT")
_OUTCOMES = ("failed", "skipped", "passed")


def severity(verdict: GateVerdict) -> tuple[int, int]:
    """Return what sorts verdicts from worst to best.

    One that failed comes before any other. One that was not judged and did not fail, as where neither side has a
    meter, comes last: it says nothing of what was judged.
    """
    said_nothing = verdict.verdict == "NOT JUDGED" and verdict.outcome != "failed"
    outcome = len(_OUTCOMES) if said_nothing else _OUTCOMES.index(verdict.outcome)
    return outcome, _WORST_FIRST.index(verdict.verdict)


def worst(verdicts: Iterable[GateVerdict]) -> GateVerdict | None:
    """Return the worst of *verdicts*; None of none."""
    return min(verdicts, key=severity, default=None)


class ComparisonRecord(Record):
    """What a study was compared with, and how far that may be compared.

    Attributes:
        reference: Which result that is: a baseline's name, a file, an interpreter.
        reference_version: Of pytest-llem there.
        reference_started_at: When it was measured.
        paired: Both were measured in turns, cycle by cycle, on the same devices.
        alpha: Of false alarms, per gate and, by Holm, per family.
        family: Regression gates that were judged.
        testbed: Facts that have to agree and do not, a line each.
        compared_despite_mismatch: They were compared all the same, as ``--llem-compare-mismatch`` says.
        warnings: Facts that may differ and make a difference.
        workload: In what the work itself differs (prompts, tokens per request), a line each.
        sut: Facts that differ, being what is tested, a line each.
        new_points: Points that the reference lacks.
        missing_points: Points of the reference that are not in the study any more.
    """

    reference: str
    reference_version: str | None = None
    reference_started_at: str | None = None
    paired: bool = False
    alpha: float
    family: int
    testbed: list[str] = Field(default_factory=list)
    compared_despite_mismatch: bool = False
    warnings: list[str] = Field(default_factory=list)
    workload: list[str] = Field(default_factory=list)
    sut: list[str] = Field(default_factory=list)
    new_points: list[str] = Field(default_factory=list)
    missing_points: list[str] = Field(default_factory=list)
