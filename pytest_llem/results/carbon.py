"""What electricity emits, as the user states it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_llem.results.metrics import Metric, metric

J_PER_KWH = 3.6e6

#: Between what the energy was read from and the factors, in the source of ``gco2e_g``.
_TIMES = " × "


@dataclass(frozen=True)
class Carbon:
    """Emissions of the electricity that a machine takes. Part of no hash: they change no measurement.

    Attributes:
        intensity: In gCO2e per kWh.
        pue: Power usage effectiveness of the site: all that it takes ÷ what its computers take, 1 or more.

    Raises:
        ValueError: One of them is no such figure.
    """

    intensity: float
    pue: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.intensity < math.inf:
            raise ValueError(f"carbon intensity must be a number of gCO2e per kWh (got {self.intensity})")
        if not 1 <= self.pue < math.inf:
            raise ValueError(f"PUE must be a number, at least 1 (got {self.pue})")


def emissions(carbon: Carbon | None, energy: Metric) -> Metric:
    """Return ``gco2e_g``: *energy*, in J, ÷ 3.6e6 × PUE × intensity; null where *carbon* is not stated."""
    if carbon is None:
        return metric("gco2e_g", None, reason="no llem_carbon_intensity is given")
    scale = carbon.pue * carbon.intensity / J_PER_KWH
    stated = f"{carbon.intensity:g} gCO2e/kWh, PUE {carbon.pue:g}"
    return metric(
        "gco2e_g",
        None if energy.value is None else energy.value * scale,
        method=energy.method,
        source=f"{energy.source}{_TIMES}{stated}" if energy.source else stated,
        boundary=energy.boundary,
        devices=energy.devices,
        invalid=energy.invalid,
        reason=energy.reason,
        uncertainty=None if energy.uncertainty is None else energy.uncertainty * scale,
    )


def emission_factors(gco2e: Metric | None) -> str | None:
    """Return the carbon intensity and PUE that ``gco2e_g`` was calculated with, in words; None where none was."""
    return None if gco2e is None or gco2e.source is None else gco2e.source.rpartition(_TIMES)[2]
