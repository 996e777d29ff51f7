"""Statistics over cycles. The unit of repetition is the cycle, in a fresh process, and not the prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

_Number = TypeVar("_Number", int, float)

#: Nominal confidence of the 95 % intervals with ``n_cycles: auto``. Cycles that differ little by chance end early,
#: so that up to 3 % fewer intervals cover the mean (``tests/benchmarks/sequential.py``).
STOPPED_CONFIDENCE = 0.98

#: Below this number of values there is no interval: with two, it would be the mean ± 12.7 standard errors.
MIN_INTERVAL_VALUES = 3


class Summary(BaseModel):
    """Statistics of one metric of one point over its cycles.

    Example:
        >>> Summary(mean=41.5, n=1, unit="J", method="measured", boundary="cpu_package", covers_engine=False).label
        'measured, cpu_package'
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mean: float | None
    """Arithmetic mean, null if no cycle has a value."""
    sd: float | None = None
    """Sample standard deviation, null below two values."""
    cv: float | None = None
    """``sd`` / |``mean``|, null if undefined."""
    ci95: tuple[float, float] | None = None
    """95 % t-interval of the mean, null below three values. With ``n_cycles: auto``, where the number of cycles
    depends on the values, its nominal confidence is 98 %, so that it still holds.
    """
    n: int
    """Number of cycles with a value."""
    unit: str
    """Unit of the metric."""
    method: str | None = None
    """For energies, the weakest method among the cycles."""
    boundary: str | None = None
    """For energies, what they cover; null if the cycles differ."""
    covers_engine: bool | None = None
    """For energies, whether they cover all devices that the engine ran on, in every cycle; null if that is not
    known.
    """
    shared: bool = False
    """For energies, whether the devices served other experiments in any cycle at the same time."""
    invalid: str | None = None
    """Code of :data:`~pytest_llem.results.metrics.INVALID` of the first cycle that has one."""
    reason: str | None = None
    """Why ``mean`` is null."""
    not_judged: str | None = None
    """Why no gate may judge the metric, though it may have a value; null if gates may."""
    values: list[float | None] = []
    """Value of each completed cycle, in the order of the point's ``cycles``; null for a cycle without one. Empty
    in results of versions that did not keep them.
    """

    @model_validator(mode="after")
    def _no_interval_of_few(self) -> Summary:
        if self.n < MIN_INTERVAL_VALUES:  # results of schema 1.3 and older have intervals of two values
            self.ci95 = None
        return self

    @property
    def is_mixed(self) -> bool:
        """Whether the cycles' energies cover different boundaries."""
        return self.method is not None and self.boundary is None and self.n > 1

    @property
    def label(self) -> str | None:
        """How an energy was obtained, with its boundary if that excludes a device of the engine, and ``shared`` if
        it is that of several experiments; or ``invalid``.

        None if the metric is not an energy.
        """
        if self.invalid is not None:
            return "invalid"
        if self.is_mixed:
            return f"{self.method}, mixed"
        label = f"{self.method}, {self.boundary}" if self.covers_engine is False else self.method
        return f"{label}, shared" if self.shared else label


def mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, tuple[float, float] | None]:
    """Return mean, standard deviation and interval of *values*.

    The interval is Student's: mean ± t((1 + confidence) / 2, n − 1) · sd / √n. It is None below three values, and
    the standard deviation is None below two.
    """
    mean = statistics.fmean(values)
    sd = statistics.stdev(values) if len(values) > 1 else None
    if sd is None or len(values) < MIN_INTERVAL_VALUES:
        return mean, sd, None
    from scipy.special import stdtrit  # takes 0.1 s to import, and only a study with cycles needs it

    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * sd / len(values) ** 0.5
    return mean, sd, (mean - half, mean + half)


def total_of(values: Iterable[_Number | None]) -> _Number | None:
    """Return the sum of *values*; None if one is None."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def percentile(values: Sequence[float], p: int) -> float:
    """Return the *p*-th percentile (1 to 99) of one or more *values*, interpolated between neighbours."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]
