"""What a comparison will be able to tell, said before anything is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from pytest_llem.gates.ttests import welch
from pytest_llem.results.models import StudyResult
from pytest_llem.study.design import StudyConfig

POWER = 0.9

#: A gate that finds only larger changes than this finds nothing worth telling.
MOST = 10.0

#: Coefficients of variation, from cycle to cycle, of a load that the device bounds and of one that Python does:
#: what is said where nothing has been measured yet.
TYPICAL = (0.005, 0.02)


def minimum_detectable_effects(study: StudyConfig, reference: StudyResult | None) -> list[str]:
    """Return what the regression gates of *study* will find, a line each.

    Args:
        study: What is compared, with its number of cycles.
        reference: With what; None where that is measured in turns with it.
    """
    gates, n = study.gates, study.n_cycles
    family = len(gates.family) * len(study.points)
    n_reference = n if reference is None else _cycles(reference)
    if min(n, n_reference) < 2:
        side = "here" if n < 2 else "in the reference"
        return [
            f"gates: one cycle {side} decides nothing: every comparison will be INCONCLUSIVE "
            "(execution.n_cycles, --llem-cycles)"
        ]
    told = []
    for metric, delta, cv in _spreads(study, reference):
        change = detectable(
            cv,
            n,
            n_reference,
            delta=delta,
            alpha=gates.alpha,
            power=POWER,
            family=family,
            paired=reference is None,
        )
        size = "nothing" if change is None or change > MOST else f"{change:.1%}"
        told.append(f"{size}{metric} where cycles vary by {cv:.1%}")
    cycles = f"{n} cycles in turns" if reference is None else f"{n} cycles against {n_reference}"
    how = f"power {POWER:.0%}, α {gates.alpha:g}, Holm over {family}"
    return [f"gates: {cycles} find a change of ({how}):", *(f"  {one}" for one in told)]


def _spreads(study: StudyConfig, reference: StudyResult | None) -> Iterator[tuple[str, float, float]]:
    """Yield a metric's name, the change of it that does not count, and how far cycles vary; the widest point's."""
    gates = study.gates
    known = {
        metric: [cv for point in reference.points if (cv := point.metrics[metric].cv) is not None]
        for metric in gates.family
        if reference is not None and all(metric in point.metrics for point in reference.points)
    }
    if not any(known.values()):
        delta = min(map(gates.delta_of, gates.family))
        yield from (("", delta, cv) for cv in TYPICAL)
        return
    for metric, found in known.items():
        if found:
            yield f" of {metric}", gates.delta_of(metric), max(found)


def _cycles(reference: StudyResult) -> int:
    return int(statistics.median(len(point.cycles) for point in reference.points)) if reference.points else 0


if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array

#: A gate that would miss a change to a thousand times as much finds nothing.
_MOST = math.log(1000)


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

    0.035 is 3.5 % more of what had better be low, and 1 / 1.035 of what had better be high.

    Args:
        cv: Coefficient of variation of a cycle's value, alike on either side. Cycles are taken to be independent,
            those of a pair too: what they have in common, pairing takes away.
        n: Cycles of the candidate.
        n_reference: Cycles of the reference.
        delta: Relative change that does not count.
        alpha: Of false alarms.
        power: Above 0, below 1.
        family: Gates judged together, of which this alone sees a change: it has to pass the first step of Holm's
            procedure, alpha / family.
        paired: Whether the cycles are compared one by one; as many as both sides have.

    Returns:
        The change; None for fewer than two cycles on either side, and where not even a thousandfold one is found.
    """
    if min(n, n_reference) < 2:
        return None
    spread = math.sqrt(math.log1p(cv * cv))  # of the logarithm of a lognormal value
    change = math.log1p(delta) + spread * _distance(n, n_reference, alpha / family, power, paired)
    return math.expm1(change) if change <= _MOST else None


@lru_cache(maxsize=1024)  # a plan asks for every gate, and all of a study have the same cycles
def _distance(n: int, n_reference: int, alpha: float, power: float, paired: bool) -> float:
    """Return how far beyond the margin a change has to be, in standard deviations of a cycle's logarithm.

    The estimate is normal, and independent of its standard error. So the power is what it is where the error is
    known, averaged over the distribution of that: exact, save for the few points that stand for it here.
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
    """Return what the estimate has to exceed, over shares and totals of the sums of squares, and their weights.

    Of two samples from one distribution, the share that one has in the sum of squares is independent of the total.
    """
    import numpy as np
    from scipy.special import betaincinv, chdtri, stdtrit

    at, weight = _points()
    share = betaincinv((n - 1) / 2, (n_reference - 1) / 2, at)
    error, degrees = welch(share / (n - 1), n, (1 - share) / (n_reference - 1), n_reference)
    total = np.sqrt(chdtri(n + n_reference - 2, at))
    return np.outer(-stdtrit(degrees, alpha) * error, total), np.outer(weight, weight)


def _paired(n: int, alpha: float) -> tuple[Array, Array]:
    import numpy as np
    from scipy.special import chdtri, stdtrit

    at, weight = _points()
    error = np.sqrt(2 * chdtri(n - 1, at) / (n - 1) / n)
    return np.asarray(-stdtrit(n - 1, alpha) * error), weight


def _points() -> tuple[Array, Array]:
    """Return probabilities, and weights whose sum is 1 (Gauss and Legendre's)."""
    import numpy as np

    at, weight = np.polynomial.legendre.leggauss(64)
    return (at + 1) / 2, weight / 2
