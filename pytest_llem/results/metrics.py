"""A metric's value in one experiment, and how it was obtained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pytest_llem.catalogue import CATALOGUE

#: How an energy was obtained, from strongest to weakest.
Method = Literal["measured", "sampled", "attributed", "estimated", "unavailable"]
METHODS: tuple[Method, ...] = ("measured", "sampled", "attributed", "estimated", "unavailable")

#: Why a value is invalid, by reason code. An invalid value is shown, and no gate judges it.
INVALID = {
    "counter_disagrees": "the energy counter and the integral of sampled power differ by more than 5 %",
}


def resolution(method: str | None) -> str:
    """Return what limits the resolution of a meter's readings of that *method*, as text."""
    return "samples of power" if method == "sampled" else "ticks of the energy counter"


class Metric(BaseModel):
    """A metric's value in one experiment.

    Example:
        >>> Metric(value=41.5, unit="J", uncertainty=0.5).interval95
        (40.52, 42.48)
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float | None
    """Value in ``unit``; null if it is not available, never 0 instead."""
    unit: str
    """Unit, as in :data:`~pytest_llem.catalogue.CATALOGUE`."""
    method: Method | None = None
    """For energies, how the value was obtained."""
    source: str | None = None
    """For energies, what the value was read from (``nvml_total_energy``, ``rapl_package``, …)."""
    boundary: str | None = None
    """For energies, what the value covers (``gpu_board``, ``module``, ``cpu_package``, …)."""
    devices: list[str] | None = None
    """For energies, the devices within ``boundary``."""
    covers_engine: bool | None = None
    """For energies, whether ``devices`` include all devices that the engine ran on; null if that is not known.
    """
    shared: bool = False
    """For energies, whether ``devices`` served other experiments at the same time, so that the value is not this
    experiment's alone.
    """
    invalid: str | None = None
    """Code of :data:`INVALID` if ``value`` cannot be right; null otherwise."""
    reason: str | None = None
    """Why ``value`` is null."""
    not_judged: str | None = None
    """Why no gate may judge the metric, though it may have a value; null if gates may."""
    uncertainty: float | None = None
    """Standard uncertainty (k = 1) of reading the meter, in ``unit``, without the spread between cycles and
    without the meter's gain error.
    """

    @property
    def interval95(self) -> tuple[float, float] | None:
        """95 % interval of the value from reading the meter alone; None if that is not known."""
        if self.value is None or self.uncertainty is None:
            return None
        return self.value - 1.96 * self.uncertainty, self.value + 1.96 * self.uncertainty


def metric(name: str, value: float | None, **provenance: Any) -> Metric:
    """Return the Metric *name*, with its unit from the catalogue.

    Raises:
        KeyError: The catalogue has no metric *name*.
    """
    return Metric.model_validate({"value": value, "unit": CATALOGUE[name].unit, **provenance})


def weakest(methods: Iterable[Method | None]) -> Method | None:
    """Return the weakest of *methods*, which is the method of a sum; None if no part has a method."""
    known = [method for method in methods if method is not None]
    return max(known, key=METHODS.index) if known else None
