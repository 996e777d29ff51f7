"""The table of a study's points."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.measure import Measurement
from rich.table import Table

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.terminal.tables import COLUMNS, figure, paper, plain_table
from pytest_llem.results.models import PointResult
from pytest_llem.results.pareto import COST, SPEED, Ranking, best, pareto_optimal
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import worst
from pytest_llem.study.identity import short_names, value_text

#: What a wide terminal shows beside :data:`COLUMNS`, the first ones first: metric, heading.
MORE_COLUMNS = (
    ("itl_p50_ms", "ITL p50\nms"),
    ("mean_power_w", "mean W"),
    ("peak_memory_mb", "peak memory\nMB"),
    ("energy_j", "J/pass"),
    ("seconds", "s/pass"),
    ("e2e_p50_ms", "E2E p50\nms"),
    ("active_energy_j", "active J"),
    ("roofline_slowdown", "× floor"),
    ("peak_temperature_c", "peak\n°C"),
)

#: What stands behind the best figure of a column, before a Pareto-optimal point, and in either place where several
#: may be that.
BEST, OPTIMAL, TIED = "*", "P", "~"

#: What a narrow terminal shows where the axes leave no room for more.
MIN_COLUMNS = tuple(one for one in COLUMNS if one[0] in (SPEED, COST))

#: Headings of axes are broken into lines of so many characters.
HEADING_WIDTH = 10

#: Characters of a point's id that are shown, its beginning and its end, unless it is for pasting.
MAX_CHARACTERS = 160

#: Of a column of ids: in a narrower terminal lines are longer than it is, as no figure may lose digits.
NARROWEST_ID = 12


@dataclass(frozen=True)
class PointsTable:
    """A table, and what of it needs to be explained.

    Attributes:
        table: A row for each point.
        width: What it needs, in characters: the terminal's, or more where that is too narrow for the figures.
        has_best: A figure is marked as the best of its column.
        has_optimal: A point is marked as Pareto-optimal.
        has_tied: A figure or a point is marked as tied with others.
    """

    table: Table
    width: int
    has_best: bool
    has_optimal: bool
    has_tied: bool


def points_table(
    points: Sequence[PointResult], planned: Mapping[str, int], width: int, *, ids: bool = False
) -> PointsTable:
    """Return the table of *points*: what tells them apart, how often they were measured, figures, and verdicts.

    The best figures of a column and the Pareto-optimal points are marked, and those that are tied. A wide terminal
    shows more columns.

    Args:
        points: In the order of the study.
        planned: How many experiments of each point were to run, by the hash of its configuration.
        width: Of the terminal, in characters.
        ids: Show each point's id, for pasting, and not its axes.
    """
    rows = _Rows(points, planned)
    more = [one for one in MORE_COLUMNS if any(_summary(point, one[0]).mean is not None for point in points)]
    wider = [(*COLUMNS, *more[:count]) for count in range(len(more), -1, -1)]
    axes = [] if ids else list(dict.fromkeys(axis for point in points for axis in point.axes))
    layouts = [(axes, columns) for columns in (*wider, MIN_COLUMNS)] if axes else []
    layouts += [([], columns) for columns in wider]
    for shown, columns in layouts:
        made = rows.table(shown, columns, width, whole=ids)
        if _widest(made.table) <= width:
            return made
    for columns in (COLUMNS, MIN_COLUMNS):  # these fold ids
        made = rows.table([], columns, width, whole=ids)
        if _narrowest(made.table) <= width:
            break
    return replace(made, width=max(width, _narrowest(made.table)))


class _Rows:
    """What is in the table's cells, whatever columns it has."""

    def __init__(self, points: Sequence[PointResult], planned: Mapping[str, int]) -> None:
        self._points = points
        self._planned = planned
        self.optimal = pareto_optimal(points)
        self._verdicts = [worst(point.verdicts) for point in points]
        self._methods = {_summary(point, COST).label for point in points} - {None}

    def table(
        self, axes: Sequence[str], columns: Sequence[tuple[str, str]], width: int, *, whole: bool
    ) -> PointsTable:
        """Return the table with *axes*, or else with ids, *whole* ones."""
        mixed = len(self._methods) > 1
        table = plain_table()
        table.collapse_padding = True  # every column counts
        has_pareto = bool(self.optimal.first or self.optimal.tied)
        if has_pareto:
            table.add_column("")
        names = short_names(axes)
        for axis in axes:
            numbers = all(isinstance(point.axes.get(axis), int | float | None) for point in self._points)
            table.add_column(
                _heading(axis, names[axis]),
                justify="right" if numbers else "left",
                vertical="bottom",
                no_wrap=True,
            )
        if not axes:
            table.add_column("point", overflow="fold", vertical="bottom", min_width=NARROWEST_ID)
        table.add_column("n", justify="right", no_wrap=True)
        for name, heading in columns:
            methods = {_summary(point, name).label for point in self._points} - {None}
            if not mixed and len(methods) == 1:  # what is estimated says so wherever it is shown
                heading += f"\n{methods.pop()}"
            table.add_column(heading, justify="right", no_wrap=True)
        if mixed:
            table.add_column("energy is")
        judged = any(self._verdicts)
        if judged:
            table.add_column("verdict")
        ranked = {name: best(self._points, name) for name, _ in columns}
        for place, point in enumerate(self._points):
            cells = [_mark(self.optimal, place, OPTIMAL).strip()] if has_pareto else []
            cells += [_value(point, axis) for axis in axes] or [point.id if whole else _clipped(point.id)]
            n, wanted = _summary(point, "seconds").n, self._planned[point.config_hash]
            cells.append(str(n) if n == wanted else f"{n} of {wanted}")
            for name, _ in columns:
                cells.append(f"{figure(_summary(point, name))}{_mark(ranked[name], place, BEST)}")
            if mixed:
                cells.append(_summary(point, COST).label or "-")
            if judged:
                verdict = self._verdicts[place]
                cells.append(verdict.verdict if verdict is not None else "-")
            table.add_row(*cells)
        return PointsTable(
            table,
            width,
            has_best=any(ranking.first for ranking in ranked.values()),
            has_optimal=bool(self.optimal.first),
            has_tied=any(ranking.tied for ranking in (self.optimal, *ranked.values())),
        )


