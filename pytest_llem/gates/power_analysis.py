"""What regression gates will detect, and how many cycles they need, estimated before anything is measured."""

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

POWER = 0.9

#: Larger minimum detectable effects, as relative changes, are reported as "nothing".
MAX_REPORTED = 10.0

#: Typical coefficients of variation between cycles, for device-bound and Python-bound loads, used until a
#: reference has been measured.
TYPICAL = (0.005, 0.02)

#: Relative changes for which an expected number of cycles is shown, as far as they exceed delta.
_CHANGES = (0.2, 0.1, 0.05)

#: Larger changes, as logarithms of the ratio, are not looked for.
_MAX_LOG_CHANGE = math.log(1000)

#: Simulated paths for an expected number of cycles.
_PATHS = 4000


def minimum_detectable_effects(study: StudyConfig, reference: StudyResult | None) -> list[str]:
    """Return lines with the smallest changes that the regression gates of *study* will detect.

    Args:
        study: The candidate's study.
        reference: The saved result; None if the reference is interleaved with the candidate.
    """
    gates, n = study.gates, study.n_cycles
    family = len(study.family)
    n_reference = n if reference is None else _cycles(reference)
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
            alpha=gates.alpha if schedule is None else gates.alpha * schedule.share,  # by the last look
            power=POWER,
            family=family,
            paired=reference is None,
        )
        size = "nothing" if change is None or change > MAX_REPORTED else f"{change:.1%}"
        effects.append(f"{size}{metric} if cycles vary by {cv:.1%}")
    cycles = f"{n} interleaved cycles" if reference is None else f"{n} cycles against {n_reference}"
    if schedule is not None:
        cycles = f"up to {cycles}, judged {len(schedule.sizes)} times,"
    how = f"power {POWER:.0%}, α {gates.alpha:g}, Holm over {family}"
    return [f"gates: {cycles} detect a change of ({how}):", *(f"  {effect}" for effect in effects)]


def _spreads(study: StudyConfig, reference: StudyResult | None) -> Iterator[tuple[str, float, float]]:
    """Yield a metric's name, its delta, and the largest coefficient of variation of any point."""
    gates = study.gates
    found = []
    for metric in dict.fromkeys(study.family):
        judged, spreads = metric, _variations(metric, reference)
        if not spreads and gates.metrics is None and metric in PER_TOKEN_TIME:
            judged = PER_TOKEN_TIME[metric]  # by a default gate, if the server sends several tokens at a time
            spreads = _variations(judged, reference)
        if spreads:
            found.append((f" of {judged}", gates.delta_of(metric), max(spreads)))
    delta = min(map(gates.delta_of, study.family))
    yield from found or [("", delta, cv) for cv in TYPICAL]


def _variations(metric: str, reference: StudyResult | None) -> list[float]:
    """Return the known coefficients of variation of a metric over the points; none if a point does not have it."""
    points = [] if reference is None else reference.points
    if not all(metric in point.metrics for point in points):
        return []
    return [cv for point in points if (cv := point.metrics[metric].cv) is not None]


def _cycles(reference: StudyResult) -> int:
    return int(statistics.median(len(point.cycles) for point in reference.points)) if reference.points else 0


def expected_cycles(study: StudyConfig, duration: str | None) -> list[str]:
    """Return lines with the expected numbers of cycles of an interleaved study whose cycles run until decided.

    Args:
        study: The candidate's study.
        duration: Estimated time of a cycle of one point on both sides, as text; None if unknown.
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
        changes = {f"a change of {change:.0%}": change for change in _CHANGES if change > delta}
        if delta:
            changes["no change"] = 0.0
        parts = []
        for name, change in changes.items():
            wanted = cycles_needed(
                spread, delta=delta, change=change, alpha=gates.alpha, schedule=schedule, family=family
            )
            many = wanted.fixed is None or wanted.fixed > schedule.max_cycles
            parts.append(f"{name}: {f'more than {schedule.max_cycles}' if many else f'{wanted.sequential:.0f}'}")
        lines.append(f"  {', '.join(parts)} cycles if pairs vary by {spread:.1%}")
    return lines


def detectable(
    cv: float,
    n: int,
    n_reference: int,
    *,
    delta: float,
    alpha: float,
    power: float = 0.9,
    family: int = 1,
    paired: bool = False,
) -> float | None:
    """Return the relative change for the worse that the gate calls a regression with probability *power*.

    0.035 is 3.5 % more if lower is better, and 1 / 1.035 if higher is better.

    Args:
        cv: Coefficient of variation of the cycles' values, the same on both sides. Cycles are assumed to be
            independent, even within a pair: pairing removes what they have in common.
        n: Number of the candidate's cycles.
        n_reference: Number of the reference's cycles.
        delta: Relative change that does not count.
        alpha: Probability of a false alarm.
        power: Probability of detection, between 0 and 1.
        family: Number of gates judged together. Only this gate has a change, so that it has to pass the first step
            of Holm's procedure, alpha / family.
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
    """Return how far beyond the margin a change has to be, in standard deviations of a cycle's logarithm.

    The estimate is normal, and independent of its standard error. So the power is the power for a known standard
    error, averaged over the distribution of that error; this is exact except for the quadrature.
    """
    import numpy as np
    from scipy.special import ndtr

    if paired:
        n = n_reference = min(n, n_reference)
    scale = math.sqrt(1 / n + 1 / n_reference)
    threshold, weight = _paired(n, alpha) if paired else _unpaired(n, n_reference, alpha)

    def found(distance: float) -> bool:
        return bool(np.sum(weight * ndtr((distance - threshold) / scale)) >= power)

    low, high = 0.0, 1.0
    while not found(high):
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _unpaired(n: int, n_reference: int, alpha: float) -> tuple[Array, Array]:
    """Return thresholds of the estimate, over shares and totals of the sums of squares, and their weights.

    For two samples from one distribution, the share of one in the sum of squares is independent of the total.
    """
    import numpy as np
    from scipy.special import betaincinv, chdtri, stdtrit

    at, weight = _quadrature()
    share = betaincinv((n - 1) / 2, (n_reference - 1) / 2, at)
    error, degrees = welch(share / (n - 1), n, (1 - share) / (n_reference - 1), n_reference)
    total = np.sqrt(chdtri(n + n_reference - 2, at))
    return np.outer(-stdtrit(degrees, alpha) * error, total), np.outer(weight, weight)


