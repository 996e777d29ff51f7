"""Emissions of electricity, from the carbon intensity and PUE that the user gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_llem.results.metrics import Metric, metric

J_PER_KWH = 3.6e6

#: Separates the energy's source from the factors in the source of ``gco2e_g``.
_TIMES = " × "


@dataclass(frozen=True)
class Carbon:
    """Emission factors of a machine's electricity. No hash includes them: they change no measurement.

    Attributes:
        intensity: Carbon intensity in gCO2e per kWh.
        pue: Power usage effectiveness of the site: its total energy ÷ the energy of its computers, 1 or more.

    Raises:
        ValueError: A factor is out of range.
    """

    intensity: float
    pue: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.intensity < math.inf:
            raise ValueError(f"carbon intensity must be a number of gCO2e per kWh (got {self.intensity})")
        if not 1 <= self.pue < math.inf:
            raise ValueError(f"PUE must be a number, at least 1 (got {self.pue})")


def emissions(carbon: Carbon | None, energy: Metric) -> Metric:
    """Return ``gco2e_g``: *energy* in J ÷ 3.6e6 × PUE × intensity; null if *carbon* is None."""
    if carbon is None:
        return metric("gco2e_g", None, reason="no llem_carbon_intensity is given")
    scale = carbon.pue * carbon.intensity / J_PER_KWH
    factors = f"{carbon.intensity:g} gCO2e/kWh, PUE {carbon.pue:g}"
    return metric(
        "gco2e_g",
        None if energy.value is None else energy.value * scale,
        method=energy.method,
        source=f"{energy.source}{_TIMES}{factors}" if energy.source else factors,
        boundary=energy.boundary,
        devices=energy.devices,
        invalid=energy.invalid,
        reason=energy.reason,
        uncertainty=None if energy.uncertainty is None else energy.uncertainty * scale,
    )


def emission_factors(gco2e: Metric | None) -> str | None:
    """Return the carbon intensity and PUE that ``gco2e_g`` was calculated with, as text; None if it was not."""
    return None if gco2e is None or gco2e.source is None else gco2e.source.rpartition(_TIMES)[2]
