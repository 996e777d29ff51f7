"""Search for the largest load within the SLO by bisection: each load that is tried is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from pytest_llem.measurement.load_metrics import load_metrics, requests_of
from pytest_llem.measurement.load_window import LoadWindow
from pytest_llem.results.serving import ProbeRecord
from pytest_llem.serving.errors import NotSteadyError
from pytest_llem.study.load import LoadConfig, SearchConfig


def search(load: LoadConfig, measure: Callable[[LoadConfig, str], LoadWindow]) -> LoadWindow:
    """Return the window of the largest load within the SLO, with a record of each load that was tried.

    Args:
        load: The load, with ``auto`` as its concurrency or rate.
        measure: Measures a load. Its second argument says which load that is, for progress reports.

    Raises:
        NotSteadyError: No load is within the SLO.
    """
    kind = "concurrency" if load.concurrency == "auto" else "rate"
    probes: list[ProbeRecord] = []
    best: LoadWindow | None = None
    within: float | None = None
    beyond: float | None = None
    while (value := next_load(load.search, within, beyond, is_whole=kind == "concurrency")) is not None:
        trial = load.model_copy(update={kind: int(value) if kind == "concurrency" else value})
        window, probe = _probe(value, trial, lambda one: measure(one, f"{kind} {value:g}, "))
        probes.append(probe)
        if probe.within_slo:
            best, within = window, value
        else:
            beyond = value
    if best is None:
        found = probe.reason or f"{probe.attainment:.1%} of the requests were within it"
        raise NotSteadyError(f"no load is within the SLO: at load.search.low ({load.search.low:g}), {found}")
    return replace(best, probes=tuple(probes))


def _probe(
    value: float, trial: LoadConfig, measure: Callable[[LoadConfig], LoadWindow]
) -> tuple[LoadWindow | None, ProbeRecord]:
    """Measure a load, and return its window and record; no window if the server was not steady."""
    began = time.monotonic()
    try:
        window = measure(trial)
    except NotSteadyError as error:
        seconds = time.monotonic() - began
        return None, ProbeRecord(
            load=value, attainment=None, within_slo=False, reason=str(error), window_seconds=seconds
        )
    metrics = load_metrics(window, requests_of(window))
    attainment = metrics["slo_attainment"].value
    assert trial.slo is not None
    return window, ProbeRecord(
        load=value,
        attainment=attainment,
        within_slo=attainment is not None and attainment >= trial.slo.attainment,
        reason=metrics["slo_attainment"].reason,
        window_seconds=window.seconds,
        output_tokens_per_second=metrics["output_tokens_per_second"].value,
        energy_per_output_token_j=metrics["energy_per_output_token_j"].value,
    )


def next_load(search: SearchConfig, within: float | None, beyond: float | None, *, is_whole: bool) -> float | None:
    """Return the next load to try; None if the search has ended.

    The load is doubled from the lowest until one is not within the SLO; then the interval is halved.

    Args:
        search: Limits and precision.
        within: Largest load so far that is within the SLO; None if there is none.
        beyond: Smallest load so far that is not; None if there is none.
        is_whole: Whether loads are whole numbers.

    Example:
        >>> next_load(SearchConfig(low=1, high=256), within=8, beyond=16, is_whole=True)
        12.0
    """
    if within is None:
        return search.low if beyond is None else None
    if beyond is None:
        return min(2 * within, search.high) if within < search.high else None
    if beyond - within <= max(search.precision * within, 1.0 if is_whole else 0.0):
        return None
    middle = (within + beyond) / 2
    return float(int(middle)) if is_whole else middle
