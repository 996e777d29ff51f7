"""Records of gates' verdicts and of comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record

Gate = Literal["budget", "regression"]

#: Outcome of a pytest item.
Outcome = Literal["passed", "failed", "skipped"]

#: For a budget, whether the mean is within its limits; for a regression gate, whether the metric has changed.
#: ``NOT JUDGED``: that could not be determined; the reason says why.
Verdict = Literal["WITHIN", "BEYOND", "SAME", "REGRESSION", "IMPROVEMENT", "INCONCLUSIVE", "NOT JUDGED"]


class GateVerdict(Record):
    """The verdict of a gate on one metric of one point.

    Attributes:
        gate: Kind of the gate.
        id: Id of the gate, inside the brackets of the item's id.
        metric: Name of the metric in the catalogue.
        point: Id of the point.
        verdict: The verdict.
        outcome: Outcome of the gate's item.
        reason: Why the gate was not judged, or a remark on the verdict; one line.
        note: Why the gate judges another metric than its id names; null if it does not.
        unit: Unit of the metric.
        method: For energies, the weakest method among the cycles of both sides.
        mean: Mean of the candidate's cycles, null if none has a value.
        ci95: 95 % t-interval of ``mean``.
        n: Number of the candidate's cycles with a value.
        maximum: Maximum of a budget; null if it has none.
        minimum: Minimum of a budget; null if it has none.
        within_noise: Whether ``ci95`` straddles a limit of the budget.
        reference_mean: Mean of the reference's cycles.
        reference_n: Number of the reference's cycles with a value.
        paired: Whether candidate and reference were interleaved and are compared cycle by cycle.
        ratio: Candidate / reference, of the geometric means.
        interval: Two-sided interval of ``ratio`` at ``confidence``, from which the verdict follows.
        confidence: 1 − 2 · the level that decided: alpha for ``SAME``, the part of alpha that Holm's procedure
            gave this gate for any other verdict.
        p: One-sided p of no change beyond delta in the direction found, Holm-adjusted over the family.
        alpha: Level that ``p`` is compared with.
        delta: Relative change that does not count.
        contended: Contended cycles of either side, with the reason; null if there are none. They make a comparison
            of two sessions INCONCLUSIVE; budgets and interleaved sides are judged despite them.
        cycles_to_decide: Number of cycles per side that would probably decide an inconclusive verdict; null if the
            verdict is decided or no number would do.
        file: File of the gate, relative to the root of the run; null if the gate is not written in a file.
        line: Line in ``file``, from 1.
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


#: Verdicts from worst to best within one outcome.
_WORST_FIRST = ("BEYOND", "REGRESSION", "NOT JUDGED", "INCONCLUSIVE", "SAME", "WITHIN", "IMPROVEMENT")
_OUTCOMES = ("failed", "skipped", "passed")


def severity(verdict: GateVerdict) -> tuple[int, int]:
    """Return a key that sorts verdicts from worst to best.

    Failed verdicts come first. Verdicts that were not judged and did not fail, for example because neither side
    has a meter, come last.
    """
    not_judged = verdict.verdict == "NOT JUDGED" and verdict.outcome != "failed"
    outcome = len(_OUTCOMES) if not_judged else _OUTCOMES.index(verdict.outcome)
    return outcome, _WORST_FIRST.index(verdict.verdict)


def worst(verdicts: Iterable[GateVerdict]) -> GateVerdict | None:
    """Return the worst of *verdicts*; None if there are none."""
    return min(verdicts, key=severity, default=None)


class ComparisonRecord(Record):
    """A comparison of a study with a reference, and the differences between the two.

    Attributes:
        reference: Name of a baseline, a file, or an interpreter.
        reference_version: Version of pytest-llem that measured the reference.
        reference_started_at: Start of the reference's run.
        paired: Whether both were interleaved, cycle by cycle on the same devices.
        alpha: Probability of a false alarm, per gate and, by Holm's procedure, per family.
        family: Number of regression gates that were judged.
        testbed: Testbed facts that differ, one per line.
        compared_despite_mismatch: Whether ``--llem-compare-mismatch`` allowed the comparison despite ``testbed``.
        warnings: Differences that do not stop the comparison but may affect it.
        workload: Differences of the work itself (prompts, tokens per request), one per line.
        sut: System-under-test facts that differ, one per line.
        new_points: Ids of points that are not in the reference.
        missing_points: Ids of points of the reference that are no longer in the study.
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
