"""Changes in a series of runs, such as one metric over commits; false alarms do not add up as it grows.

At each run, the b runs up to it are compared with the a runs before those, for a and b of 3, 5, 8, 13, …, by the
gates' t-test: a run is one value, so that whatever differs from run to run counts as noise. Each of these tests
has its share of the level, fixed by its position alone: half is for the first 8 runs, a sixth for those up to 16,
and 1 / ((j + 1) (j + 2)) for each further doubling, in equal parts. The shares add up to at most 1 however long
the series becomes (Bonferroni), so that reading it again after each commit raises no further false alarms.

A change is located by the narrowest test that finds it (R. Baranowski et al., J. R. Stat. Soc. B 81, 2019), since
that one contains no other change. Steps in one direction that a straight ramp explains better are a drift.

``tests/benchmarks/history.py`` simulates the false alarms, and what is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_llem.gates.ttests import holm, holm_levels, p_beyond, unpaired_estimate, welch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_llem.gates.ttests import Array

#: The smallest number of runs on either side, and of a series that can be judged.
MIN_SIDE, MIN_RUNS = 3, 6

#: Runs that share half of the level; each doubling of this number shares a smaller part.
_FIRST_EPOCH = 8

#: The smallest number of runs that a drift takes; anything faster is a step.
MIN_DRIFT = 10

#: Positions that are tried for the beginning and the end of a drift.
_MAX_POSITIONS = 40

#: Confidence of the intervals of changes, which are not adjusted for the number of changes.
CONFIDENCE = 0.95


class Series(NamedTuple):
    """Logarithms of a metric's values, one per run in order.

    Attributes:
        values: The logarithms.
        margin: Change of the logarithm that does not count, 0 or more.
        same_code: For each run, whether it is of the same commit as the run before, so that nothing changes there.
    """

    values: Array
    margin: float
    same_code: NDArray[Any]


@dataclass(frozen=True)
class Change:
    """A lasting change in a series.

    Attributes:
        first: Index of the first run after the change, or of the first run of a drift.
        last: The same index, or that of the last run of a drift.
        ratio: Value after the change / value before it, by all runs up to the neighbouring changes.
        interval: Interval of ``ratio`` at :data:`CONFIDENCE`.
    """

    first: int
    last: int
    ratio: float
    interval: tuple[float, float]

    @property
    def is_drift(self) -> bool:
        """Whether it is a drift, and no step."""
        return self.last > self.first


def find_changes(family: Sequence[Series], alpha: float) -> list[list[Change]]:
    """Return the changes of each series of a family, in order.

    For rises and for falls, the probability of any false one in the whole family, however often it is read while
    it grows, is at most *alpha* for independent, normally distributed runs.

    Args:
        family: All series that are looked at together; Holm's procedure distributes *alpha* among them.
        alpha: Probability of a false alarm, above 0 and below 0.5.

    Example:
        >>> import numpy as np
        >>> runs = np.log([1.00, 1.01, 0.99, 1.0, 1.01, 1.0, 0.99, 1.0, *[2.01, 2.0, 1.99, 2.0] * 2])
        >>> ((change,),) = find_changes([Series(runs, 0.02, np.zeros(16, bool))], 0.01)
        >>> change.first, round(change.ratio, 1)
        (8, 2.0)
    """
    import numpy as np

    judged = [(at, tests) for at, one in enumerate(family) if (tests := _tests(one)) is not None]
    chosen = [np.zeros(len(tests.at), dtype=bool) for _, tests in judged]
    for sign in (1, -1):
        p = [tests.p(sign) for _, tests in judged]
        smallest = np.array([min(1.0, float(one.min())) for one in p])
        levels = holm_levels(smallest, holm(smallest) <= alpha, alpha) if p else smallest
        chosen = [one | (values <= level) for one, values, level in zip(chosen, p, levels, strict=True)]
    changes: list[list[Change]] = [[] for _ in family]
    for (at, tests), one in zip(judged, chosen, strict=True):
        changes[at] = [*_changes(family[at], _change_positions(family[at], tests.select(one)))]
    return changes


class _Tests(NamedTuple):
    """Tests of a series: the runs from ``at`` on, ``after`` many, against the ``before`` many ahead of them.

    ``change`` is the difference of their mean logarithms, ``error`` its standard error, and ``share`` the part of
    the level that a test has.
    """

    at: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]
    change: Array
    error: Array
    share: Array
    margin: float

    def p(self, sign: int) -> Array:
        """Return for each test the p of no rise beyond the margin (or fall, for a *sign* of -1) ÷ its share."""
        degrees = self.before + self.after - 2.0
        return p_beyond(sign * self.change, self.error, degrees, self.margin) / self.share

    def select(self, chosen: NDArray[Any]) -> _Tests:
        """Return the *chosen* tests."""
        at, before, after, change, error, share = (one[chosen] for one in self[:-1])
        return _Tests(at, before, after, change, error, share, self.margin)


def _tests(series: Series) -> _Tests | None:
    """Return all tests of a series; None if it has none."""
    import numpy as np

    n = len(series.values)
    if n < MIN_RUNS:
        return None
    sizes = np.array(_sizes(n))
    at, before, after = (one.ravel() for one in np.meshgrid(np.arange(n), sizes, sizes, indexing="ij"))
    possible = (before <= at) & (at + after <= n) & ~series.same_code[at]
    at, before, after = at[possible], before[possible], after[possible]
    if not len(at):
        return None
    centred = series.values - np.median(series.values)
    sums, squares = (np.concatenate([[0.0], np.cumsum(one)]) for one in (centred, centred**2))

    def moments(first: NDArray[Any], size: NDArray[Any]) -> tuple[Array, Array]:
        mean = (sums[first + size] - sums[first]) / size
        return mean, np.maximum((squares[first + size] - squares[first] - size * mean**2) / (size - 1), 0.0)

    mean_before, variance_before = moments(at - before, before)
    mean_after, variance_after = moments(at, after)
    # The lower bound of welch()'s error keeps single outliers from being found. With it, the pooled degrees of
    # freedom are valid for runs of equal spread; with Welch's degrees, three runs would show nothing.
    error, _ = welch(variance_after, after, variance_before, before)
    share = np.array([0.0, *(_share(end) for end in range(1, n + 1))])[at + after]
    return _Tests(at, before, after, mean_after - mean_before, error, share, series.margin)


def _sizes(n: int) -> list[int]:
    """Return the numbers of runs on either side of a test in a series of *n* runs."""
    sizes = [MIN_SIDE, 5]
    while sizes[-1] + sizes[-2] + MIN_SIDE <= n:
        sizes.append(sizes[-1] + sizes[-2])
    return [one for one in sizes if one + MIN_SIDE <= n]


def _share(end: int) -> float:
    """Return the share of the level of each test that ends at run number *end*."""
    epoch = max(0, math.ceil(math.log2(end / _FIRST_EPOCH)))
    first, last = (0 if epoch == 0 else _FIRST_EPOCH << (epoch - 1)), _FIRST_EPOCH << epoch
    return 1 / ((epoch + 1) * (epoch + 2) * _tests_until(first, last))


@cache
def _tests_until(first: int, last: int) -> int:
    """Return how many tests end after run number *first*, and not after *last*."""
    sizes = _sizes(last)
    return sum(max(0, last - max(first, one + other - 1)) for one in sizes for other in sizes)


def _change_positions(series: Series, tests: _Tests) -> list[int]:
    """Return where a series changes: the first run after each change, by the *tests* that found one."""
    import numpy as np

    found: list[int] = []
    while len(tests.at):
        width = tests.before + tests.after
        strength = np.abs(tests.change) / np.maximum(tests.error, 1e-12)
        best = np.lexsort((-strength, width))[0]
        begin, end = tests.at[best] - tests.before[best], tests.at[best] + tests.after[best]
        found.append(_split(series, int(begin), int(end)))
        tests = tests.select((tests.at - tests.before >= found[-1]) | (tests.at + tests.after <= found[-1]))
    bounds = [0, *sorted(found), len(series.values)]
    for one in range(1, len(bounds) - 1):  # now that the neighbours are known
        bounds[one] = _split(series, bounds[one - 1], bounds[one + 1])
    return bounds[1:-1]


def _split(series: Series, begin: int, end: int) -> int:
    """Return where to divide a part of a series into two levels, by least squares."""
    import numpy as np

    part = series.values[begin:end]
    positions = np.array([at for at in range(2, len(part) - 1) if not series.same_code[begin + at]])
    sums = np.cumsum(part - part.mean())[positions - 1]
    return begin + int(positions[np.argmax(sums**2 / (positions * (len(part) - positions)))])


def _changes(series: Series, positions: Sequence[int]) -> Iterator[Change]:
    """Yield the changes at *positions*; one or several in one direction that a drift explains are one change."""
    levels = [series.values[begin:end].mean() for begin, end in pairwise([0, *positions, len(series.values)])]
    rises = [one < other for one, other in pairwise(levels)]
    first = 0
    while first < len(positions):
        last = first
        while last + 1 < len(positions) and rises[last + 1] == rises[first]:
            last += 1
        bounds = [0, *positions, len(series.values)][first : last + 3]
        if (drift := _drift(series.values, bounds)) is not None:
            yield drift
        else:
            yield from (_step(series.values, *part) for part in zip(bounds, bounds[1:], bounds[2:], strict=False))
        first = last + 1


def _step(values: Array, begin: int, at: int, end: int) -> Change:
    estimate = unpaired_estimate(values[at:end], values[begin:at])
    return Change(at, at, *_ratio(*map(float, estimate)))


def _ratio(change: float, error: float, degrees: float) -> tuple[float, tuple[float, float]]:
    from scipy.special import stdtrit

    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    return math.exp(change), (math.exp(change - half), math.exp(change + half))


def _drift(values: Array, bounds: Sequence[int]) -> Change | None:
    """Return a drift between the first and the last of *bounds* if it explains the runs better than steps there.

    Both are judged by Bayes' information criterion: a drift has a beginning, an end and two levels.
    """
    import numpy as np

    begin, end = bounds[0], bounds[-1]
    part, n = values[begin:end], end - begin
    steps = sum(float(np.var(values[low:high])) * (high - low) for low, high in pairwise(bounds))
    positions = np.unique(np.linspace(0, n - 1, min(n, _MAX_POSITIONS)).round().astype(int))
    first, last = (one.ravel() for one in np.meshgrid(positions, positions, indexing="ij"))
    possible = last - first >= MIN_DRIFT
    if not possible.any():
        return None
    first, last = first[possible], last[possible]
    ramps = np.clip((np.arange(n) - first[:, None]) / (last - first)[:, None], 0.0, 1.0)
    ramps -= ramps.mean(axis=1, keepdims=True)
    squares = (ramps**2).sum(axis=1)
    rise = ramps @ (part - part.mean()) / squares
    residuals = float(((part - part.mean()) ** 2).sum()) - rise**2 * squares
    best = int(np.argmin(residuals))
    smallest = max(float(residuals[best]), 1e-12)
    parameters = 2 * (len(bounds) - 2) + 1
    if n * math.log(smallest) + 4 * math.log(n) >= n * math.log(max(steps, 1e-12)) + parameters * math.log(n):
        return None
    error = math.sqrt(smallest / (n - 4) / float(squares[best]))
    ratio, interval = _ratio(float(rise[best]), error, n - 4)
    return Change(begin + int(first[best]), begin + int(last[best]), ratio, interval)
