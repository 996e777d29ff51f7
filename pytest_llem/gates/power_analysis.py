"""Estimate before a run what its regression gates will detect, and how many cycles they need."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pytest_llem.gates.decisions import MAX_CYCLES
from pytest_llem.gates.eligibility import PER_TOKEN_TIME
from pytest_llem.gates.sequential import Schedule
from pytest_llem.gates.ttests import welch
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.design import StudyConfig

if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array

#: Power of all estimates in the plan.
POWER = 0.9

#: Larger minimum detectable effects, as relative changes, are reported as "no change".
MAX_REPORTED = 10.0

#: Typical coefficients of variation between cycles, for device-bound and Python-bound loads, used until a
#: reference has been measured.
TYPICAL = (0.005, 0.02)

#: Relative changes for which an expected number of cycles is shown, unless delta tolerates them.
_SHOWN_CHANGES = (0.2, 0.1, 0.05)

#: Largest change that :func:`detectable` returns, as the logarithm of a ratio.
_MAX_LOG_CHANGE = math.log(1000)

#: Number of simulated runs for an expected number of cycles.
_SIMULATED_RUNS = 4000


def minimum_detectable_effects(study: StudyConfig, reference: StudyResult | None) -> list[str]:
    """Return the plan's lines on the smallest changes that the regression gates of *study* will detect.

    Args:
        study: The candidate's study.
        reference: The saved result; None if candidate and reference are interleaved.
    """
    gates, n = study.gates, study.n_cycles
    family = len(study.family)
    n_reference = n if reference is None else _median_cycles(reference)
    if min(n, n_reference) < 2:
        side = "candidate" if n < 2 else "reference"
        return [
            f"gates: one cycle in the {side} decides nothing: every comparison will be INCONCLUSIVE "
            "(execution.n_cycles, --llem-cycles)"
        ]
    schedule = Schedule(study.min_cycles, n) if study.execution.until_decided else None
    effects = []
    for metric, delta, cv in _spreads(study, reference):
        change = detectable(
            cv,
            n,
            n_reference,
            delta=delta,
            # The power of the last look alone: that of all looks together is not less.
            alpha=gates.alpha if schedule is None else gates.alpha * schedule.share,
            power=POWER,
            family=family,
            paired=reference is None,
        )
        size = "no change" if change is None or change > MAX_REPORTED else f"{change:.1%}"
        effects.append(f"{size}{metric} if cycles vary by {cv:.1%}")
    cycles = f"{n} interleaved cycles" if reference is None else f"{n} cycles against {n_reference}"
    if schedule is not None:
        cycles = f"up to {cycles}, judged {len(schedule.sizes)} times,"
    how = f"power {POWER:.0%}, α {gates.alpha:g}, Holm over {family}"
    return [f"gates: {cycles} detect a change of ({how}):", *(f"  {effect}" for effect in effects)]


def _spreads(study: StudyConfig, reference: StudyResult | None) -> Iterator[tuple[str, float, float]]:
    """Yield the name in the plan's line, delta and largest coefficient of variation of each compared metric.

    If no spread is known, yield the typical ones, with an empty text and the smallest delta.
    """
    gates = study.gates
    known = []
    for metric in dict.fromkeys(study.family):
        judged, cvs = metric, _variations(metric, reference)
        # A default gate judges another metric if the server sends several tokens at a time.
        if not cvs and gates.metrics is None and metric in PER_TOKEN_TIME:
            judged = PER_TOKEN_TIME[metric]
            cvs = _variations(judged, reference)
        if cvs:
            known.append((f" of {judged}", gates.delta_of(metric), max(cvs)))
    delta = min(map(gates.delta_of, study.family))
    yield from known or [("", delta, cv) for cv in TYPICAL]


def _variations(metric: str, reference: StudyResult | None) -> list[float]:
    """Return a metric's known coefficients of variation, one for each point; empty if it is missing in a point."""
    points = [] if reference is None else reference.points
    if not all(metric in point.metrics for point in points):
        return []
    return [cv for point in points if (cv := point.metrics[metric].cv) is not None]


def _median_cycles(reference: StudyResult) -> int:
    return int(statistics.median(len(point.cycles) for point in reference.points)) if reference.points else 0


