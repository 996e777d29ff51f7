"""Decisions on whether metrics have changed, by t-tests of logarithms and Holm's procedure over gates.

The unit of repetition is the cycle. Geometric means are compared: their ratio does not depend on whether a metric
is J per token or tokens per J.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llem.gates.ttests import (
    Judgement,
    holm_levels,
    judge,
    judge_looks,
    over_looks,
    p_beyond,
    paired_estimate,
    unpaired_estimate,
    variance,
    welch,
)

if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array


Change = Literal["SAME", "REGRESSION", "IMPROVEMENT", "INCONCLUSIVE"]

#: The largest number of cycles that is recommended.
MAX_CYCLES = 1000

#: Limit of a ratio's logarithm: a bound from two cycles may be beyond the range of a float.
_MAX_LOG = 700.0


class UndecidableError(ValueError):
    """Two samples cannot be compared; the message is one line."""


@dataclass(frozen=True)
class Contrast:
    """Candidate against reference, for one metric of one point.

    Attributes:
        log_ratio: ln(candidate / reference), of the geometric means.
        standard_error: Standard error of ``log_ratio``; 0 if neither side has any spread.
        degrees: Degrees of freedom of Welch and Satterthwaite, see :func:`~pytest_llem.gates.ttests.welch`; for
            pairs, their number less 1.
        n: Number of the candidate's cycles, or of pairs.
        n_reference: Number of the reference's cycles, or of pairs.
        paired: Whether the cycles were compared in pairs.
        variance: Sample variance of the logarithms of the candidate's cycles; for pairs, of their differences.
        variance_reference: Sample variance of the logarithms of the reference's cycles; for pairs, 0.
    """

    log_ratio: float
    standard_error: float
    degrees: float
    n: int
    n_reference: int
    paired: bool
    variance: float
    variance_reference: float


@dataclass(frozen=True)
class Look:
    """Candidate against reference after a number of cycles that was fixed in advance.

    Attributes:
        contrast: Candidate against reference, by the cycles until then.
        share: Part of the gate's level that is spent on this look, up to 1.
    """

    contrast: Contrast
    share: float


@dataclass(frozen=True)
class Question:
    """The question whether a metric has changed for the worse or for the better.

    Attributes:
        contrast: Candidate against reference, by all cycles; if there are ``looks``, that of the last one.
        better: The metric's better direction in the catalogue.
        delta: Relative change that does not count, 0 or more: ratios from 1 / (1 + delta) to 1 + delta.
        looks: Looks so far, if cycles run until gates are decided (see :mod:`pytest_llem.gates.sequential`); empty
            if the number of cycles was fixed.
    """

    contrast: Contrast
    better: Literal["lower", "higher"]
    delta: float
    looks: tuple[Look, ...] = ()

    @property
    def all_looks(self) -> tuple[Look, ...]:
        """The looks; a single one with the whole level if the number of cycles was fixed."""
        return self.looks or (Look(self.contrast, 1.0),)


@dataclass(frozen=True)
class Decision:
    """The answer to a question.

    Attributes:
        verdict: The verdict.
        n: Number of the candidate's cycles, or of pairs, from which the verdict follows: of the look with the
            smallest p for its share, or of the last look for INCONCLUSIVE.
        ratio: Candidate / reference, by these cycles.
        interval: Two-sided interval of ``ratio`` at ``confidence``, from which the verdict follows. It lies beyond
            delta for REGRESSION and IMPROVEMENT, within delta for SAME, and neither for INCONCLUSIVE. If there are
            several looks, ``confidence`` is that of the intervals of all looks together.
        confidence: 1 − 2 · the level that decided: alpha for SAME, for the others the part of alpha that
            Holm's procedure gave this question.
        p: One-sided p of no change beyond delta in the direction found, adjusted over all questions and looks.
        cycles_to_decide: For an inconclusive verdict, the smallest number of cycles per side that would decide it
            if mean and spread stayed the same; a side with more cycles keeps them. None if 1,000 would not do.
    """

    verdict: Change
    n: int
    ratio: float
    interval: tuple[float, float]
    confidence: float
    p: float
    cycles_to_decide: int | None


def contrast(candidate: Mapping[int, float], reference: Mapping[int, float], *, paired: bool) -> Contrast:
    """Compare a metric's values, given by cycle.

    Args:
        candidate: Values of the candidate.
        reference: Values of the reference.
        paired: Whether cycles of the same number were interleaved and are compared in pairs; cycles that only one
            side has are left out.

    Raises:
        UndecidableError: There are too few cycles, or a value is not above 0.

    Example:
        >>> contrast({1: 1.1, 2: 1.2, 3: 1.1}, {1: 1.0, 2: 1.0, 3: 1.1}, paired=True).n
        3
    """
    if paired:
        common = sorted(candidate.keys() & reference.keys())
        candidate, reference = ({cycle: side[cycle] for cycle in common} for side in (candidate, reference))
        return paired_contrast(_logs(candidate, "") - _logs(reference, " of the reference"))
    if min(len(candidate), len(reference)) < 2:
        raise UndecidableError(
            "needs at least 2 cycles on either side "
            f"({len(candidate)} in the candidate, {len(reference)} in the reference)"
        )
    logs, reference_logs = _logs(candidate, ""), _logs(reference, " of the reference")
    log_ratio, standard_error, degrees = map(float, unpaired_estimate(logs, reference_logs))
    return Contrast(
        log_ratio,
        standard_error,
        degrees,
        n=len(candidate),
        n_reference=len(reference),
        paired=False,
        variance=float(variance(logs)),
        variance_reference=float(variance(reference_logs)),
    )


def paired_contrast(log_ratios: Sequence[float] | Array) -> Contrast:
    """Compare cycles that were interleaved, given the log ratio of each pair.

    Args:
        log_ratios: ln(candidate / reference) of each pair of cycles, for example of
            :func:`~pytest_llem.gates.turns.pair_log_ratio`.

    Raises:
        UndecidableError: There are fewer than two pairs.

    Example:
        >>> paired_contrast([0.01, 0.02, 0.03]).log_ratio
        0.02
    """
    import numpy as np

    n = len(log_ratios)
    if n < 2:
        raise UndecidableError(f"needs at least 2 cycles that both sides have ({n} in common)")
    differences = np.asarray(log_ratios, dtype=float)
    log_ratio, standard_error, degrees = map(float, paired_estimate(differences))
    return Contrast(
        log_ratio,
        standard_error,
        degrees,
        n=n,
        n_reference=n,
        paired=True,
        variance=float(variance(differences)),
        variance_reference=0.0,
    )


def decide(questions: Sequence[Question], alpha: float, *, pending: int = 0) -> list[Decision]:
    """Answer all questions of a study, which are one family.

    REGRESSION: the one-sided bound at alpha lies beyond delta on the worse side. IMPROVEMENT: it lies beyond delta
    on the better side. For each, Holm's procedure limits the probability of any false one among all questions to
    alpha. SAME: the whole two-sided interval lies within delta. All else is INCONCLUSIVE.

    Args:
        questions: Questions of one family.
        alpha: Probability of a false alarm, above 0 and below 0.5.
        pending: Number of further questions of the family that have too few cycles for a look. They count for
            Holm's procedure, so that an answer still holds when they are asked.

    Returns:
        The answers, in the order of the questions.
    """
    if not questions:
        return []
    looks = _Looks([*questions, *[_WITHOUT_EVIDENCE] * pending])
    judged = judge_looks(*looks.t_tests, looks.margins, alpha, shares=looks.shares)
    worse = holm_levels(over_looks(looks.p_worse, looks.shares), judged.worse, alpha)
    better = holm_levels(over_looks(looks.p_better, looks.shares), judged.better, alpha)
    decisions = []
    for at, question in enumerate(questions):
        verdict = _verdict(judged, at)
        look = looks.deciding(at, verdict)
        p, part = judged.p_better[at], float(better[at])
        if _worsening(look.contrast, question) >= 0:
            p, part = judged.p_worse[at], float(worse[at])
        level = alpha if verdict == "SAME" else part
        decisions.append(
            Decision(
                verdict=verdict,
                n=look.contrast.n,
                ratio=_exp(look.contrast.log_ratio),
                interval=_interval(look.contrast, level * look.share),
                confidence=1 - 2 * level,
                p=float(p),
                cycles_to_decide=_cycles(question, alpha, part) if verdict == "INCONCLUSIVE" else None,
            )
        )
    return decisions


#: A question whose p is 1 in both directions.
_WITHOUT_EVIDENCE = Question(
    Contrast(0.0, 0.0, 1.0, n=0, n_reference=0, paired=True, variance=0.0, variance_reference=0.0), "lower", 0.0
)


class _Looks:
    """The looks of a family's questions, as arrays of looks × questions.

    A question of fewer looks repeats its last one, which changes no smallest p.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        import numpy as np

        most = max(len(one.all_looks) for one in questions)
        self._looks = [[*one.all_looks, *[one.all_looks[-1]] * (most - len(one.all_looks))] for one in questions]
        rows = [
            [
                (_worsening(look.contrast, one), look.contrast.standard_error, look.contrast.degrees, look.share)
                for look in looks
            ]
            for one, looks in zip(questions, self._looks, strict=True)
        ]
        changes, errors, degrees, self.shares = np.array(rows).T
        self.t_tests = changes, errors, degrees
        self.margins = np.array([math.log1p(one.delta) for one in questions])
        self.p_worse = p_beyond(changes, errors, degrees, self.margins)
        self.p_better = p_beyond(-changes, errors, degrees, self.margins)

    def deciding(self, at: int, verdict: Change) -> Look:
        """Return the look from which the *verdict* on the question at that position follows."""
        import numpy as np

        if verdict == "INCONCLUSIVE":
            return self._looks[at][-1]
        worse, better = self.p_worse[:, at], self.p_better[:, at]
        p = {"REGRESSION": worse, "IMPROVEMENT": better, "SAME": 1 - np.minimum(worse, better)}[verdict]
        latest_first = (p / self.shares[:, at])[::-1]  # without spread, several looks have a p of 0
        return self._looks[at][len(p) - 1 - int(np.argmin(latest_first))]


