"""Points of a study of servers by their load: which lie on one server, and which is best within the SLO."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.pareto import COST, Ranking, best, comparable
from pytest_llem.results.points import PointResult
from pytest_llem.study.identity import short_names, value_text

#: Kinds of load, each a key of ``load`` in a study.
KINDS = ("concurrency", "rate", "trace")

ATTAINMENT, GOODPUT, GOOD_COST = "slo_attainment", "goodput_rps", "energy_per_good_token_j"


@dataclass(frozen=True)
class LoadSeries:
    """Points that differ only in their load.

    Attributes:
        name: Values of the other axes that vary in the study, such as ``max_num_seqs=64``; empty if none does.
        kind: Their kind of load: ``concurrency``, ``rate`` or ``trace``.
        places: Their indices, by increasing load.
        is_search: Whether the load was searched for. There is then one point.
    """

    name: str
    kind: str
    places: tuple[int, ...]
    is_search: bool = False


def has_loads(points: Sequence[PointResult]) -> bool:
    """Return whether every one of *points* puts a load on a server."""
    return bool(points) and all(point.config.get("load") for point in points)


def slo_of(point: PointResult) -> dict[str, Any] | None:
    """Return the point's SLO as in its configuration; None without one."""
    slo: dict[str, Any] | None = (point.config.get("load") or {}).get("slo")
    return slo


def load_kind(point: PointResult) -> str:
    """Return the kind of a point's load: ``concurrency``, ``rate`` or ``trace``."""
    return next(kind for kind in KINDS if point.config["load"].get(kind) is not None)


def is_search(point: PointResult) -> bool:
    """Return whether the point searches for its load."""
    return bool(point.config["load"].get(load_kind(point)) == "auto")


def load_of(point: PointResult) -> float | None:
    """Return a point's load as a number: for a search, the mean over its cycles of what it found.

    None for a trace, and for a search without a result.
    """
    given = point.config["load"].get(load_kind(point))
    if given != "auto":
        return given if isinstance(given, int | float) else None
    found = found_loads(point)
    return statistics.fmean(found) if found else None


def found_loads(point: PointResult) -> list[float]:
    """Return the load of each completed cycle of a point; for a search, what it found."""
    given = [one.concurrency if one.concurrency is not None else one.rate for one in point.loads]
    return [one for one in given if one is not None]


def load_cost(points: Sequence[PointResult]) -> str:
    """Return the metric of energy per token: per token of good requests if every one of *points* has an SLO."""
    return GOOD_COST if all(slo_of(point) for point in points) else COST


def is_within_slo(point: PointResult) -> bool | None:
    """Return whether the point's load is within its SLO; None without an SLO, or if that is not known."""
    slo, mean = slo_of(point), point.summary_of(ATTAINMENT).mean
    return None if slo is None or mean is None else mean >= float(slo["attainment"])


def load_series(points: Sequence[PointResult]) -> list[LoadSeries]:
    """Return the series of *points*, each with a load, in the order of the study."""
    axes = varying_axes(points, leave_out=[f"load.{kind}" for kind in KINDS])
    found: dict[tuple[str, str, bool], list[int]] = {}
    for place, point in enumerate(points):
        name = ", ".join(
            f"{name}={value_text(point.axes[axis])}" for axis, name in axes.items() if axis in point.axes
        )
        found.setdefault((name, load_kind(point), is_search(point)), []).append(place)
    return [
        LoadSeries(name, kind, tuple(sorted(places, key=lambda place: load_of(points[place]) or 0.0)), searched)
        for (name, kind, searched), places in found.items()
    ]


def varying_axes(points: Sequence[PointResult], leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Return the axes of which *points* have several values, with their short names."""
    axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
    names = short_names(axes)
    values = {
        axis: {value_text(point.axes[axis]) if axis in point.axes else None for point in points} for axis in axes
    }
    return {axis: names[axis] for axis in axes if len(values[axis]) > 1 and axis not in leave_out}


def best_within_slo(points: Sequence[PointResult], series: LoadSeries) -> Ranking:
    """Return the points of *series* within the SLO that need least energy per token of good requests.

    ``first`` has the one with the lowest mean, and ``tied`` the others that may be best by their intervals. Both
    are empty if no point is within the SLO, or their energies are not known or not comparable.
    """
    places = [place for place in series.places if is_within_slo(points[place])]
    within = [points[place] for place in places]
    groups = comparable(within, GOOD_COST)
    if len(groups) != 1:
        return Ranking(set(), set())
    first = min(groups[0], key=lambda number: within[number].metrics[GOOD_COST].mean or 0.0)
    tied = best(within, GOOD_COST).tied - {first}
    return Ranking({places[first]}, {places[number] for number in tied})
