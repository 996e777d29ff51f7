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
    p_beyond,
    paired_estimate,
    unpaired_estimate,
    variance,
    welch,
)

if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array

__all__ = ["Contrast", "Decision", "Question", "UndecidableError", "contrast", "decide", "paired_contrast"]

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
class Question:
    """The question whether a metric has changed for the worse or for the better.

    Attributes:
        contrast: Candidate against reference.
        better: The metric's better direction in the catalogue.
        delta: Relative change that does not count, 0 or more: ratios from 1 / (1 + delta) to 1 + delta.
    """

    contrast: Contrast
    better: Literal["lower", "higher"]
    delta: float


@dataclass(frozen=True)
class Decision:
    """The answer to a question.

    Attributes:
        verdict: The verdict.
        ratio: Candidate / reference.
        interval: Two-sided interval of ``ratio`` at ``confidence``, from which the verdict follows. It lies beyond
            delta for REGRESSION and IMPROVEMENT, within delta for SAME, and neither for INCONCLUSIVE.
        confidence: 1 − 2 · the level that decided: alpha for SAME, for the others the part of alpha that
            Holm's procedure gave this question.
        p: One-sided p of no change beyond delta in the direction found, adjusted over all questions.
        cycles_to_decide: For an inconclusive verdict, the smallest number of cycles per side that would decide it
            if mean and spread stayed the same; a side with more cycles keeps them. None if 1,000 would not do.
    """

    verdict: Change
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


def decide(questions: Sequence[Question], alpha: float) -> list[Decision]:
    """Answer all questions of a study, which are one family.

    REGRESSION: the one-sided bound at alpha lies beyond delta on the worse side. IMPROVEMENT: it lies beyond delta
    on the better side. For each, Holm's procedure limits the probability of any false one among all questions to
    alpha. SAME: the whole two-sided interval lies within delta. All else is INCONCLUSIVE.

    Args:
        questions: Questions of one family.
        alpha: Probability of a false alarm, above 0 and below 0.5.

    Returns:
        The answers, in the order of the questions.
    """
    if not questions:
        return []
    changes, errors, degrees, margins = _arrays(questions)
    judged = judge(changes, errors, degrees, margins, alpha)
    worse = holm_levels(p_beyond(changes, errors, degrees, margins), judged.worse, alpha)
    better = holm_levels(p_beyond(-changes, errors, degrees, margins), judged.better, alpha)
    decisions = []
    for at, question in enumerate(questions):
        verdict = _verdict(judged, at)
        p, part = judged.p_better[at], float(better[at])
        if _worsening(question) >= 0:
            p, part = judged.p_worse[at], float(worse[at])
        level = alpha if verdict == "SAME" else part
        decisions.append(
            Decision(
                verdict=verdict,
                ratio=_exp(question.contrast.log_ratio),
                interval=_interval(question.contrast, level),
                confidence=1 - 2 * level,
                p=float(p),
                cycles_to_decide=_cycles(question, alpha, part) if verdict == "INCONCLUSIVE" else None,
            )
        )
    return decisions


def _worsening(question: Question) -> float:
    return question.contrast.log_ratio if question.better == "lower" else -question.contrast.log_ratio


def _arrays(questions: Sequence[Question]) -> tuple[Array, Array, Array, Array]:
    """Return changes, their standard errors, degrees of freedom and margins."""
    import numpy as np

    rows = [
        (_worsening(one), one.contrast.standard_error, one.contrast.degrees, math.log1p(one.delta))
        for one in questions
    ]
    changes, errors, degrees, margins = np.array(rows).T
    return changes, errors, degrees, margins


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
    change, error, degrees = np.full((len(counts), 1), _worsening(question)), error[:, None], degrees[:, None]
    margin = math.log1p(question.delta)
    changed = judge(change, error, degrees, margin, part_of_alpha)
    decided = changed.worse | changed.better | judge(change, error, degrees, margin, alpha).same
    return int(counts[decided[:, 0]][0]) if decided.any() else None


def _logs(values: Mapping[int, float], side: str) -> Array:
    import numpy as np

    for cycle, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UndecidableError(f"cycle {cycle}{side} is {value:g}, and ratios need values above 0")
    return np.array([math.log(values[cycle]) for cycle in sorted(values)])


def _exp(log: float) -> float:
    return math.exp(max(-_MAX_LOG, min(log, _MAX_LOG)))
