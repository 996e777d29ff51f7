"""t-tests of logarithms, over arrays: one pair of samples is judged by the same lines as a simulation's thousands.

The last axis of samples holds cycles; that of everything else holds the family of gates that is judged together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Numbers = Array | NDArray[np.int_] | float

#: Relative differences below this are rounding, and none that was measured: the mean of values that are all alike
#: may be off by a unit in the last place, and nothing must be divided by that.
EPS = 1e-12


class Estimate(NamedTuple):
    """A difference of two means of logarithms, candidate less reference.

    Attributes:
        log_ratio: The difference.
        standard_error: Of it; 0 where the samples have no spread.
        degrees: Degrees of freedom of the standard error.
    """

    log_ratio: Array
    standard_error: Array
    degrees: Array


class Judgement(NamedTuple):
    """What there is to say of changes, of which above 0 is for the worse.

    Attributes:
        p_worse: Of there being no change for the worse beyond the margin; one-sided, adjusted over the family.
        p_better: Likewise for the better.
        worse: There is one, at alpha over the family.
        better: Likewise.
        same: The change lies within the margin either way, at alpha.
    """

    p_worse: Array
    p_better: Array
    worse: NDArray[np.bool_]
    better: NDArray[np.bool_]
    same: NDArray[np.bool_]


def variance(logs: Array) -> Array:
    """Return the sample variance over the last axis; 0 where it is rounding."""
    import numpy as np

    found = np.var(logs, axis=-1, ddof=1)
    return np.where(found > EPS**2, found, 0.0)


def unpaired_estimate(candidate: Array, reference: Array) -> Estimate:
    """Return the estimate of two samples of logarithms that have nothing to do with each other."""
    difference = candidate.mean(axis=-1) - reference.mean(axis=-1)
    sizes = candidate.shape[-1], reference.shape[-1]
    return Estimate(difference, *welch(variance(candidate), sizes[0], variance(reference), sizes[1]))


def paired_estimate(differences: Array) -> Estimate:
    """Return the estimate of logarithms that were subtracted cycle by cycle."""
    import numpy as np

    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    return Estimate(mean, np.sqrt(variance(differences) / n), np.full_like(mean, n - 1.0))


def welch(of_one: Numbers, n: Numbers, of_other: Numbers, n_other: Numbers) -> tuple[Array, Array]:
    """Return standard error and degrees of freedom of a difference of means, from variances and sizes of samples.

    They are Welch's and Satterthwaite's (B. L. Welch, Biometrika 34, 1947), bounded where the sizes differ: the
    error is at least that of the pooled variance, and the degrees are at most those of two samples of the smaller
    size. Welch's test alone raises false alarms there, namely where the smaller sample, which weighs most, has
    little spread by chance: with 3 values against 20 from one normal distribution 2.2 % at a nominal 1 %, and 18
    times alpha at 0.02 %, as Holm's procedure has it. For equal sizes the bounds change nothing.
    """
    import numpy as np

    one, size, other, other_size = (np.asarray(given, dtype=float) for given in (of_one, n, of_other, n_other))
    of_mean, of_other_mean = one / size, other / other_size
    total = np.asarray(of_mean + of_other_mean)
    pooled = ((size - 1) * one + (other_size - 1) * other) / (size + other_size - 2)
    most = 2.0 * (np.minimum(size, other_size) - 1)
    scatter = of_mean**2 / (size - 1) + of_other_mean**2 / (other_size - 1)
    degrees = np.divide(total**2, scatter, out=np.full_like(total, np.inf), where=total > 0)
    error = np.sqrt(np.maximum(total, pooled * (1 / size + 1 / other_size)))
    return error, np.minimum(degrees, most)


def judge(worsening: Array, standard_error: Array, degrees: Array, margin: Numbers, alpha: float) -> Judgement:
    """Judge changes against *margin*, each family along the last axis.

    Either direction is a family of its own for Holm's procedure. ``same`` is two one-sided tests (D. J.
    Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): the two-sided interval at 1 − 2 · alpha lies inside the
    margin. It needs no adjustment: the chance that all of a family are called the same, where one is not, is alpha
    at most.

    Args:
        worsening: Differences of logarithms, above 0 where the candidate is worse.
        standard_error: Of each.
        degrees: Of each standard error.
        margin: Difference of logarithms, 0 or more, that does not count.
        alpha: Of false alarms, below 0.5.
    """
    p_worse = p_beyond(worsening, standard_error, degrees, margin)
    p_better = p_beyond(-worsening, standard_error, degrees, margin)
    same = (1 - p_worse <= alpha) & (1 - p_better <= alpha)
    p_worse, p_better = holm(p_worse), holm(p_better)
    return Judgement(p_worse, p_better, p_worse <= alpha, p_better <= alpha, same)


def holm(p: Array) -> Array:
    """Return *p* adjusted along the last axis, to be held against alpha (S. Holm, Scand. J. Statist. 6, 1979)."""
    import numpy as np

    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1)
    return adjusted


def holm_levels(p: Array, found: NDArray[np.bool_], alpha: float) -> Array:
    """Return the level that Holm's procedure held each *p* of one family against: the first gets alpha ÷ their
    number, each further one a larger part, and all from the first that is not *found* the same.

    Args:
        p: One-sided, not adjusted, in one dimension.
        found: Which of them are below their level.
        alpha: Of the family.
    """
    import numpy as np

    levels = np.empty(len(p))
    levels[np.argsort(p, kind="stable")] = alpha / np.arange(len(p), 0, -1)
    left = int((~found).sum())
    return np.where(found, levels, alpha / max(1, left))


def p_beyond(change: Array, standard_error: Array, degrees: Array, margin: Numbers) -> Array:
    """Return p of a *change* that is *margin* at most.

    Without spread there is no doubt: it is beyond or it is not, and one that is the margin itself is not.
    """
    import numpy as np
    from scipy.special import stdtr

    distance = change - np.asarray(margin, dtype=float)
    certain = np.where(distance > EPS, np.inf, -np.inf)
    t = np.divide(distance, standard_error, out=certain, where=standard_error > 0)
    return np.asarray(stdtr(degrees, -t))
