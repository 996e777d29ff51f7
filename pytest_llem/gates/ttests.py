"""t-tests of logarithms over arrays, so that gates and simulations of thousands of samples use the same code.

The last axis of samples holds cycles; the last axis of all other arrays holds a family of gates, which Holm's
procedure adjusts together. Arrays over looks have one more axis in front, for the numbers of cycles after
which the same gates were judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Numbers = Array | NDArray[np.int_] | float

#: Relative differences below this are rounding errors: the mean of equal values may be off by a unit in the last
#: place, and nothing must be divided by that.
EPS = 1e-12


class Estimate(NamedTuple):
    """An estimate of the difference of two means of logarithms, candidate less reference.

    Attributes:
        log_ratio: The difference.
        standard_error: Standard error of ``log_ratio``; 0 if the samples have no spread.
        degrees: Degrees of freedom of ``standard_error``.
    """

    log_ratio: Array
    standard_error: Array
    degrees: Array


class Judgement(NamedTuple):
    """Judgement of changes, which are for the worse if above 0.

    Attributes:
        p_worse: One-sided p of no change for the worse beyond the margin, adjusted over the family.
        p_better: One-sided p of no change for the better beyond the margin, adjusted over the family.
        worse: Whether there is a change for the worse beyond the margin, at alpha over the family.
        better: Whether there is a change for the better beyond the margin, at alpha over the family.
        same: Whether the change lies within the margin, at alpha.
    """

    p_worse: Array
    p_better: Array
    worse: NDArray[np.bool_]
    better: NDArray[np.bool_]
    same: NDArray[np.bool_]


def variance(logs: Array) -> Array:
    """Return the sample variance over the last axis; 0 if it is only rounding error."""
    import numpy as np

    found = np.var(logs, axis=-1, ddof=1)
    return np.where(found > EPS**2, found, 0.0)


def unpaired_estimate(candidate: Array, reference: Array) -> Estimate:
    """Return the estimate from two independent samples of logarithms."""
    difference = candidate.mean(axis=-1) - reference.mean(axis=-1)
    sizes = candidate.shape[-1], reference.shape[-1]
    return Estimate(difference, *welch(variance(candidate), sizes[0], variance(reference), sizes[1]))


def paired_estimate(differences: Array) -> Estimate:
    """Return the estimate from differences of logarithms within pairs of cycles."""
    import numpy as np

    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    return Estimate(mean, np.sqrt(variance(differences) / n), np.full_like(mean, n - 1.0))


def welch(variance_1: Numbers, n_1: Numbers, variance_2: Numbers, n_2: Numbers) -> tuple[Array, Array]:
    """Return standard error and degrees of freedom of a difference of means, from variances and sizes of samples.

    They are Welch's and Satterthwaite's (B. L. Welch, Biometrika 34, 1947), with two bounds that matter if the
    sizes differ: the error is at least that of the pooled variance, and the degrees are at most those of two
    samples of the smaller size. Without them, Welch's test raises too many false alarms when the smaller sample,
    which weighs most, has little spread by chance: for 3 values against 20 from one normal distribution, 2.2 % at
    a nominal 1 %, and 18 times alpha at 0.02 %, a level that Holm's procedure uses. For equal sizes the bounds
    change nothing.
    """
    import numpy as np

    var1, n1, var2, n2 = (np.asarray(given, dtype=float) for given in (variance_1, n_1, variance_2, n_2))
    of_mean1, of_mean2 = var1 / n1, var2 / n2
    total = np.asarray(of_mean1 + of_mean2)
    pooled = ((n1 - 1) * var1 + (n2 - 1) * var2) / (n1 + n2 - 2)
    scatter = of_mean1**2 / (n1 - 1) + of_mean2**2 / (n2 - 1)
    degrees = np.divide(total**2, scatter, out=np.full_like(total, np.inf), where=total > 0)
    error = np.sqrt(np.maximum(total, pooled * (1 / n1 + 1 / n2)))
    return error, np.minimum(degrees, 2.0 * (np.minimum(n1, n2) - 1))


def judge(worsening: Array, standard_error: Array, degrees: Array, margin: Numbers, alpha: float) -> Judgement:
    """Judge changes against *margin*, each family along the last axis: :func:`judge_looks` with a single look."""
    import numpy as np

    worsening, standard_error, degrees = (np.asarray(one)[None] for one in (worsening, standard_error, degrees))
    return judge_looks(worsening, standard_error, degrees, margin, alpha, shares=1.0)


def judge_looks(
    worsening: Array, standard_error: Array, degrees: Array, margin: Numbers, alpha: float, *, shares: Numbers
) -> Judgement:
    """Judge changes against *margin* at each look, each family along the last axis.

    Each direction is a family of its own for Holm's procedure. ``same`` is two one-sided tests (D. J.
    Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): the two-sided interval at 1 − 2 · alpha lies inside the
    margin. It needs no adjustment: the probability that a whole family is called the same although one is not is
    at most alpha.

    Args:
        worsening: Differences of logarithms, above 0 if the candidate is worse; the first axis holds looks.
        standard_error: Standard error of each difference.
        degrees: Degrees of freedom of each standard error.
        margin: Difference of logarithms, 0 or more, that does not count.
        alpha: Probability of a false alarm, below 0.5.
        shares: Part of its level that a gate spends at each look, see :func:`over_looks`.
    """
    import numpy as np

    p_worse = p_beyond(worsening, standard_error, degrees, margin)
    p_better = p_beyond(-worsening, standard_error, degrees, margin)
    same = over_looks(1 - np.minimum(p_worse, p_better), shares) <= alpha
    p_worse, p_better = holm(over_looks(p_worse, shares)), holm(over_looks(p_better, shares))
    return Judgement(p_worse, p_better, p_worse <= alpha, p_better <= alpha, same)


def over_looks(p: Array, shares: Numbers) -> Array:
    """Return one p for all looks, along the first axis: the smallest p ÷ share.

    Like each *p*, it is below a level with at most that probability if nothing has changed, whenever one stops
    looking, since the shares of a gate add up to at most 1 (Bonferroni). That holds at any level, so also for
    those of Holm's procedure. It can only become smaller with more looks.
    """
    import numpy as np

    return np.asarray(np.minimum(1.0, np.min(p / shares, axis=0)))


def holm(p: Array) -> Array:
    """Return *p* adjusted along the last axis, to be compared with alpha (S. Holm, Scand. J. Statist. 6, 1979)."""
    import numpy as np

    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1)
    return adjusted


def holm_levels(p: Array, significant: NDArray[np.bool_], alpha: float) -> Array:
    """Return the level that Holm's procedure compared each *p* of one family with.

    The smallest p gets alpha ÷ their number, each further one a larger part. From the first that is not
    *significant* on, all get the same part.

    Args:
        p: One-sided p, not adjusted, in one dimension.
        significant: Whether each p is at or below its level.
        alpha: Level of the family.
    """
    import numpy as np

    levels = np.empty(len(p))
    levels[np.argsort(p, kind="stable")] = alpha / np.arange(len(p), 0, -1)
    remaining = int((~significant).sum())
    return np.where(significant, levels, alpha / max(1, remaining))


def p_beyond(change: Array, standard_error: Array, degrees: Array, margin: Numbers) -> Array:
    """Return one-sided p of the hypothesis that a *change* is at most *margin*.

    Without spread, p is 0 if the change is beyond the margin and 1 if it is not; a change equal to the margin is
    not.
    """
    import numpy as np
    from scipy.special import stdtr

    distance = change - np.asarray(margin, dtype=float)
    certain = np.where(distance > EPS, np.inf, -np.inf)
    t = np.divide(distance, standard_error, out=certain, where=standard_error > 0)
    return np.asarray(stdtr(degrees, -t))
