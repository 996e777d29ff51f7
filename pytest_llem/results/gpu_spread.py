"""How far the GPUs of one kind differ, apart from the variation between cycles on one of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pytest_llem.results.points import PointResult

#: Fewest GPUs for an interval: with two, it would reach from 0.4 to 32 times the value.
MIN_INTERVAL_GPUS = 3


@dataclass(frozen=True)
class GpuSpread:
    """Variation of a metric over the GPUs of a point's cycles.

    Attributes:
        gpus: Number of GPUs, or of sets of them.
        between: Standard deviation of their means / mean.
        interval: 95 % interval of ``between``, for normally distributed GPUs; None with two of them.
        within: Standard deviation of the cycles on one of them / mean, pooled; None with one cycle on each.
    """

    gpus: int
    between: float
    interval: tuple[float, float] | None = None
    within: float | None = None


def gpu_spread(point: PointResult, metric: str) -> GpuSpread | None:
    """Return how far a metric of *point* differs between GPUs; None if all its cycles ran on the same GPUs.

    Example:
        Of a study with ``execution.devices: spread``::

            for point in result.points:
                if (spread := gpu_spread(point, "energy_per_output_token_j")) is not None:
                    print(f"{point.id}: {spread.between:.1%} between {spread.gpus} GPUs")
    """
    summary = point.summary_of(metric)
    if len(summary.values) != len(point.gpus):
        return None
    groups: dict[tuple[str, ...], list[float]] = {}
    for gpus, value in zip(point.gpus, summary.values, strict=True):
        if value is not None:
            groups.setdefault(tuple(gpus), []).append(value)
    mean = statistics.fmean(map(statistics.fmean, groups.values())) if groups else 0.0
    if len(groups) < 2 or not mean:
        return None
    between = statistics.stdev(map(statistics.fmean, groups.values())) / abs(mean)
    degrees_of_freedom = sum(len(values) - 1 for values in groups.values())
    squares = sum((value - statistics.fmean(values)) ** 2 for values in groups.values() for value in values)
    return GpuSpread(
        len(groups),
        between,
        _interval(between, len(groups)),
        (squares / degrees_of_freedom) ** 0.5 / abs(mean) if degrees_of_freedom else None,
    )


def _interval(deviation: float, number: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a standard deviation of *number* values: s · √((n − 1) / χ²)."""
    if number < MIN_INTERVAL_GPUS:
        return None
    from scipy.special import chdtri  # takes 0.1 s to import

    freedom = number - 1
    low, high = (deviation * (freedom / float(chdtri(freedom, share))) ** 0.5 for share in (0.025, 0.975))
    return low, high
