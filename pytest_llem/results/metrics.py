"""One figure of one experiment: what it is, and how it was obtained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pytest_llem.catalogue import CATALOGUE

#: How an energy was obtained, from strongest to weakest.
Method = Literal["measured", "sampled", "attributed", "estimated", "unavailable"]
METHODS: tuple[Method, ...] = ("measured", "sampled", "attributed", "estimated", "unavailable")

#: Why a figure is invalid, by reason code: it is shown, and no gate judges it.
INVALID = {
    "counter_disagrees": "the energy counter and the integral of sampled power differ by more than 5 %",
}


def resolution(method: str | None) -> str:
    """Return what a meter's readings of that *method* move in, in words."""
    return "samples of power" if method == "sampled" else "ticks of the energy counter"


class Metric(BaseModel):
    """One figure of one experiment.

    Attributes:
        value: In ``unit``; null where it could not be had, never 0 in its place.
        unit: As in :data:`~pytest_llem.catalogue.CATALOGUE`.
        method: For energies, how it was obtained.
        source: For energies, what it was read from (``nvml_total_energy``, ``rapl_package``, …).
        boundary: For energies, what it covers (``gpu_board``, ``module``, ``cpu_package``, …).
        devices: For energies, the devices within that boundary.
        covers_engine: For energies, whether these are all devices that the engine ran on; null where that is not
            known.
        invalid: Code of :data:`INVALID` where ``value`` cannot be right; null where nothing is known against it.
        reason: Why ``value`` is null.
        not_judged: Why no gate may judge it, though it may have a value; null where one may.
        uncertainty: Standard uncertainty (k = 1) of reading the meter, in ``unit``. Neither the spread from run to
            run is in it nor the meter's gain.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float | None
    unit: str
    method: Method | None = None
    source: str | None = None
    boundary: str | None = None
    devices: list[str] | None = None
    covers_engine: bool | None = None
    invalid: str | None = None
    reason: str | None = None
    not_judged: str | None = None
    uncertainty: float | None = None

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Where the value lies with 95 % by reading the meter alone; None where that is not known."""
        if self.value is None or self.uncertainty is None:
            return None
        return self.value - 1.96 * self.uncertainty, self.value + 1.96 * self.uncertainty


def metric(name: str, value: float | None, **provenance: Any) -> Metric:
    """Return a figure with its unit from the catalogue.

    Raises:
        KeyError: No such metric.
    """
    return Metric.model_validate({"value": value, "unit": CATALOGUE[name].unit, **provenance})


def weakest(methods: Iterable[Method | None]) -> Method | None:
    """Return the method a sum may claim: its weakest part's; null where no part has one."""
    known = [method for method in methods if method is not None]
    return max(known, key=METHODS.index) if known else None
