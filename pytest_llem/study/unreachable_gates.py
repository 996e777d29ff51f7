"""Gates that no result of their study can decide: known before anything has run."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath
from pytest_llem.study.problems import Problem

#: Units of what only a meter tells.
_OF_A_METER = {"J", "Wh", "1/J", "J·s", "W", "g", "°C"}

_OF_PREFILL = (
    *("prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"),
    *("prefill_seconds", "decode_seconds"),
)

_OF_A_BASELINE = ("idle_power_w", "active_energy_j")


def unreachable_gates(document: Document, at: KeyPath, metric: str, points: Sequence[Point]) -> list[Problem]:
    """Return a note at *at* for each reason why a gate on *metric* can never be judged for some of *points*."""
    run = [point for point in points if point.skip is None]
    concerned: dict[str, list[Point]] = {}
    for point in run:
        if reason := _missing(metric, point.config):
            concerned.setdefault(reason, []).append(point)
    return [
        document.problem(
            at, f"can never be judged{'' if len(some) == len(run) else f' for {describe_points(some)}'}: {reason}"
        )
        for reason, some in concerned.items()
    ]


def describe_points(points: Sequence[Point]) -> str:
    """Return the first one's id, cut where it is long, and how many there are besides."""
    first = points[0].id
    first = first if len(first) <= 60 else f"{first[:57]}..."
    return first if len(points) == 1 else f"{first} and {len(points) - 1} more"


def _missing(metric: str, config: ExperimentConfig) -> str | None:
    """Return the setting for which the figure is null, or may decide nothing."""
    if CATALOGUE[metric].unit in _OF_A_METER or metric == "throttled_seconds":
        if config.energy.backend is None:
            return "energy.backend is null"
        if config.energy.backend == "estimate" and not config.energy.allow_estimated:
            return "energy.backend is 'estimate', and energy.allow_estimated false"
    if metric in _OF_A_BASELINE and not config.baseline.enabled:
        return "baseline.enabled is false"
    if metric in _OF_PREFILL and not config.measurement.prefill_split:
        return "measurement.prefill_split is false"
    return None
