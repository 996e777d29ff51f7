"""Build the report's tables of points, experiments, gates and failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.verdict_text import verdict_text
from pytest_llem.reporting.html.contents import Contents
from pytest_llem.reporting.html.experiment_plots import value_of
from pytest_llem.reporting.html.formatting import (
    NOTHING,
    cycle_figure,
    details,
    main_metrics,
    metrics_with_values,
    name_of,
    shown,
    unit_of,
)
from pytest_llem.reporting.html.labels import Axis, axis_text, labels_of
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.pareto import best
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.verdicts import GateVerdict, severity
from pytest_llem.study.identity import value_text

#: Failures shown, each with its traceback.
MAX_FAILURES = 100

#: Columns of axes and metrics that fit a screen of 1,280 pixels, and the fewest columns of metrics.
_MAX_MAIN, _MIN_MAIN = 8, 4


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: The figure as shown; a dash if there is no value.
        title: Tooltip with all details, or the reason why there is no value.
        sort: The value to sort by; None if there is no value.
        best: Whether it is the best of its column.
    """

    text: str
    title: str
    sort: float | None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """The heading of a metric's column.

    Attributes:
        name: The metric's name.
        unit: Its unit; empty for a ratio.
        method: The method of an energy if all points have the same, so that an estimate is always marked as one.
        meaning: Tooltip.
        main: Whether the column is shown at first.
    """

    name: str
    unit: str
    method: str
    meaning: str
    main: bool


@dataclass(frozen=True)
class Row:
    """A point's row.

    Attributes:
        number: Number of the point, from 1.
        point: The point.
        axes: Texts of the values of its axes.
        n: Number of completed cycles; if cycles are missing, also of how many.
        cells: Its figures.
        method: Method of its energies; a dash if it has none.
        optimal: Whether the point is Pareto-optimal.
        verdicts: Outcome, verdict, and number of gates with both, worst first.
        keywords: What the page's filter finds the point by.
    """

    number: int
    point: PointResult
    axes: list[str]
    n: str
    cells: list[Cell]
    method: str
    optimal: bool
    verdicts: list[tuple[str, str, int]]
    keywords: str


def columns(points: Sequence[PointResult]) -> list[str]:
    """Return the metrics that get a column: those with a value at any point, and the first five main ones."""
    return list(dict.fromkeys([*main_metrics(points)[:5], *metrics_with_values(points)]))


def headings(points: Sequence[PointResult], metrics: Iterable[str], n_axes: int) -> list[Column]:
    """Return the column headings of *metrics*; the more axes, the fewer of them are shown at first."""
    main = main_metrics(points)[: max(_MIN_MAIN, _MAX_MAIN - n_axes)]
    return [
        Column(name_of(one), unit_of(one), _method(points, one), CATALOGUE[one].meaning, one in main)
        for one in metrics
    ]


def _method(points: Sequence[PointResult], metric: str) -> str:
    """Return how an energy was obtained; empty if that differs, or the metric is not an energy."""
    labels = {point.summary_of(metric).label for point in points} - {None}
    return ", ".join(map(str, labels)) if len(labels) == 1 else ""


def methods_differ(points: Sequence[PointResult]) -> bool:
    """Return whether the energies of *points* were obtained in different ways, so that each row has to say how."""
    return len({point.energy_label for point in points} - {None}) > 1


def point_rows(contents: Contents, axes: Sequence[Axis], metrics: Sequence[str], optimal: set[int]) -> list[Row]:
    """Return a row for each point; *optimal* are the indices of the Pareto-optimal points."""
    best_places = {metric: best(contents.points, metric).first for metric in metrics}
    rows = []
    for index, point in enumerate(contents.points):
        cells = []
        for metric in metrics:
            summary = point.summary_of(metric)
            title = details(summary, unit_of(metric))
            cells.append(Cell(shown(summary), title, summary.mean, index in best_places[metric]))
        n, n_planned = point.n_cycles, contents.planned[point.config_hash]
        rows.append(
            Row(
                number=index + 1,
                point=point,
                axes=[axis_text(point.axes[one.key]) if one.key in point.axes else NOTHING for one in axes],
                n=str(n) if n >= n_planned else f"{n} of {n_planned}",
                cells=cells,
                method=point.energy_label or NOTHING,
                optimal=index in optimal,
                verdicts=_verdicts(point.verdicts),
                keywords=_keywords(point),
            )
        )
    return rows


