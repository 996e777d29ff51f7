"""Decide whether metrics have changed, by t-tests on logarithms and Holm's procedure over gates.

The unit of repetition is the cycle. Geometric means are compared, so that a decision is the same for a metric in J
per token and its inverse in tokens per J.
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

#: Verdicts of a comparison that can be judged.
ChangeVerdict = Literal["SAME", "REGRESSION", "IMPROVEMENT", "INCONCLUSIVE"]

#: The largest number of cycles that is recommended.
MAX_CYCLES = 1000

#: Limit of a ratio's logarithm. From two cycles, the exponential of a bound can overflow a float.
_MAX_LOG = 700.0


class UndecidableError(ValueError):
    """Two samples cannot be compared; the message is one line."""


@dataclass(frozen=True)
class Contrast:
    """The estimated ratio of candidate to reference, for one metric of one point.

    Attributes:
        log_ratio: ln(candidate / reference), of the geometric means.
        standard_error: Standard error of ``log_ratio``; 0 if neither side has any spread, or pairs have none.
        degrees: Degrees of freedom of ``standard_error``: by Welch and Satterthwaite, see
            :func:`~pytest_llem.gates.ttests.welch`; for pairs, the number of pairs less 1.
        n: Number of the candidate's cycles, or of pairs.
        n_reference: Number of the reference's cycles, or of pairs.
        paired: Whether the cycles were compared in pairs.
        variance: Sample variance of the logarithms of the candidate's cycles; for pairs, of the log ratios.
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
    """An interim analysis of a gate, after a number of cycles that was fixed in advance.

    Attributes:
        contrast: Contrast of the cycles until then.
        share: Part of the gate's significance level that is spent on this look, up to 1.
    """

    contrast: Contrast
    share: float


@dataclass(frozen=True)
class Question:
    """The question whether a metric has changed for the worse or for the better.

    Attributes:
        contrast: Contrast of all cycles; if there are ``looks``, the contrast of the last look.
        better: The metric's better direction in the catalogue.
        delta: Relative change that is tolerated, 0 or more: ratios from 1 / (1 + delta) to 1 + delta.
        looks: Looks so far, if cycles run until gates are decided (see :mod:`pytest_llem.gates.sequential`); empty
            if the number of cycles was fixed.
    """

    contrast: Contrast
    better: Literal["lower", "higher"]
    delta: float
    looks: tuple[Look, ...] = ()

    @property
    def all_looks(self) -> tuple[Look, ...]:
        """The looks; if the number of cycles was fixed, a single look with the whole significance level."""
        return self.looks or (Look(self.contrast, 1.0),)


@dataclass(frozen=True)
class Decision:
    """The answer to a question.

    Attributes:
        verdict: The verdict.
        n: Number of the candidate's cycles, or of pairs, at the look that decided: the look with the smallest
            p ÷ share. For INCONCLUSIVE, the last look.
        ratio: Candidate / reference, by the cycles until that look.
        interval: Two-sided interval of ``ratio``. It lies beyond delta for REGRESSION and IMPROVEMENT, within
            delta for SAME, and neither for INCONCLUSIVE.
        confidence: Confidence of ``interval``; if there are several looks, of their intervals together. It is
            1 − 2 · level. For SAME the level is alpha, for other verdicts the part of alpha that Holm's procedure
            gave this question.
        p: One-sided p-value, adjusted over all questions and looks, of the hypothesis that there is no change
            beyond delta in the direction found.
        cycles_to_decide: For INCONCLUSIVE, the smallest number of cycles per side that would decide the question
            if mean and spread stayed the same; a side with more cycles keeps them. None if 1,000 would not
            suffice, and for other verdicts.
    """

    verdict: ChangeVerdict
    n: int
    ratio: float
    interval: tuple[float, float]
    confidence: float
    p: float
    cycles_to_decide: int | None


def contrast(candidate: Mapping[int, float], reference: Mapping[int, float], *, paired: bool) -> Contrast:
    """Return the contrast of a metric's values.

    Args:
        candidate: Values of the candidate, by cycle.
        reference: Values of the reference, by cycle.
        paired: Whether candidate and reference were interleaved, so that cycles of the same number are compared in
            pairs. Cycles that only one side has are then left out.

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
    """Return the contrast of pairs of interleaved cycles.

    Args:
        log_ratios: ln(candidate / reference) of each pair of cycles, for example from
            :func:`~pytest_llem.gates.pair_log_ratio.pair_log_ratio`.

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
    """Decide all questions of a study together, as one family for Holm's procedure.

    REGRESSION: the one-sided bound lies beyond delta on the worse side. IMPROVEMENT: it lies beyond delta on the
    better side. The probability of one or more false REGRESSIONs in the family is at most alpha, and so is that of
    false IMPROVEMENTs. SAME: the two-sided interval lies within delta. Otherwise the verdict is INCONCLUSIVE.

    Args:
        questions: Questions of one family.
        alpha: Probability of a false alarm, above 0 and below 0.5.
        pending: Number of further questions of the family that have too few cycles for a look. Holm's procedure
            counts them, so that a decision still holds when they are asked.

    Returns:
        The decisions, in the order of the questions.
    """
    if not questions:
        return []
    looks = _Looks([*questions, *[_WITHOUT_EVIDENCE] * pending])
    judged = judge_looks(*looks.estimates, looks.margins, alpha, shares=looks.shares)
    worse_levels = holm_levels(over_looks(looks.p_worse, looks.shares), judged.worse, alpha)
    better_levels = holm_levels(over_looks(looks.p_better, looks.shares), judged.better, alpha)
    decisions = []
    for index, question in enumerate(questions):
        verdict = _verdict(judged, index)
        look = looks.deciding(index, verdict)
        p, holm_level = judged.p_better[index], float(better_levels[index])
        if _worsening(look.contrast, question) >= 0:
            p, holm_level = judged.p_worse[index], float(worse_levels[index])
        level = alpha if verdict == "SAME" else holm_level
        cycles = _cycles_to_decide(question, alpha, holm_level) if verdict == "INCONCLUSIVE" else None
        decisions.append(
            Decision(
                verdict=verdict,
                n=look.contrast.n,
                ratio=_exp(look.contrast.log_ratio),
                interval=_interval(look.contrast, level * look.share),
                confidence=1 - 2 * level,
                p=float(p),
                cycles_to_decide=cycles,
            )
        )
    return decisions


