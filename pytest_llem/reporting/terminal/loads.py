"""Columns of the points table of a study of servers, and lines about the loads within the SLO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pytest_llem.gates.verdict_text import percent
from pytest_llem.reporting.terminal.tables import Columns, plain_table, render
from pytest_llem.reporting.text import mean_text, number
from pytest_llem.results.loads import (
    ATTAINMENT,
    GOOD_COST,
    GOODPUT,
    LoadSeries,
    best_within_slo,
    found_loads,
    is_within_slo,
    load_cost,
    load_kind,
    load_of,
    load_series,
    slo_of,
)
from pytest_llem.results.pareto import COST, SPEED
from pytest_llem.results.points import PointResult
from pytest_llem.results.serving import ProbeRecord
from pytest_llem.results.statistics import Summary

#: Metrics that are shown with the interval of their mean. The other columns of a load would make lines too long.
_WITH_INTERVAL = (SPEED, COST, GOOD_COST)

_COST_HEADINGS = {COST: "J/out\ntoken", GOOD_COST: "J/good\ntoken"}

#: Columns that only a wide terminal shows: metric, heading.
_WIDE_COLUMNS = (
    ("offered_rate", "offered\nreq/s"),
    ("concurrency_mean", "in flight\n(mean)"),
    ("batch_mean", "batch\n(mean)"),
    ("e2e_p99_ms", "E2E\np99 ms"),
    ("mean_power_w", "mean W"),
    ("error_rate", "failed"),
)

#: Metrics that are shown in percent.
_RATIOS = (ATTAINMENT, "error_rate")


def load_columns(points: Sequence[PointResult]) -> list[Columns]:
    """Return the sets of columns that a table of points with loads can have, the widest set first."""
    has_slo = any(slo_of(point) for point in points)
    cost, latency = load_cost(points), token_latency(points)
    main = [
        (SPEED, "out\ntok/s"),
        (cost, _COST_HEADINGS[cost]),
        ("ttft_p50_ms", "TTFT\np50 ms"),
        ("ttft_p99_ms", "TTFT\np99 ms"),
        (f"{latency}_p99_ms", f"{latency.upper()}\np99 ms"),
        *([(ATTAINMENT, "within\nSLO"), (GOODPUT, "good\nreq/s")] if has_slo else []),
    ]
    more = [*([(COST, _COST_HEADINGS[COST])] if cost != COST else []), *_WIDE_COLUMNS]
    more = [one for one in more if any(point.summary_of(one[0]).mean is not None for point in points)]
    without_goodput = [one for one in main if one[0] != GOODPUT]
    narrow = [one for one in without_goodput if one[0] != "ttft_p50_ms"]
    return [*([*main, *more[:count]] for count in range(len(more), -1, -1)), without_goodput, narrow]


def token_latency(points: Sequence[PointResult]) -> str:
    """Return the latency to show for tokens after the first: ``itl`` or ``tpot``.

    It is ``itl`` if an SLO limits the ITL or no point has a TPOT.
    """
    if any((slo_of(point) or {}).get("itl_ms") for point in points):
        return "itl"
    return "tpot" if any(point.summary_of("tpot_p99_ms").mean is not None for point in points) else "itl"


def figure_text(name: str, summary: Summary) -> str:
    """Return a figure of a table of points with loads."""
    if name in _WITH_INTERVAL or summary.mean is None:
        return mean_text(summary)
    return percent(summary.mean) if name in _RATIOS else number(summary.mean)


def is_ranked(name: str) -> bool:
    """Return whether the best figures of the column of the metric *name* are marked."""
    return name in _WITH_INTERVAL


class LoadFinding(NamedTuple):
    """A load of a server that stands out.

    Attributes:
        server: What distinguishes the configuration of the server from others; empty if there is only one.
        what: What the load is, such as ``best within the SLO``.
        load: The load, such as ``concurrency 16``.
        about: Its energy, the share of its requests within the SLO, or both.
    """

    server: str
    what: str
    load: str
    about: str


def load_findings(points: Sequence[PointResult]) -> Iterator[LoadFinding]:
    """Yield the best load within the SLO of each configuration of a server with an SLO, or what a search found."""
    for series in load_series(points):
        found = _found(points[series.places[0]]) if series.is_search else _best(points, series)
        if found is not None:
            yield LoadFinding(series.name, *found)


def load_lines(points: Sequence[PointResult]) -> Iterator[str]:
    """Yield the findings of :func:`load_findings` as lines."""
    for finding in load_findings(points):
        yield ": ".join(filter(None, finding))


def probe_lines(points: Sequence[PointResult], width: int) -> Iterator[str]:
    """Yield a table of the loads that each search has tried.

    Args:
        points: Points with loads.
        width: Width of the terminal in characters.
    """
    for point in points:
        for cycle, load in zip(point.cycles, point.loads, strict=False):
            if not load.probes:
                continue
            yield ""
            yield f"search of {point.id}, cycle {cycle}:"
            table = plain_table()
            for heading in (load_kind(point), "within\nSLO", "out\ntok/s", "J/out\ntoken", "seconds"):
                table.add_column(heading, justify="right", vertical="bottom")
            table.add_column("", overflow="fold")
            for probe in load.probes:
                table.add_row(*_probe_cells(probe))
            yield from render(table, width)


def _probe_cells(probe: ProbeRecord) -> Iterator[str]:
    yield f"{probe.load:.4g}"
    yield "-" if probe.attainment is None else percent(probe.attainment)
    for value in (probe.output_tokens_per_second, probe.energy_per_output_token_j, probe.window_seconds):
        yield "-" if value is None else number(value)
    yield probe.outcome


def _best(points: Sequence[PointResult], series: LoadSeries) -> tuple[str, str, str] | None:
    """Return the load of *series* to report: what it is, such as the best, the load, and its figures.

    None if the SLO attainment is not known.
    """
    known = [place for place in series.places if is_within_slo(points[place]) is not None]
    if not known:
        return None
    within = [place for place in known if is_within_slo(points[place])]
    if not within:
        most = max(known, key=lambda place: points[place].summary_of(ATTAINMENT).mean or 0.0)
        return "no load is within the SLO; closest", _load(points[most]), _attained(points[most])
    first, tied = best_within_slo(points, series)
    if not first:  # energies are not known, or not comparable
        largest = points[within[-1]]
        return "largest load within the SLO", _load(largest), _attained(largest)
    (place,) = first
    about = f"{_cost(points[place])}, {_attained(points[place])}"
    if tied:
        loads = ", ".join(f"{load_of(points[place]):g}" for place in sorted(tied))
        about += f" (tied with {loads}: the intervals overlap)"
    return "best within the SLO", _load(points[place]), about


def _found(point: PointResult) -> tuple[str, str, str] | None:
    """Return the texts of :func:`_best` for the loads that a search found; None if it found none."""
    loads = found_loads(point)
    if not loads:
        return None
    span = " to ".join(dict.fromkeys(f"{one:.4g}" for one in (min(loads), max(loads))))
    return "largest load within the SLO", f"{load_kind(point)} {span}", _cost(point)


def _load(point: PointResult) -> str:
    load = load_of(point)
    return point.id if load is None else f"{load_kind(point)} {load:g}"


def _cost(point: PointResult) -> str:
    cost = point.metrics[GOOD_COST]
    if cost.mean is None:
        return "energy not available"
    return f"{number(cost.mean)} J/good token{'' if cost.label == 'measured' else f' ({cost.label})'}"


def _attained(point: PointResult) -> str:
    return f"{percent(point.summary_of(ATTAINMENT).mean or 0.0)} within the SLO"
