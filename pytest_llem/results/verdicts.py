"""Records of gates' verdicts and of comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from pytest_llem.results.document import Record

Gate = Literal["budget", "regression"]

#: Outcome of a pytest item.
Outcome = Literal["passed", "failed", "skipped"]

#: For a budget, whether the mean is within its limits; for a regression gate, whether the metric has changed.
#: ``NOT JUDGED``: that could not be determined; the reason says why.
Verdict = Literal["WITHIN", "BEYOND", "SAME", "REGRESSION", "IMPROVEMENT", "INCONCLUSIVE", "NOT JUDGED"]


class GateVerdict(Record):
    """The verdict of a gate on one metric of one point."""

    gate: Gate
    """Kind of the gate."""
    id: str
    """Id of the gate, inside the brackets of the item's id."""
    metric: str
    """Name of the metric in the catalogue; empty for a point that only the reference has."""
    point: str
    """Id of the point."""
    verdict: Verdict
    """The verdict."""
    outcome: Outcome
    """Outcome of the gate's item."""
    reason: str | None = None
    """Why the gate was not judged, or a remark on the verdict; one line."""
    note: str | None = None
    """Why the gate judges another metric than its id names; null if it does not."""
    unit: str
    """Unit of the metric."""
    method: str | None = None
    """For energies, the weakest method among the cycles of both sides."""
    mean: float | None = None
    """Mean of the candidate's cycles, null if none has a value."""
    ci95: tuple[float, float] | None = None
    """95 % t-interval of ``mean``."""
    n: int = 0
    """Number of the candidate's cycles with a value."""
    maximum: float | None = None
    """Maximum of a budget; null if it has none."""
    minimum: float | None = None
    """Minimum of a budget; null if it has none."""
    within_noise: bool = False
    """Whether ``ci95`` straddles a limit of the budget."""
    reference_mean: float | None = None
    """Mean of the reference's cycles."""
    reference_n: int = 0
    """Number of the reference's cycles with a value."""
    paired: bool = False
    """Whether candidate and reference were interleaved and are compared cycle by cycle."""
    ratio: float | None = None
    """Candidate / reference, of the geometric means."""
    interval: tuple[float, float] | None = None
    """Two-sided interval of ``ratio`` at ``confidence``, from which the verdict follows."""
    confidence: float | None = None
    """1 − 2 · the level that decided: alpha for ``SAME``, the part of alpha that Holm's procedure gave this gate
    for any other verdict.
    """
    p: float | None = None
    """One-sided p-value of no change beyond delta in the direction found, Holm-adjusted over the family."""
    alpha: float | None = None
    """Level that ``p`` is compared with."""
    delta: float | None = None
    """Relative change that the gate tolerates."""
    contended: str | None = None
    """Contended cycles of either side, with the reason; null if there are none. They make a comparison of two
    runs INCONCLUSIVE; budgets and interleaved sides are judged despite them.
    """
    process_share: float | None = None
    """Share of the variance between interleaved pairs of cycles that their turns do not explain, 0 to 1. It comes
    from differences between processes, so that only more cycles help. Null if there are no turns, or fewer than
    two pairs.
    """
    cycles_to_decide: int | None = None
    """Number of cycles per side that would probably decide an inconclusive verdict; null if the verdict is decided
    or 1,000 would not do.
    """
    judged_after: int | None = None
    """With ``n_cycles: auto``, the number of cycles, or of pairs, from which ``ratio`` and ``interval`` follow;
    null if the number of cycles was fixed.
    """
    associated: list[str] = Field(default_factory=list)
    """For ``REGRESSION`` and ``IMPROVEMENT``, what changed together with the metric: its parts, such as
    power and time of an energy, and facts that differ. They need not be the cause.
    """
    file: str | None = None
    """File of the gate, relative to rootdir; null if the gate is not written in a file."""
    line: int | None = None
    """Line in ``file``, from 1."""

    @model_validator(mode="after")
    def _judged_budget_has_values(self) -> GateVerdict:
        is_judged = self.gate == "budget" and self.verdict != "NOT JUDGED"
        if is_judged and (self.mean is None or (self.maximum is None and self.minimum is None)):
            raise ValueError("a judged budget needs mean, and maximum or minimum")
        return self


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
    """A comparison of a study with a reference, and the differences between the two."""

    reference: str
    """Name of a baseline, a file, or an interpreter."""
    reference_version: str | None = None
    """Version of pytest-llem that measured the reference."""
    reference_started_at: str | None = None
    """Start of the reference's run."""
    paired: bool = False
    """Whether both were interleaved, cycle by cycle on the same devices."""
    alpha: float
    """Probability of a false alarm, per gate and, by Holm's procedure, per family."""
    family: int
    """Number of regression gates that were judged, or will be once their points have enough cycles."""
    testbed: list[str] = Field(default_factory=list)
    """Testbed facts that differ, one per line."""
    compared_despite_mismatch: bool = False
    """Whether ``--llem-compare-mismatch``, or ``--allow-mismatch`` of ``llem compare``, allowed the comparison
    despite ``testbed``.
    """
    warnings: list[str] = Field(default_factory=list)
    """Differences that do not stop the comparison but may affect it."""
    workload: list[str] = Field(default_factory=list)
    """Differences of the work itself (prompts, tokens per request), one per line."""
    sut: list[str] = Field(default_factory=list)
    """System-under-test facts that differ, one per line."""
    new_points: list[str] = Field(default_factory=list)
    """Ids of points that are not in the reference."""
    missing_points: list[str] = Field(default_factory=list)
    """Ids of points of the reference that are no longer in the study."""