#: Takes the place of a pending question: its p is 1 in both directions, the least favourable value.
_WITHOUT_EVIDENCE = Question(
    Contrast(0.0, 0.0, 1.0, n=0, n_reference=0, paired=True, variance=0.0, variance_reference=0.0), "lower", 0.0
)


class _Looks:
    """The looks of a family's questions, as arrays of looks × questions.

    A question with fewer looks than another repeats its last look: the smallest p over its looks stays the same.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        import numpy as np

        looks_of = [question.all_looks for question in questions]
        n_looks = max(map(len, looks_of))
        self._looks = [[*looks, *[looks[-1]] * (n_looks - len(looks))] for looks in looks_of]
        rows = [
            [
                (_worsening(look.contrast, one), look.contrast.standard_error, look.contrast.degrees, look.share)
                for look in looks
            ]
            for one, looks in zip(questions, self._looks, strict=True)
        ]
        worsenings, errors, degrees, self.shares = np.array(rows).T
        self.estimates = worsenings, errors, degrees
        self.margins = np.array([math.log1p(question.delta) for question in questions])
        self.p_worse = p_beyond(worsenings, errors, degrees, self.margins)
        self.p_better = p_beyond(-worsenings, errors, degrees, self.margins)

    def deciding(self, index: int, verdict: ChangeVerdict) -> Look:
        """Return the look that gave *verdict* on the question at *index*; the last look for INCONCLUSIVE."""
        import numpy as np

        if verdict == "INCONCLUSIVE":
            return self._looks[index][-1]
        worse, better = self.p_worse[:, index], self.p_better[:, index]
        p = {"REGRESSION": worse, "IMPROVEMENT": better, "SAME": 1 - np.minimum(worse, better)}[verdict]
        # Without spread, several looks have a p of 0. The last of them is taken, which has the most cycles.
        latest_first = (p / self.shares[:, index])[::-1]
        return self._looks[index][len(p) - 1 - int(np.argmin(latest_first))]


def _worsening(contrast: Contrast, question: Question) -> float:
    """Return the log ratio, with the sign that is positive if the candidate is worse."""
    return contrast.log_ratio if question.better == "lower" else -contrast.log_ratio


def _verdict(judged: Judgement, index: int) -> ChangeVerdict:
    if judged.worse[index]:
        return "REGRESSION"
    if judged.better[index]:
        return "IMPROVEMENT"
    return "SAME" if judged.same[index] else "INCONCLUSIVE"


def _interval(contrast: Contrast, level: float) -> tuple[float, float]:
    """Return the interval of the ratio whose two one-sided bounds each fail with the probability *level*."""
    from scipy.special import stdtrit

    half_width = -float(stdtrit(contrast.degrees, level)) * contrast.standard_error
    return _exp(contrast.log_ratio - half_width), _exp(contrast.log_ratio + half_width)


def _cycles_to_decide(question: Question, alpha: float, holm_level: float) -> int | None:
    """Return ``Decision.cycles_to_decide`` of a question, given the level from Holm's procedure."""
    import numpy as np

    now = question.contrast
    counts = np.arange(min(now.n, now.n_reference) + 1, MAX_CYCLES + 1)
    if now.paired:
        errors, degrees = np.sqrt(now.variance / counts), np.asarray(counts - 1.0)
    else:
        n, n_reference = np.maximum(counts, now.n), np.maximum(counts, now.n_reference)
        errors, degrees = welch(now.variance, n, now.variance_reference, n_reference)
    # judge() takes the last axis for a family. Each number of cycles is a family of one, since holm_level already
    # accounts for the other questions.
    worsening = np.full((len(counts), 1), _worsening(now, question))
    errors, degrees = errors[:, None], degrees[:, None]
    margin, share = math.log1p(question.delta), question.all_looks[-1].share
    changed = judge(worsening, errors, degrees, margin, holm_level * share)
    decided = changed.worse | changed.better | judge(worsening, errors, degrees, margin, alpha * share).same
    return int(counts[decided[:, 0]][0]) if decided.any() else None


def _logs(values: Mapping[int, float], side: str) -> Array:
    import numpy as np

    for cycle, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UndecidableError(f"cycle {cycle}{side} is {value:g}, and ratios need values above 0")
    return np.array([math.log(values[cycle]) for cycle in sorted(values)])


def _exp(log: float) -> float:
    return math.exp(max(-_MAX_LOG, min(log, _MAX_LOG)))
