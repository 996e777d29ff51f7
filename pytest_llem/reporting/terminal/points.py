"""Build the terminal's table of a study's points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from rich.measure import Measurement
from rich.table import Table

from pytest_llem.reporting.terminal.loads import figure_text, is_ranked, load_columns, load_lines
from pytest_llem.reporting.terminal.tables import COLUMNS, Columns, plain_table, table_console
from pytest_llem.reporting.text import escaped, markdown_row, mean_text, short_texts, wrapped
from pytest_llem.results.loads import GOOD_COST, has_loads, is_search, load_of, varying_axes
from pytest_llem.results.pareto import COST, SPEED, Ranking, best, pareto_optimal
from pytest_llem.results.points import PointResult
from pytest_llem.results.verdicts import worst
from pytest_llem.study.identity import short_names, value_text

#: Columns that a wide terminal shows in addition to :data:`COLUMNS`, by priority: metric, heading.
MORE_COLUMNS = (
    ("itl_p50_ms", "ITL p50\nms"),
    ("mean_power_w", "mean W"),
    ("peak_memory_mb", "peak memory\nMB"),
    ("energy_j", "J/pass"),
    ("seconds", "s/pass"),
    ("e2e_p50_ms", "E2E p50\nms"),
    ("active_energy_j", "active J"),
    ("roofline_slowdown", "× roofline"),
    ("peak_temperature_c", "peak\n°C"),
)

#: Mark after the best figure of a column, mark before a Pareto-optimal point, and mark for figures and points that
#: are tied for either.
BEST, OPTIMAL, TIED = "*", "P", "~"

#: Metrics of the columns of a terminal that is too narrow for all main columns.
MIN_METRICS = (SPEED, COST, GOOD_COST)

#: Characters of a line of an axis's heading, which is wrapped between words.
HEADING_WIDTH = 10

#: Characters shown of a point's id, half from each end, unless whole ids are asked for.
MAX_CHARACTERS = 160

#: Characters of the narrowest column of ids. In a still narrower terminal, lines are longer than the terminal is
#: wide, because no figure may lose digits.
MIN_ID_WIDTH = 12


class PointsTable(NamedTuple):
    """A table of points.

    Attributes:
        table: The table, with a row for each point.
        width: Its width in characters: the terminal's, or more if the terminal is too narrow for the figures.
        legend: What the marks in it mean, one line each.
    """

    table: Table
    width: int
    legend: list[str]


def points_table(
    points: Sequence[PointResult], planned: Mapping[str, int], width: int, *, ids: bool = False
) -> PointsTable:
    """Return the table of *points*: their axes, number of completed cycles, figures and verdicts.

    The best figures of each column, the Pareto-optimal points and ties are marked. A wide terminal shows more
    columns.

    Args:
        points: The points, in the order of the study.
        planned: Number of selected experiments of each point, by the hash of its configuration.
        width: Width of the terminal in characters.
        ids: Show each point's whole id, for copying, instead of its axes.
    """
    rows, column_sets = _Rows(points, planned), _columns(points)
    narrowest = [one for one in column_sets[-1] if one[0] in MIN_METRICS]
    axes = [] if ids else _axes(points)
    layouts = [(axes, columns) for columns in (*column_sets, narrowest)] if axes else []
    layouts += [([], columns) for columns in column_sets]
    for shown, columns in layouts:
        made = rows.table(shown, columns, width, whole=ids)
        if _widest(made.table) <= width:
            return made
    for columns in (column_sets[-1], narrowest):  # with the ids wrapped
        min_width = _narrowest(rows.table([], columns, width, whole=ids).table)
        if min_width <= width:
            break
    width = max(width, min_width)
    return rows.table([], columns, width, whole=ids, id_width=MIN_ID_WIDTH + width - min_width)


def points_markdown(
    points: Sequence[PointResult],
    planned: Mapping[str, int],
    escape: Callable[[str], str] = escaped,
    max_rows: int | None = None,
) -> Iterator[str]:
    """Yield the lines of the widest table of *points* as Markdown, and a list of what stands out in it.

    Args:
        points: The points, in the order of the study.
        planned: Number of selected experiments of each point, by the hash of its configuration.
        escape: Returns a text on one line, escaped for a cell.
        max_rows: Rows that are yielded at most; None for all.
    """
    rows, columns, axes = _Rows(points, planned), _columns(points)[0], _axes(points)
    made = rows.table(axes, columns, width=0, whole=True)
    headings = [*rows.headings(axes, columns, width=None)]
    yield markdown_row(escape(text) for text, _ in headings)
    yield markdown_row("--:" if layout.get("justify") == "right" else ":--" for _, layout in headings)
    for cells in islice(rows.cells(axes, columns, whole=True), max_rows):
        yield markdown_row(map(escape, cells))
    loads = load_lines(points) if has_loads(points) else ()
    if notes := [*loads, *made.legend]:
        yield ""
        yield from (f"- {escape(note)}" for note in notes)


def _axes(points: Sequence[PointResult]) -> list[str]:
    """Return the axes that the table has as columns: those that vary, or all if none does."""
    return list(varying_axes(points) or (points[0].axes if points else ()))


def _columns(points: Sequence[PointResult]) -> list[Columns]:
    """Return the sets of columns that the table can have, the widest set first."""
    if has_loads(points):
        return load_columns(points)
    first, more = _with_values(COLUMNS, points) or COLUMNS, _with_values(MORE_COLUMNS, points)
    return [(*first, *more[:count]) for count in range(len(more), -1, -1)]


def _with_values(columns: Columns, points: Sequence[PointResult]) -> Columns:
    """Return the columns whose metric any of *points* has."""
    return tuple(one for one in columns if any(point.summary_of(one[0]).mean is not None for point in points))


class _Rows:
    """The contents of the table, from which tables with different columns are made."""

    def __init__(self, points: Sequence[PointResult], planned: Mapping[str, int]) -> None:
        self._points = points
        self._planned = planned
        self._has_loads = has_loads(points)
        # No point with a load is marked: the line below the table names the best load within the SLO instead.
        self.optimal = Ranking(set(), set()) if self._has_loads else pareto_optimal(points)
        self._verdicts = [worst(point.verdicts) for point in points]
        self._is_mixed = len({point.energy_label for point in points} - {None}) > 1
        self._has_pareto = bool(self.optimal.first or self.optimal.tied)
        self._has_search = self._has_loads and any(map(is_search, points))

    def table(
        self, axes: Sequence[str], columns: Columns, width: int, *, whole: bool, id_width: int | None = None
    ) -> PointsTable:
        """Return the table with columns of *axes*, or without any, of ids in lines of *id_width*.

        *whole* values and ids are not shortened.
        """
        table = plain_table()
        table.collapse_padding = True  # saves width
        for heading, options in self.headings(axes, columns):
            table.add_column(heading, **options)
        ranked = self._ranked(columns)
        for cells in self.cells(axes, columns, whole=whole, id_width=id_width):
            table.add_row(*cells)
        legend = {
            "mean over n cycles, ± half of its 95 % interval": any(
                point.summary_of("seconds").ci95 for point in self._points
            ),
            f"{BEST} best of its column": any(ranking.first for ranking in ranked.values()),
            f"{OPTIMAL} Pareto-optimal in J/out token and out tok/s": self.optimal.first,
            f"{TIED} tied with the best: the intervals overlap": any(
                ranking.tied for ranking in (self.optimal, *ranked.values())
            ),
        }
        return PointsTable(table, width, [line for line, is_shown in legend.items() if is_shown])

    def headings(
        self, axes: Sequence[str], columns: Columns, width: int | None = HEADING_WIDTH
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each column's heading, with axes in lines of *width*, and its layout for a terminal."""
        right: dict[str, Any] = {"justify": "right", "no_wrap": True}
        if self._has_pareto:
            yield "", {}
        names = short_names(axes)
        for axis in axes:
            numbers = all(isinstance(point.axes.get(axis), int | float | None) for point in self._points)
            layout = right if numbers else {"no_wrap": True}
            heading = _heading(axis, names[axis])
            lines = [heading] if width is None else wrapped(heading, width)
            yield "\n".join(lines), {**layout, "vertical": "bottom"}
        if not axes:
            yield "point", {"overflow": "fold", "vertical": "bottom", "min_width": MIN_ID_WIDTH}
        if self._has_search:
            yield "load\nfound", {**right, "vertical": "bottom"}
        yield "n", right
        for name, heading in columns:
            methods = {point.summary_of(name).label for point in self._points} - {None}
            alike = not self._is_mixed and len(methods) == 1  # so that an estimate is always marked as one
            yield f"{heading}\n{methods.pop()}" if alike else heading, right
        if self._is_mixed:
            yield "energy\nmethod", {}
        if any(self._verdicts):
            yield "verdict", {}

    def cells(
        self, axes: Sequence[str], columns: Columns, *, whole: bool, id_width: int | None = None
    ) -> Iterator[list[str]]:
        """Yield the cells of each point."""
        values = {axis: self._values(axis, whole=whole) for axis in axes}
        ranked = self._ranked(columns)
        for place, point in enumerate(self._points):
            cells = [_mark(self.optimal, place, OPTIMAL).strip()] if self._has_pareto else []
            cells += [values[axis][place] for axis in axes] or [self._id(point, whole=whole, width=id_width)]
            if self._has_search:
                load = load_of(point)
                cells.append("-" if load is None else f"{load:.4g}")
            n, planned = point.n_cycles, self._planned[point.config_hash]
            cells.append(str(n) if n == planned else f"{n} of {planned}")
            for name, _ in columns:
                summary = point.summary_of(name)
                text = figure_text(name, summary) if self._has_loads else mean_text(summary)
                cells.append(f"{text}{_mark(ranked[name], place, BEST)}")
            if self._is_mixed:
                cells.append(point.energy_label or "-")
            if any(self._verdicts):
                verdict = self._verdicts[place]
                cells.append(verdict.verdict if verdict is not None else "-")
            yield cells

    def _values(self, axis: str, *, whole: bool) -> list[str]:
        """Return the values of an axis, shortened unless *whole* is set."""
        values = [value_text(point.axes[axis]) if axis in point.axes else "-" for point in self._points]
        short = short_texts(values)
        return values if whole else [short[value] for value in values]

    def _id(self, point: PointResult, *, whole: bool, width: int | None) -> str:
        text = point.id if whole else _clipped(point.id)
        return text if width is None else "\n".join(wrapped(text, width))

    def _ranked(self, columns: Columns) -> dict[str, Ranking]:
        none = Ranking(set(), set())
        return {
            name: best(self._points, name) if not self._has_loads or is_ranked(name) else none
            for name, _ in columns
        }


def _mark(ranking: Ranking, place: int, first: str) -> str:
    """Return the mark of a point, or a space if other points have one, so that the column aligns."""
    if place in ranking.first:
        return first
    if place in ranking.tied:
        return TIED
    return " " if ranking.first or ranking.tied else ""


def _heading(axis: str, name: str) -> str:
    """Return the heading of *axis*; a short *name* ``n`` is replaced, because ``n`` is the column of cycles."""
    if name == "n":
        return "n\n(prompts)" if axis == "n" else axis
    return name


def _clipped(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}…{text[-half:]}"


def _widest(table: Table) -> int:
    """Return the width of *table* in characters with nothing wrapped."""
    console = table_console(10_000)
    return Measurement.get(console, console.options, table).maximum


def _narrowest(table: Table) -> int:
    """Return the width of *table* in characters with its ids wrapped to :data:`MIN_ID_WIDTH`."""
    (column,) = [one for one in table.columns if one.min_width is not None]
    column.width = MIN_ID_WIDTH
    try:
        return _widest(table)
    finally:
        column.width = None
