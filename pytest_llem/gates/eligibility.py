"""Why a metric of a point may decide nothing, though it has a value."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.text import figure
from pytest_llem.results.facts import MIN_TICKS, PREFILL_TICKS, TICKS
from pytest_llem.results.metrics import INVALID, resolution
from pytest_llem.results.models import PointResult
from pytest_llem.study.config import AUTO

ESTIMATED = "energy is estimated, not measured: set energy.allow_estimated: true to let it decide"

#: Metrics that are of no measured window, so that its ticks say nothing of them.
_NO_WINDOW = {"load_energy_j", "idle_power_w"}

#: Those that are of the window of prefill, too.
_PREFILL = {"prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"}


#: Metrics that say by their names what they cover.
_NAME_THEIR_BOUNDARY = {"gpu_energy_j", "cpu_energy_j", "dram_energy_j"}

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


def replay_ineligible_reason(point: PointResult) -> str | None:
    """Return why replayed results of *point* are not of the code, model or dataset of now; None where they are."""
    if point.replay_mismatch is None:
        return None
    return f"measured before, and since then {point.replay_mismatch}: measure it again"


def names_boundary(point: PointResult, metric: str) -> bool:
    """Whether the study says what the energy is to cover: by the meter's name, or by a metric of that boundary."""
    return metric in _NAME_THEIR_BOUNDARY or point.config.get("energy", {}).get("backend") not in (AUTO, None)


def ineligible_reason(point: PointResult, metric: str, *, any_boundary: bool) -> str | None:
    """Return what is wrong with how the energy *metric* of *point* was measured; None where nothing is.

    Args:
        point: What was measured.
        metric: By its name in the catalogue.
        any_boundary: Whether it may be the energy of other devices than the engine's: :func:`names_boundary` of
            what is judged.
    """
    summary = point.metrics[metric]
    if summary.method is None:  # no energy
        return None
    if summary.invalid is not None:
        return f"invalid ({summary.invalid}): {INVALID.get(summary.invalid, 'reason unknown to this version')}"
    if summary.is_mixed:
        return "its cycles differ in what their energy covers"
    if not any_boundary and not (covered := summary.covers_engine):
        what = f"the energy covers {summary.boundary} and not" if covered is False else "unknown whether it covers"
        return f"{what} the devices that the engine ran on (name the meter in energy.backend if that is meant)"
    if metric in _NO_WINDOW:
        return None
    windows = [TICKS, PREFILL_TICKS] if metric in _PREFILL else [TICKS]
    ticks = min((point.testbed[key] for key in windows if key in point.testbed), default=None)
    if ticks is None or ticks >= MIN_TICKS:
        return None
    return (
        f"a window holds {ticks:g} {resolution(summary.method)}, and a gate needs {MIN_TICKS}: "
        "raise measurement.min_window_seconds"
    )


#: Metrics per output token, and what is judged in their place where answers differ in length.
PER_REQUEST = {
    "energy_per_output_token_j": "energy_per_request_j",
    "output_tokens_per_second": "requests_per_second",
}

#: Metrics of tokens in a pass, as they are called by request.
_TOKENS = {"input_tokens": "input tokens per request", "output_tokens": "output tokens per request"}


def workload_differences(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield in what the work of two points differs, a line each; nothing of what is not known of both."""
    counts = candidate.config.get("n"), reference.config.get("n")
    if None not in counts and counts[0] != counts[1]:
        yield f"prompts per pass: {counts[0]:,} here, {counts[1]:,} in the reference"
    for metric in _TOKENS:
        if (difference := _tokens_differ(metric, candidate, reference)) is not None:
            yield difference


def judged_metric(metric: str, candidate: PointResult, reference: PointResult) -> tuple[str, str | None]:
    """Return what a default gate on *metric* judges, and why, where that is another metric.

    Args:
        metric: By its name in the catalogue.
        candidate: What is judged.
        reference: What it is compared with.
    """
    instead = PER_REQUEST.get(metric)
    difference = _tokens_differ("output_tokens", candidate, reference) if instead is not None else None
    if instead is None or difference is None:
        return metric, None
    return instead, f"{instead} in place of {metric}: {difference}"


def _tokens_differ(metric: str, candidate: PointResult, reference: PointResult) -> str | None:
    here, there = _per_request(candidate, metric), _per_request(reference, metric)
    if here is None or there is None or math.isclose(here, there, rel_tol=1e-9):
        return None
    digits = next(digits for digits in range(3, 18) if figure(here, digits) != figure(there, digits))
    one, other = (f"{value:,.0f}" if value.is_integer() else figure(value, digits) for value in (here, there))
    return f"{_TOKENS[metric]}: {one} here, {other} in the reference"


def _per_request(point: PointResult, metric: str) -> float | None:
    summary = point.metrics.get(metric)
    return None if summary is None or summary.mean is None else summary.mean / point.config.get("n", 1)
