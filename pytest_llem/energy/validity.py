"""Whether an energy counter and the integral of sampled power agree."""

from __future__ import annotations

import math

from pytest_llem.energy.protocol import DeviceReading
from pytest_llem.results.facts import MIN_TICKS

#: By what share they may differ before that is warned of, and before the energy is invalid.
MAX_DISAGREEMENT, MAX_VALID_DISAGREEMENT = 0.03, 0.05


def disagreement(device: DeviceReading, seconds: float | None, tick_seconds: float | None) -> float | None:
    """Return integral / counter − 1 of a device where that is more than :data:`MAX_DISAGREEMENT`.

    None where they agree, where one of them is missing, where the difference is within three standard
    uncertainties of the two, and in a window of fewer than :data:`MIN_TICKS` ticks, of which there is a warning
    anyway. A meter whose tick is not known is checked all the same.

    Args:
        device: What was read.
        seconds: What the reading covers.
        tick_seconds: Of the counter; None where it is not known.
    """
    if device.integral_j is None or not device.energy_j:
        return None
    if tick_seconds and (not seconds or seconds < MIN_TICKS * tick_seconds):
        return None
    # Power that changes faster than it is sampled has an integral that is good to no more than this.
    uncertainty_j = 3 * math.hypot(device.integral_uncertainty_j or 0, device.uncertainty_j or 0)
    off = device.integral_j / device.energy_j - 1
    return off if abs(off) > max(MAX_DISAGREEMENT, uncertainty_j / abs(device.energy_j)) else None
