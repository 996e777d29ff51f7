"""Run cycles until a gate is decided, without more false alarms from looking several times.

Gates are judged after some numbers of cycles, which are fixed before the first one. Each look spends an equal
share of the gate's level, so that the probability of a false verdict at any of them stays below the level,
whatever the looks have in common (Bonferroni). This holds for each level, and therefore for those of Holm's
procedure over gates that stopped after different numbers of cycles. Each look is after a quarter more cycles than
the one before: fewer looks would leave larger shares, and more would find a clear result earlier.

``tests/benchmarks/sequential.py`` compares this rule with others, and simulates its false alarms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pytest_llem.gates.statistics import MAX_CYCLES, Look, UndecidableError, contrast, paired_contrast
from pytest_llem.gates.ttests import quadrature
from pytest_llem.results.statistics import STOPPED_CONFIDENCE, mean_interval

if TYPE_CHECKING:
    from pytest_llem.gates.ttests import Array

#: Factor between the numbers of cycles of neighbouring looks.
_GROWTH = 1.25

#: Simulated paths for an expected number of cycles.
_PATHS = 4000


@dataclass(frozen=True)
class Schedule:
    """The numbers of cycles after which gates are judged.

    Attributes:
        min_cycles: The first of them, 2 or more.
        max_cycles: The last of them.

    Example:
        >>> Schedule(4, 20).sizes
        (4, 5, 6, 8, 10, 12, 15, 19, 20)
    """

    min_cycles: int
    max_cycles: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of cycles, ascending."""
        return tuple(self._sizes())

    def _sizes(self) -> Iterator[int]:
        size = self.min_cycles
        while size < self.max_cycles:
            yield size
            size = max(size + 1, round(_GROWTH * size))
        yield self.max_cycles

    @property
    def share(self) -> float:
        """Part of a gate's level that is spent on each look."""
        return 1 / len(self.sizes)

    def next_size(self, cycles: int) -> int | None:
        """Return the number of cycles at the first look after *cycles*; None if there is none."""
        return next((size for size in self.sizes if size > cycles), None)


def paired_looks(log_ratios: Sequence[float], schedule: Schedule) -> tuple[Look, ...]:
    """Return the looks at interleaved cycles so far, for :class:`~pytest_llem.gates.statistics.Question`.

    Args:
        log_ratios: ln(candidate / reference) of each pair of cycles, in the order of measurement.
        schedule: When gates are judged, fixed before the first cycle.

    Raises:
        UndecidableError: There are fewer pairs than at the first look.

    Example:
        >>> looks = paired_looks([0.01, 0.02, 0.01, 0.03, 0.02], Schedule(4, 8))
        >>> [look.contrast.n for look in looks]
        [4, 5]
    """
    sizes = _reached(len(log_ratios), schedule)
    return tuple(Look(paired_contrast(log_ratios[:size]), schedule.share) for size in sizes)


def unpaired_looks(candidate: Sequence[float], reference: Sequence[float], schedule: Schedule) -> tuple[Look, ...]:
    """Return the looks at a candidate's cycles so far, compared with all cycles of a saved reference.

    Args:
        candidate: Values of the candidate's cycles, in the order of measurement.
        reference: Values of the reference's cycles.
        schedule: When gates are judged, fixed before the first cycle.

    Raises:
        UndecidableError: There are fewer cycles than at the first look or fewer than two in the reference, or a
            value is not above 0.
    """
    values, reference_values = (dict(enumerate(side, start=1)) for side in (candidate, reference))
    sizes = _reached(len(candidate), schedule)
    return tuple(
        Look(
            contrast({cycle: values[cycle] for cycle in range(1, size + 1)}, reference_values, paired=False),
            schedule.share,
        )
        for size in sizes
    )


def _reached(cycles: int, schedule: Schedule) -> list[int]:
    sizes = [size for size in schedule.sizes if size <= cycles]
    if not sizes:
        raise UndecidableError(f"needs at least {schedule.min_cycles} cycles ({cycles} so far)")
    return sizes


def is_precise(values: Sequence[float], relative_half_width: float) -> bool:
    """Return whether the mean of *values* is known to *relative_half_width*, so that no more cycles are needed.

    It may be asked after each cycle: the interval's nominal confidence of 98 % allows for that.

    Args:
        values: Values of the cycles so far.
        relative_half_width: Half of the width of the mean's interval ÷ the mean, above 0.

    Example:
        >>> is_precise([1.0, 1.01, 0.99, 1.0], 0.05)
        True
    """
    mean, _, interval = mean_interval(values, STOPPED_CONFIDENCE)
    return interval is not None and interval[1] - mean <= relative_half_width * abs(mean)


class CyclesNeeded(NamedTuple):
    """Numbers of pairs of cycles until a gate is decided.

    Attributes:
        normal: With a number that is fixed in advance and a known spread, by the normal distribution.
        fixed: With a number that is fixed in advance, by Student's t.
        sequential: Mean number until the rule of this module decides, by simulation; cycles that end undecided at
            the schedule's maximum are counted with it.
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
    """Return how many pairs of cycles a gate needs for the right verdict, in theory and by the rule.

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
        _first(lambda n: _power_normal(n, bounds, level) >= power),
        _first(lambda n: _power_of_t(n, bounds, level) >= power),
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

    at, weight = quadrature()
    half = -stdtrit(n - 1, level) * np.sqrt(chdtri(n - 1, at) / (n - 1) / n)
    return float(np.sum(weight * _probability_between(n, bounds, half)))


def _probability_between(n: int, bounds: _Bounds, half: Array) -> Array:
    """Return the probability that a mean of n values is further inside the bounds than *half*."""
    import numpy as np
    from scipy.special import ndtr

    low, high = bounds
    between = ndtr((high - half) * math.sqrt(n)) - ndtr((low + half) * math.sqrt(n))
    return np.asarray(np.maximum(0.0, between))


def _first(is_enough: Callable[[int], bool]) -> int | None:
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
