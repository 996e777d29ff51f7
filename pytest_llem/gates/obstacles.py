"""Why a metric of a point may decide nothing, though it has a value."""

from __future__ import annotations

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.facts import FEWEST_TICKS, PREFILL_TICKS, TICKS
from pytest_llem.results.models import PointResult

ESTIMATED = "energy is estimated, not measured: set energy.allow_estimated: true to let it decide"

#: Metrics that are of no measured window, so that its ticks say nothing of them.
_NO_WINDOW = {"load_energy_j", "idle_context_w"}

#: Those that are of the window of prefill, too.
_PREFILL = {"prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"}


#: Units of metrics that do not depend on who else uses the machine.
_UNAFFECTED = {"MB", "tokens", "FLOP"}


def contention(point: PointResult, metric: str) -> str | None:
    """Return which cycles of *point* were contended, and by what, where that changes *metric*; None for none."""
    found = point.contention
    if found is None or not found.contended or CATALOGUE[metric].unit in _UNAFFECTED:
        return None
    cycles = ", ".join(map(str, found.contended))
    more = f"; and {len(found.reasons) - 1} more" if len(found.reasons) > 1 else ""
    return f"cycle{'s' * (len(found.contended) > 1)} {cycles} contended: {found.reasons[0]}{more}"


def allows_estimates(point: PointResult) -> bool:
    """Whether the study says that estimated energy will do."""
    return bool(point.config.get("energy", {}).get("allow_estimated"))


def replay_obstacle(point: PointResult) -> str | None:
    """Return that results of *point* are replayed and not of what is there now; None where they are."""
    if point.replay_mismatch is None:
        return None
    return f"measured before, and since then {point.replay_mismatch}: measure it again"


def measuring_obstacle(point: PointResult, metric: str) -> str | None:
    """Return what is wrong with how the energy *metric* of *point* was measured; None where nothing is."""
    summary = point.metrics[metric]
    if summary.method is None:  # no energy
        return None
    if summary.boundary is None and summary.n > 1:
        return "its cycles differ in what their energy covers"
    if metric in _NO_WINDOW:
        return None
    windows = [TICKS, PREFILL_TICKS] if metric in _PREFILL else [TICKS]
    ticks = min((point.bench[key] for key in windows if key in point.bench), default=None)
    if ticks is None or ticks >= FEWEST_TICKS:
        return None
    return (
        f"a window holds {ticks:g} ticks of the energy counter, and a gate needs {FEWEST_TICKS}: "
        "raise measurement.min_window_seconds"
    )
