"""Statistics over cycles. The unit of repetition is the cycle, a fresh process, and not the prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, model_validator

#: An interval of fewer values is no statement: Student's t of two is 12.7 standard errors wide.
MIN_INTERVAL_VALUES = 3


class Summary(BaseModel):
    """One metric of one point over its cycles.

    Attributes:
        mean: Arithmetic mean, null where no cycle has a value.
        sd: Sample standard deviation, null below two values.
        cv: ``sd`` / |``mean``|, null where undefined.
        ci95: 95 % t-interval of the mean, null below three values.
        n: Cycles that have a value.
        unit: The metric's unit.
        method: For energies, the weakest method among the cycles.
        boundary: For energies, what they cover; null where the cycles disagree.
        covers_engine: For energies, whether they cover all devices that the engine ran on, in every cycle; null
            where that is not known.
        invalid: Code of :data:`~pytest_llem.results.metrics.INVALID` of the first cycle that has one.
        reason: Why ``mean`` is null.
        not_judged: Why no gate may judge it, though it may have a value; null where one may.
        values: Of each completed cycle, in the order of the point's ``cycles``; null where one has none. Empty in
            results of versions that did not keep them.
    """

    model_config = ConfigDict(extra="forbid")

    mean: float | None
    sd: float | None = None
    cv: float | None = None
    ci95: tuple[float, float] | None = None
    n: int
    unit: str
    method: str | None = None
    boundary: str | None = None
    covers_engine: bool | None = None
    invalid: str | None = None
    reason: str | None = None
    not_judged: str | None = None
    values: list[float | None] = []

    @model_validator(mode="after")
    def _no_interval_of_few(self) -> Summary:
        if self.n < MIN_INTERVAL_VALUES:  # as results before 1.4 have it
            self.ci95 = None
        return self

    @property
    def is_mixed(self) -> bool:
        """Whether it is the mean of energies that do not cover the same in every cycle."""
        return self.method is not None and self.boundary is None and self.n > 1

    @property
    def label(self) -> str | None:
        """How an energy was obtained, that it is invalid, or what else than the engine's devices it covers; None
        for what is no energy.
        """
        if self.invalid is not None:
            return "invalid"
        if self.is_mixed:
            return f"{self.method}, mixed"
        return f"{self.method}, {self.boundary}" if self.covers_engine is False else self.method


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, tuple[float, float] | None]:
    """Return mean, standard deviation and 95 % interval of *values*.

    The interval is Student's: mean ± t(0.975, n − 1) · sd / √n. Below three values there is none, and below two
    no standard deviation.
    """
    mean = statistics.fmean(values)
    sd = statistics.stdev(values) if len(values) > 1 else None
    if sd is None or len(values) < MIN_INTERVAL_VALUES:
        return mean, sd, None
    from scipy.special import stdtrit  # 0.1 s to import, and only a study that has cycles needs it

    half = float(stdtrit(len(values) - 1, 0.975)) * sd / len(values) ** 0.5
    return mean, sd, (mean - half, mean + half)


def percentile(values: Sequence[float], p: int) -> float:
    """Return the *p*-th percentile (1 to 99) of one or more *values*, interpolated between neighbours."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]