def _verdicts(verdicts: Sequence[GateVerdict]) -> list[tuple[str, str, int]]:
    """Return each outcome and verdict of a point with its count, worst first."""
    count = Counter((str(one.outcome), str(one.verdict)) for one in sorted(verdicts, key=severity))
    return [(outcome, word, number) for (outcome, word), number in count.items()]


def _keywords(point: PointResult) -> str:
    """Return the ``axis=value`` keywords of the page's filter, with the full and the short name of each axis."""
    full = list(point.axes.items())
    short = [(axis.rpartition(".")[2], value) for axis, value in full]
    return "\n".join(dict.fromkeys(f"{axis}={value_text(value)}".lower() for axis, value in [*full, *short]))


def cycle_rows(contents: Contents, metrics: Sequence[str]) -> list[tuple[int, str, ManifestEntry, list[str]]]:
    """Return each completed experiment in run order: position, point, manifest entry, and figures."""
    labels = labels_of(contents.points)
    return [
        (
            order,
            labels[one.point],
            one.entry,
            [cycle_figure(value_of(contents, one, metric)) for metric in metrics],
        )
        for order, one in enumerate(contents.cycles, 1)
    ]


def gate_rows(points: Sequence[PointResult]) -> list[tuple[GateVerdict, str]]:
    """Return the verdicts, worst first, each with its text."""
    verdicts = sorted((verdict for point in points for verdict in point.verdicts), key=severity)
    return [(verdict, verdict_text(verdict)) for verdict in verdicts]


def skips(result: StudyResult) -> list[tuple[str, list[str]]]:
    """Return the reasons for skipping experiments, each with the ids of those experiments."""
    found: dict[str, list[str]] = {}
    for entry in result.experiments:
        if entry.status == "skipped" and entry.error is None:
            found.setdefault(entry.reason or "no reason was given", []).append(entry.experiment_id)
    return list(found.items())


def pairs(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested plain data as dotted keys and texts; null becomes a dash."""
    if isinstance(data, Mapping):
        return [
            leaf for key, part in data.items() for leaf in pairs(part, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(data, list) and any(isinstance(part, Mapping) for part in data):
        return [leaf for number, part in enumerate(data) for leaf in pairs(part, f"{prefix}[{number}]")]
    return [(prefix, plain(data))]


def groups(data: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return nested data as tables of :func:`pairs`, one per nested mapping. Keys without a value come last."""
    tables = [("machine", pairs({key: one for key, one in data.items() if not _is_nested(one)}))]
    for key, one in data.items():
        if isinstance(one, Mapping):
            tables.append((key, pairs(one)))
        elif _is_nested(one):
            tables += [(f"{key} {number}", pairs(part)) for number, part in enumerate(one, 1)]
    return [(title, _known(found)) for title, found in tables if found]


def _is_nested(data: Any) -> bool:
    return isinstance(data, Mapping) or (
        isinstance(data, list) and any(isinstance(part, Mapping) for part in data)
    )


def _known(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    unknown = [key for key, text in found if text == NOTHING]
    known = [(key, text) for key, text in found if text != NOTHING]
    return [*known, ("not known", ", ".join(unknown))] if unknown else known


def plain(data: Any) -> str:
    """Return a scalar or a list of scalars as text: ``yes``, ``no``, or a dash for null."""
    if data is None:
        return NOTHING
    if isinstance(data, bool):
        return "yes" if data else "no"
    if isinstance(data, list):
        return ", ".join(map(plain, data)) or NOTHING
    return str(data)


def facts(points: Sequence[PointResult], which: str) -> list[tuple[str, str]]:
    """Return facts of measured points by key: the common value, or each value with its number of points.

    Args:
        points: The points.
        which: ``testbed`` or ``sut``.
    """
    values: dict[str, Counter[str]] = {}
    measured = [point for point in points if point.cycles]
    for point in measured:
        for key, one in getattr(point, which).items():
            values.setdefault(key, Counter())[plain(one)] += 1
    return [
        (key, next(iter(count)) if len(count) == 1 and count.total() == len(measured) else _each(count))
        for key, count in values.items()
    ]


def _each(count: Counter[str]) -> str:
    found = [f"{text} ({n} of the points)" for text, n in count.most_common(8)]
    return "; ".join(found) + (f"; and {len(count) - 8} more" if len(count) > 8 else "")


def shared_settings(points: Sequence[PointResult]) -> list[tuple[str, str]]:
    """Return the settings that have the same value at all points."""
    configs = [dict(pairs(point.config)) for point in points]
    if not configs:
        return []
    return [(key, text) for key, text in configs[0].items() if all(one.get(key) == text for one in configs)]