def _summary(point: PointResult, metric: str) -> Summary:
    """Return the statistics of a metric; those of nothing where an older version did not know it."""
    return point.metrics.get(metric) or Summary(mean=None, n=0, unit=CATALOGUE[metric].unit)


def _mark(ranking: Ranking, place: int, first: str) -> str:
    """Return the mark of a point, as wide as those of the others."""
    if place in ranking.first:
        return first
    if place in ranking.tied:
        return TIED
    return " " if ranking.first or ranking.tied else ""


def _value(point: PointResult, axis: str) -> str:
    return value_text(point.axes[axis]) if axis in point.axes else "-"


def _heading(axis: str, name: str) -> str:
    """Return the heading of *axis*, whose short *name* may be that of the column of cycles, ``n``."""
    if name == "n":
        return "n\n(prompts)" if axis == "n" else _broken(axis)
    return _broken(name)


def _broken(name: str) -> str:
    """Return an axis's name in lines, broken where its words begin."""
    lines = [""]
    for word in re.findall(r"[^_.]+[_.]*|[_.]+", name):
        if lines[-1] and len(lines[-1]) + len(word) > HEADING_WIDTH:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _clipped(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}…{text[-half:]}"


def _widest(table: Table) -> int:
    """Return how wide *table* is with nothing folded."""
    console = paper(10_000)
    return Measurement.get(console, console.options, table).maximum


def _narrowest(table: Table) -> int:
    """Return how wide *table* is where its ids are folded as far as they may be."""
    (column,) = [one for one in table.columns if one.min_width is not None]
    column.width = NARROWEST_ID
    try:
        return _widest(table)
    finally:
        column.width = None
