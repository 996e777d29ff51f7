"""Compute the power of regression gates: the change that they detect, and the number of cycles that they need."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pytest_llem.gates.decisions import MAX_CYCLES
from pytest_llem.gates.sequential import Schedule
from pytest_llem.gates.ttests import welch

if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array

#: Power of all estimates, unless another is given.
POWER = 0.9

#: Largest change that :func:`detectable` returns, as the logarithm of a ratio.
_MAX_LOG_CHANGE = math.log(1000)

#: Number of simulated runs for an expected number of cycles.
_SIMULATED_RUNS = 4000


def detectable(
    cv: float,
    n: int,
    n_reference: int,
    *,
    delta: float,
    alpha: float,
    power: float = POWER,
    family: int = 1,
    paired: bool = False,
) -> float | None:
    """Return the smallest relative worsening for which a gate's verdict is REGRESSION with probability *power*.

    0.035 means: the metric is multiplied by 1.035 if lower is better, and divided by 1.035 if higher is better.

    Args:
        cv: Coefficient of variation of the cycles' values, the same on both sides. For pairs, of what the two
            cycles of a pair do not have in common.
        n: Number of the candidate's cycles.
        n_reference: Number of the reference's cycles.
        delta: Relative change that is tolerated.
        alpha: Probability of a false alarm.
        power: Probability of detection, between 0 and 1.
        family: Number of gates judged together. Only this gate's metric is assumed to have changed, so that its
            level is that of the first step of Holm's procedure, alpha / family.
        paired: Whether the cycles are compared in pairs, as many as both sides have.

    Returns:
        The change; None for fewer than two cycles on a side, or if not even a thousandfold change is detected.

    Example:
        >>> round(detectable(0.01, 5, 5, delta=0.02, alpha=0.01), 3)
        0.05
    """
    if min(n, n_reference) < 2:
        return None
    change = math.log1p(delta) + _log_sd(cv) * _distance(n, n_reference, alpha / family, power, paired)
    return math.expm1(change) if change <= _MAX_LOG_CHANGE else None


def _log_sd(cv: float) -> float:
    """Return the standard deviation of the logarithm of a lognormal value."""
    return math.sqrt(math.log1p(cv * cv))


@lru_cache(maxsize=1024)  # called for every gate, and all gates of a study have the same number of cycles
def _distance(n: int, n_reference: int, alpha: float, power: float, paired: bool) -> float:
    """Return how far beyond delta a change has to be, in standard deviations of the logarithm of a cycle's value.

    The estimated log ratio is normally distributed, and independent of its standard error. So the power is that
    for a known standard error, averaged over the distribution of the standard error. Only the quadrature is
    approximate.
    """
    import numpy as np
    from scipy.special import ndtr

    if paired:
        n = n_reference = min(n, n_reference)
    scale = math.sqrt(1 / n + 1 / n_reference)
    thresholds, weights = _paired_thresholds(n, alpha) if paired else _unpaired_thresholds(n, n_reference, alpha)

    def is_detected(distance: float) -> bool:
        return bool(np.sum(weights * ndtr((distance - thresholds) / scale)) >= power)

    low, high = 0.0, 1.0
    while not is_detected(high):
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_detected(middle) else (middle, high)
    return high


def _unpaired_thresholds(n: int, n_reference: int, alpha: float) -> tuple[Array, Array]:
    """Return the thresholds of REGRESSION at the nodes of a quadrature, and the weights of the nodes.

    A threshold is how far beyond delta the estimate has to be, in the unit of :func:`_distance`. It depends on the
    standard error, which follows from the sums of squares of the two samples. For samples from one normal
    distribution, the share of one sample in their total has a beta distribution, the total a chi-squared
    distribution, and the two are independent. So the quadrature is over shares × totals.
    """
    import numpy as np
    from scipy.special import betaincinv, chdtri, stdtrit

    nodes, weights = _quadrature()
    share = betaincinv((n - 1) / 2, (n_reference - 1) / 2, nodes)
    error, degrees = welch(share / (n - 1), n, (1 - share) / (n_reference - 1), n_reference)
    root_of_total = np.sqrt(chdtri(n + n_reference - 2, nodes))
    return np.outer(-stdtrit(degrees, alpha) * error, root_of_total), np.outer(weights, weights)


def _paired_thresholds(n: int, alpha: float) -> tuple[Array, Array]:
    """Return the same as :func:`_unpaired_thresholds`, for an estimate from pairs of cycles."""
    import numpy as np
    from scipy.special import chdtri, stdtrit

    nodes, weights = _quadrature()
    error = np.sqrt(2 * chdtri(n - 1, nodes) / (n - 1) / n)
    return np.asarray(-stdtrit(n - 1, alpha) * error), weights


class CyclesNeeded(NamedTuple):
    """How many pairs of cycles a gate needs.

    Attributes:
        fixed: If the number is fixed in advance, for the right verdict with probability :data:`POWER`; None above
            1,000.
        sequential: Mean number with a schedule, by simulation. A run that ends undecided counts with the maximum.
    """

    fixed: int | None
    sequential: float


@lru_cache(maxsize=256)  # studies of one pytest run often have the same settings
def cycles_needed(
    spread: float,
    *,
    delta: float,
    change: float,
    alpha: float,
    schedule: Schedule,
    family: int = 1,
) -> CyclesNeeded:
    """Return how many pairs of cycles a gate needs for the right verdict.

    Args:
        spread: Standard deviation of a pair's log ratio, above 0.
        delta: Relative change that is tolerated.
        change: The true relative worsening. Above delta the right verdict is REGRESSION, otherwise SAME.
        alpha: Probability of a false alarm.
        schedule: When gates are judged.
        family: Number of gates judged together, of which only this one has a change.

    Example:
        >>> cycles_needed(0.02, delta=0.02, change=0.05, alpha=0.01, schedule=Schedule(4, 40)).fixed
        10
    """
    margin, log_change = math.log1p(delta), math.log1p(change)
    if change > delta:
        bounds, level = ((margin - log_change) / spread, math.inf), alpha / family
    else:
        bounds, level = ((-margin - log_change) / spread, (margin - log_change) / spread), alpha
    return CyclesNeeded(_fixed_number(bounds, level), _simulated_mean(bounds, level, schedule))


#: The verdict is right if the interval of the log ratio lies between these two values. They are relative to the
#: true log ratio, in standard deviations of a pair's log ratio.
_Bounds = tuple[float, float]


def _fixed_number(bounds: _Bounds, level: float) -> int | None:
    """Return the smallest number of pairs with the power :data:`POWER`; None above 1,000."""
    found = bisect_left(range(2, MAX_CYCLES + 1), POWER, key=lambda n: _power(n, bounds, level)) + 2
    return found if found <= MAX_CYCLES else None


def _power(n: int, bounds: _Bounds, level: float) -> float:
    """Return the probability of the right verdict with *n* pairs, averaged over the sample's possible spreads."""
    import numpy as np
    from scipy.special import chdtri, ndtr, stdtrit

    nodes, weights = _quadrature()
    half_width = -stdtrit(n - 1, level) * np.sqrt(chdtri(n - 1, nodes) / (n - 1) / n)
    low, high = bounds
    between = ndtr((high - half_width) * math.sqrt(n)) - ndtr((low + half_width) * math.sqrt(n))
    return float(np.sum(weights * np.maximum(0.0, between)))


def _simulated_mean(bounds: _Bounds, level: float, schedule: Schedule) -> float:
    """Return the mean number of pairs until a look decides. The seed is fixed, so that plans do not vary."""
    import numpy as np
    from scipy.special import stdtrit

    low, high = bounds
    values = np.random.default_rng(0).standard_normal((_SIMULATED_RUNS, schedule.max_cycles))
    n_until_decided = np.full(_SIMULATED_RUNS, schedule.max_cycles)
    for size in reversed(schedule.sizes):  # so that the first look that decides is written last
        so_far = values[:, :size]
        half_width = -stdtrit(size - 1, level * schedule.share) * so_far.std(axis=1, ddof=1) / math.sqrt(size)
        mean = so_far.mean(axis=1)
        n_until_decided[(mean - half_width > low) & (mean + half_width < high)] = size
    return float(n_until_decided.mean())


def _quadrature() -> tuple[Array, Array]:
    """Return the nodes of Gauss–Legendre quadrature on 0 to 1, and their weights, whose sum is 1."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(64)
    return (nodes + 1) / 2, weights / 2