def _worsening(contrast: Contrast, question: Question) -> float:
    return contrast.log_ratio if question.better == "lower" else -contrast.log_ratio


def _verdict(judged: Judgement, at: int) -> Change:
    if judged.worse[at]:
        return "REGRESSION"
    if judged.better[at]:
        return "IMPROVEMENT"
    return "SAME" if judged.same[at] else "INCONCLUSIVE"


def _interval(contrast: Contrast, alpha: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    half = -float(stdtrit(contrast.degrees, alpha)) * contrast.standard_error
    return _exp(contrast.log_ratio - half), _exp(contrast.log_ratio + half)


def _cycles(question: Question, alpha: float, part_of_alpha: float) -> int | None:
    """Return the number of cycles that would decide the question if mean and spread stayed the same."""
    import numpy as np

    found = question.contrast
    counts = np.arange(min(found.n, found.n_reference) + 1, MAX_CYCLES + 1)
    if found.paired:
        error, degrees = np.sqrt(found.variance / counts), np.asarray(counts - 1.0)
    else:
        n, n_reference = np.maximum(counts, found.n), np.maximum(counts, found.n_reference)
        error, degrees = welch(found.variance, n, found.variance_reference, n_reference)
    # Each count is a family of one: part_of_alpha includes the effect of the other questions.
    change, error, degrees = (
        np.full((len(counts), 1), _worsening(found, question)),
        error[:, None],
        degrees[:, None],
    )
    margin, share = math.log1p(question.delta), question.all_looks[-1].share
    changed = judge(change, error, degrees, margin, part_of_alpha * share)
    decided = changed.worse | changed.better | judge(change, error, degrees, margin, alpha * share).same
    return int(counts[decided[:, 0]][0]) if decided.any() else None


def _logs(values: Mapping[int, float], side: str) -> Array:
    import numpy as np

    for cycle, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UndecidableError(f"cycle {cycle}{side} is {value:g}, and ratios need values above 0")
    return np.array([math.log(values[cycle]) for cycle in sorted(values)])


def _exp(log: float) -> float:
    return math.exp(max(-_MAX_LOG, min(log, _MAX_LOG)))