def _paired(n: int, alpha: float) -> tuple[Array, Array]:
    """Return thresholds of the estimate from pairs, over the sum of squares, and their weights."""
    import numpy as np
    from scipy.special import chdtri, stdtrit

    at, weight = _quadrature()
    error = np.sqrt(2 * chdtri(n - 1, at) / (n - 1) / n)
    return np.asarray(-stdtrit(n - 1, alpha) * error), weight


class CyclesNeeded(NamedTuple):
    """Numbers of pairs of cycles until a gate is decided.

    Attributes:
        normal: With a number that is fixed in advance and a known spread, by the normal distribution.
        fixed: With a number that is fixed in advance, by Student's t.
        sequential: Mean number with a schedule, by simulation. Cycles that end undecided count with its maximum.
    """

    normal: int | None
    fixed: int | None
    sequential: float


@lru_cache(maxsize=256)  # the plan asks for each point and metric
def cycles_needed(
    spread: float,
    *,
    delta: float,
    change: float,
    alpha: float,
    schedule: Schedule,
    family: int = 1,
    power: float = 0.9,
) -> CyclesNeeded:
    """Return how many pairs of cycles a gate needs for the right verdict, in theory and with a schedule.

    Args:
        spread: Standard deviation of a pair's log ratio, above 0.
        delta: Relative change that does not count.
        change: The true relative worsening: above delta for REGRESSION, within it for SAME.
        alpha: Probability of a false alarm.
        schedule: When gates are judged.
        family: Number of gates judged together, of which only this one has a change.
        power: Probability of the right verdict in theory.

    Returns:
        The numbers; None for a number in theory above 1,000.

    Example:
        >>> cycles_needed(0.02, delta=0.02, change=0.05, alpha=0.01, schedule=Schedule(4, 40)).fixed
        10
    """
    margin, true = math.log1p(delta), math.log1p(change)
    if change > delta:
        bounds, level = ((margin - true) / spread, math.inf), alpha / family
    else:
        bounds, level = ((-margin - true) / spread, (margin - true) / spread), alpha
    return CyclesNeeded(
        _first_enough(lambda n: _power_normal(n, bounds, level) >= power),
        _first_enough(lambda n: _power_of_t(n, bounds, level) >= power),
        _expected(bounds, level, schedule),
    )


#: Distances from the true change in standard deviations of a pair, between which an interval has to lie.
_Bounds = tuple[float, float]


def _power_normal(n: int, bounds: _Bounds, level: float) -> float:
    from scipy.special import ndtri

    return float(_probability_between(n, bounds, -ndtri(level) / math.sqrt(n)))


def _power_of_t(n: int, bounds: _Bounds, level: float) -> float:
    """Return the power for a known spread, averaged over the distribution of the sample's spread."""
    import numpy as np
    from scipy.special import chdtri, stdtrit

    at, weight = _quadrature()
    half = -stdtrit(n - 1, level) * np.sqrt(chdtri(n - 1, at) / (n - 1) / n)
    return float(np.sum(weight * _probability_between(n, bounds, half)))


def _probability_between(n: int, bounds: _Bounds, half: Array) -> Array:
    """Return the probability that a mean of n values is further inside the bounds than *half*."""
    import numpy as np
    from scipy.special import ndtr

    low, high = bounds
    between = ndtr((high - half) * math.sqrt(n)) - ndtr((low + half) * math.sqrt(n))
    return np.asarray(np.maximum(0.0, between))


def _first_enough(is_enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of cycles that is enough; None if 1,000 are not."""
    found = bisect_left(range(2, MAX_CYCLES + 1), True, key=is_enough) + 2
    return found if found <= MAX_CYCLES else None


def _expected(bounds: _Bounds, level: float, schedule: Schedule) -> float:
    """Return the mean number of cycles until the rule decides."""
    import numpy as np
    from scipy.special import stdtrit

    low, high = bounds
    values = np.random.default_rng(0).standard_normal((_PATHS, schedule.max_cycles))
    stopped = np.full(_PATHS, schedule.max_cycles)
    for size in reversed(schedule.sizes):
        so_far = values[:, :size]
        half = -stdtrit(size - 1, level * schedule.share) * so_far.std(axis=1, ddof=1) / math.sqrt(size)
        mean = so_far.mean(axis=1)
        stopped[(mean - half > low) & (mean + half < high)] = size
    return float(stopped.mean())


def _quadrature() -> tuple[Array, Array]:
    """Return the nodes of Gauss–Legendre quadrature on 0 to 1, and their weights, whose sum is 1."""
    import numpy as np

    at, weight = np.polynomial.legendre.leggauss(64)
    return (at + 1) / 2, weight / 2
