"""Find gates that can never be judged, from the study's settings alone."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_llem.catalogue import CATALOGUE, PREFILL_METRICS
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath
from pytest_llem.study.problems import Problem

#: Units of metrics that need a meter.
_METER_UNITS = {"J", "Wh", "1/J", "J·s", "W", "g", "°C"}

_IDLE_POWER_METRICS = ("idle_power_w", "active_energy_j")


def unreachable_gates(document: Document, at: KeyPath, metric: str, points: Sequence[Point]) -> list[Problem]:
    """Return a note at *at* for each reason why a gate on *metric* can never be judged for some of *points*."""
    not_skipped = [point for point in points if point.skip is None]
    concerned: dict[str, list[Point]] = {}
    for point in not_skipped:
        if reason := _preventing_setting(metric, point.config):
            concerned.setdefault(reason, []).append(point)
    notes = []
    for reason, some in concerned.items():
        where = "" if len(some) == len(not_skipped) else f" for {describe_points(some)}"
        notes.append(document.problem(at, f"can never be judged{where}: {reason}"))
    return notes


def describe_points(points: Sequence[Point]) -> str:
    """Return the id of the first point, shortened to 60 characters, and the number of others."""
    first = points[0].id
    first = first if len(first) <= 60 else f"{first[:57]}..."
    return first if len(points) == 1 else f"{first} and {len(points) - 1} more"


def _preventing_setting(metric: str, config: ExperimentConfig) -> str | None:
    """Return the setting that makes the metric null or excludes it from gates, or None."""
    if CATALOGUE[metric].unit in _METER_UNITS or metric == "throttled_seconds":
        if config.energy.backend is None:
            return "energy.backend is null"
        if config.energy.backend == "estimate" and not config.energy.allow_estimated:
            return "energy.backend is 'estimate', and energy.allow_estimated false"
    if metric in _IDLE_POWER_METRICS:
        if not config.baseline.enabled:
            return "baseline.enabled is false"
        if config.energy.backend == "estimate":
            return "energy.backend is 'estimate', and idle power is never estimated"
    if metric in PREFILL_METRICS and not config.measurement.prefill_split:
        return "measurement.prefill_split is false"
    return None