def expected_cycles(study: StudyConfig, duration: str | None) -> list[str]:
    """Return the plan's lines on how many cycles an interleaved study with ``n_cycles: auto`` is expected to run.

    Args:
        study: The candidate's study.
        duration: Estimated time for one cycle of one point of candidate and reference, as text; None if unknown.
    """
    gates, execution = study.gates, study.execution
    schedule = Schedule(execution.min_cycles, execution.max_cycles)
    family, delta = len(study.family), min(map(gates.delta_of, study.family))
    each = "" if duration is None else f", about {duration} each"
    lines = [
        f"gates: {schedule.min_cycles} to {schedule.max_cycles} interleaved cycles{each}, until decided "
        f"(α {gates.alpha:g}, Holm over {family}):"
    ]
    for spread in TYPICAL:
        changes = {f"a change of {change:.0%}": change for change in _SHOWN_CHANGES if change > delta}
        if delta:
            changes["no change"] = 0.0
        parts = []
        for name, change in changes.items():
            needed = cycles_needed(
                spread, delta=delta, change=change, alpha=gates.alpha, schedule=schedule, family=family
            )
            too_many = needed.fixed is None or needed.fixed > schedule.max_cycles
            number = f"more than {schedule.max_cycles}" if too_many else f"{needed.sequential:.0f}"
            parts.append(f"{name}: {number}")
        lines.append(f"  {', '.join(parts)} cycles if pairs vary by {spread:.1%}")
    return lines


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
    """
    if min(n, n_reference) < 2:
        return None
    change = math.log1p(delta) + _spread(cv) * _distance(n, n_reference, alpha / family, power, paired)
    return math.expm1(change) if change <= _MAX_LOG_CHANGE else None


def _spread(cv: float) -> float:
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
        normal: If the number is fixed in advance and the spread is known, by the normal distribution; None above
            1,000.
        fixed: If the number is fixed in advance and the spread is estimated, by Student's t; None above 1,000.
        sequential: Mean number with a schedule, by simulation. A run that ends undecided counts with the maximum.
    """

    normal: int | None
    fixed: int | None
    sequential: float


@lru_cache(maxsize=256)  # studies of one session often have the same settings
def cycles_needed(
    spread: float,
    *,
    delta: float,
    change: float,
    alpha: float,
    schedule: Schedule,
    family: int = 1,
    power: float = POWER,
) -> CyclesNeeded:
    """Return how many pairs of cycles a gate needs for the right verdict.

    Args:
        spread: Standard deviation of a pair's log ratio, above 0.
        delta: Relative change that is tolerated.
        change: The true relative worsening. Above delta the right verdict is REGRESSION, otherwise SAME.
        alpha: Probability of a false alarm.
        schedule: When gates are judged.
        family: Number of gates judged together, of which only this one has a change.
        power: Probability of the right verdict for a number of cycles that is fixed in advance.

    Example:
        >>> cycles_needed(0.02, delta=0.02, change=0.05, alpha=0.01, schedule=Schedule(4, 40)).fixed
        10
    """
    margin, log_change = math.log1p(delta), math.log1p(change)
    if change > delta:
        bounds, level = ((margin - log_change) / spread, math.inf), alpha / family
    else:
        bounds, level = ((-margin - log_change) / spread, (margin - log_change) / spread), alpha
    return CyclesNeeded(
        _first_enough(lambda n: _power_normal(n, bounds, level) >= power),
        _first_enough(lambda n: _power_t(n, bounds, level) >= power),
        _simulated_mean(bounds, level, schedule),
    )


#: The verdict is right if the interval of the log ratio lies between these two values. They are relative to the
#: true log ratio, in standard deviations of a pair's log ratio.
_Bounds = tuple[float, float]


def _power_normal(n: int, bounds: _Bounds, level: float) -> float:
    from scipy.special import ndtri

    return float(_probability_between(n, bounds, -ndtri(level) / math.sqrt(n)))


def _power_t(n: int, bounds: _Bounds, level: float) -> float:
    """Return the power for a known spread, averaged over the distribution of the sample's spread."""
    import numpy as np
    from scipy.special import chdtri, stdtrit

    nodes, weights = _quadrature()
    half_width = -stdtrit(n - 1, level) * np.sqrt(chdtri(n - 1, nodes) / (n - 1) / n)
    return float(np.sum(weights * _probability_between(n, bounds, half_width)))


def _probability_between(n: int, bounds: _Bounds, half_width: Array) -> Array:
    """Return the probability that the interval of the mean of n pairs lies between the bounds."""
    import numpy as np
    from scipy.special import ndtr

    low, high = bounds
    between = ndtr((high - half_width) * math.sqrt(n)) - ndtr((low + half_width) * math.sqrt(n))
    return np.asarray(np.maximum(0.0, between))


def _first_enough(is_enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of cycles that is enough; None if 1,000 are not."""
    found = bisect_left(range(2, MAX_CYCLES + 1), True, key=is_enough) + 2
    return found if found <= MAX_CYCLES else None


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
