"""Tables of a StudyResult for spreadsheets and data frames, per point and per experiment.

A missing value is None, never 0. The name of every metric's column includes its unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.csv_files import read_csv, to_csv
from pytest_llem.results.loads import ATTAINMENT, GOOD_COST, GOODPUT, has_loads
from pytest_llem.results.manifest import stored_file
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.pareto import COST, SPEED, compared, pareto_optimal
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import worst
from pytest_llem.study.identity import value_text
from pytest_llem.times import seconds_between

if TYPE_CHECKING:
    import pandas

    from pytest_llem.results.study_result import StudyResult

Cell = str | int | float | bool | None

#: What each row stands for.
Per = Literal["point", "experiment", "request"]

#: Metrics of a short selection of columns, and those that it has for servers under load in addition.
_SHORT = (SPEED, COST, "ttft_p50_ms", "itl_p50_ms", "e2e_p50_ms", "seconds", "mean_power_w", "energy_j")
_SHORT_OF_LOADS = (GOOD_COST, ATTAINMENT, GOODPUT, "requests_per_second", "ttft_p99_ms", "tpot_p99_ms")

#: Columns besides axes and metrics that a short selection has, in tables of points and of experiments.
_SHORT_FACTS = ("study", "experiment", "point", "cycle", "cycles", "status", "error", "pareto_optimal", "verdict")

#: Suffixes of the columns that describe how an energy was obtained.
_PROVENANCE = ("method", "boundary", "invalid")

#: Columns of ``requests.csv`` with text, also if it could be read as a number.
_TEXTS = ("error",)

#: Units of energies and of metrics derived from energies: only these have a method.
_ENERGIES = {"J", "Wh", "W", "J·s", "1/J", "g"}


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    Attributes:
        columns: Names of the columns, in order.
        rows: Rows with a cell for each column.
        units: Units by the names of the columns that have one.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    units: Mapping[str, str]

    def to_csv(self) -> str:
        """Return CSV text: a missing value is an empty cell, a boolean is ``true`` or ``false``."""
        return to_csv([self.columns, *([_csv_cell(cell) for cell in row] for row in self.rows)])


def point_table(result: StudyResult) -> Table:
    """Return a row for each selected point: its axes, and the mean and spread of each metric.

    The mean has the metric's name. ``…_sd`` is the sample standard deviation over cycles, ``…_ci95_low`` and
    ``…_ci95_high`` the 95 % interval of the mean, ``…_n`` the number of cycles with a value. ``pareto_optimal`` is
    empty if the point has no interval, or if the intervals leave it open. ``…_method`` and
    ``…_boundary`` say how an energy was obtained and what it covers, ``…_invalid`` is the reason code if it cannot
    be right.
    """
    axes = _axes(result)
    selected = {entry.config_hash for entry in _entries(result)}
    points = [point for point in result.points if point.config_hash in selected or not result.experiments]
    optimal, in_question = pareto_optimal(points), compared(points)
    found = []
    for place, point in enumerate(points):
        verdict = worst(point.verdicts)
        row: dict[str, Cell] = {
            "study": result.name,
            "point": point.id,
            "config_hash": point.config_hash,
            **_axis_cells(point, axes),
            "cycles": len(point.cycles),
            "contended_cycles": len(point.contention.contended) if point.contention is not None else None,
            "pareto_optimal": place in optimal.first if place in in_question - optimal.tied else None,
            "verdict": verdict.verdict if verdict is not None else None,
        }
        for name in CATALOGUE:
            row |= _spread(name, point.summary_of(name))
        found.append(row)
    spread = {
        f"{name}{suffix}": definition.unit
        for name, definition in CATALOGUE.items()
        for suffix in ("", "_sd", "_ci95_low", "_ci95_high")
    }
    return _table(found, spread)


def experiment_table(result: StudyResult) -> Table:
    """Return a row for each selected experiment, in run order: its axes, its outcome, and each metric.

    ``…_method`` is the weakest method of all cycles of the experiment's point, ``…_boundary`` their boundary.
    """
    axes = _axes(result)
    points = {point.config_hash: point for point in result.points}
    found = []
    for entry in _entries(result):
        point = points[entry.config_hash]
        row: dict[str, Cell] = {
            "study": result.name,
            "experiment": entry.experiment_id,
            "point": entry.config_summary,
            "config_hash": entry.config_hash,
            "cycle": entry.cycle,
            **_axis_cells(point, axes),
            "status": entry.status,
            "error": f"{entry.error.kind}: {entry.error.message}" if entry.error else None,
            "attempt": entry.attempt or None,
            "worker": entry.worker,
            "device": entry.device,
            "gpus": _gpus(point, entry),
            "replayed_from": entry.replayed_from,
            "contention": _contention(point, entry),
            "started_at": entry.started_at,
            "completed_at": entry.completed_at,
            "wall_seconds": _wall_seconds(entry.started_at, entry.completed_at),
        }
        for name in CATALOGUE:
            summary = point.summary_of(name)
            value = row[name] = _value_in_cycle(point, summary, entry)
            if _has_method(name):
                row |= _provenance(name, summary if value is not None else None)
        found.append(row)
    units = {name: definition.unit for name, definition in CATALOGUE.items()} | {"wall_seconds": "s"}
    return _table(found, units)


def request_table(result: StudyResult, directory: Path) -> Table:
    """Return a row for each row of the requests.csv of completed experiments, with the axes of their points.

    Args:
        result: The result.
        directory: Its results directory. An experiment without a requests.csv has no rows.
    """
    axes = _axes(result)
    points = {point.config_hash: point for point in result.points}
    found: list[dict[str, Cell]] = []
    request_columns: dict[str, None] = {}
    for entry in _entries(result):
        file = stored_file(directory, entry, "requests.csv")
        if file is None or not file.exists():
            continue
        experiment: dict[str, Cell] = {
            "study": result.name,
            "point": entry.config_summary,
            **_axis_cells(points[entry.config_hash], axes),
            "cycle": entry.cycle,
        }
        with file.open(encoding="utf-8", newline="") as lines:
            for row in read_csv(lines):
                request_columns |= dict.fromkeys(row)
                found.append(experiment | {name: _request_cell(name, text) for name, text in row.items()})
    units = {"input_tokens": "tokens", "output_tokens": "tokens"}
    units |= {name: unit for name in request_columns for unit in ("ms", "s") if name.endswith(f"_{unit}")}
    return _table(found, units)


def _request_cell(name: str, text: str) -> Cell:
    """Return the value of a cell of ``requests.csv``; None if the cell is empty."""
    if not text:
        return None
    if name in _TEXTS:
        return text
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:  # a phase of a load on a server in place of the number of a pass
        return text


def short_table(result: StudyResult, rows: Table) -> Table:
    """Return *rows* with few columns: names, axes, and the main metrics with their intervals."""
    metrics = [*_SHORT, *(_SHORT_OF_LOADS if has_loads(result.points) else ())]
    shown = {*_SHORT_FACTS, *_axes(result)}
    shown |= {f"{name}{suffix}" for name in metrics for suffix in ("", "_ci95_low", "_ci95_high")}
    shown |= {f"{name}_{what}" for name in metrics if _has_method(name) for what in _PROVENANCE}
    places = [place for place, name in enumerate(rows.columns) if name in shown]
    columns = [rows.columns[place] for place in places]
    units = {name: unit for name, unit in rows.units.items() if name in shown}
    return Table(columns, [[row[place] for place in places] for row in rows.rows], units)


def _table(rows: Sequence[Mapping[str, Cell]], units: Mapping[str, str]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in columns] for row in rows]
    return Table(columns, cells, {name: units[name] for name in columns if name in units})


def _axes(result: StudyResult) -> list[str]:
    """Return the dotted keys of the axes of all points. Short names could equal those of other columns."""
    return list(dict.fromkeys(axis for point in result.points for axis in point.axes))


def _axis_cells(point: PointResult, axes: Sequence[str]) -> dict[str, Cell]:
    """Return the values of a point's axes, None if the point does not have the axis.

    Null, lists and mappings are written as in ids.
    """
    return {axis: _axis_cell(point.axes[axis]) if axis in point.axes else None for axis in axes}


def _axis_cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float) else value_text(value)


def _has_method(metric: str) -> bool:
    return CATALOGUE[metric].unit in _ENERGIES


def _spread(name: str, summary: Summary) -> dict[str, Cell]:
    low, high = summary.ci95 or (None, None)
    cells: dict[str, Cell] = {
        name: summary.mean,
        f"{name}_sd": summary.sd,
        f"{name}_ci95_low": low,
        f"{name}_ci95_high": high,
        f"{name}_n": summary.n,
    }
    return cells | _provenance(name, summary) if _has_method(name) else cells


def _provenance(name: str, summary: Summary | None) -> dict[str, Cell]:
    return {f"{name}_{what}": getattr(summary, what) if summary is not None else None for what in _PROVENANCE}


def _entries(result: StudyResult) -> list[ManifestEntry]:
    """Return the selected experiments; for a baseline, which keeps none, the completed cycles as experiments."""
    if result.experiments:
        return [one for one in result.experiments if one.status != "deselected"]
    return [
        ManifestEntry(
            experiment_id=f"{point.id}-cycle={cycle}",
            config_hash=point.config_hash,
            config_summary=point.id,
            cycle=cycle,
            status="completed",
        )
        for point in result.points
        for cycle in point.cycles
    ]


def _value_in_cycle(point: PointResult, summary: Summary, entry: ManifestEntry) -> float | None:
    """Return a metric's value in one cycle; None if the cycle has no value or the result does not keep it."""
    if entry.status != "completed" or entry.cycle not in point.cycles:
        return None
    place = point.cycles.index(entry.cycle)
    return summary.values[place] if place < len(summary.values) else None


def _gpus(point: PointResult, entry: ManifestEntry) -> str | None:
    """Return the UUIDs of an experiment's GPUs, separated by spaces; None without GPUs."""
    if not point.gpus or entry.cycle not in point.cycles:
        return None
    return " ".join(point.gpus[point.cycles.index(entry.cycle)]) or None


def _contention(point: PointResult, entry: ManifestEntry) -> str | None:
    """Return the state of contention of one cycle; None if the cycle has no result or no record of contention."""
    if point.contention is None or entry.status != "completed" or entry.cycle not in point.cycles:
        return None
    return point.contention.state(entry.cycle)


def _wall_seconds(start: str | None, end: str | None) -> float | None:
    return None if start is None or end is None else seconds_between(start, end)


def _csv_cell(cell: Cell) -> Cell:
    return str(cell).lower() if isinstance(cell, bool) else cell


def dataframe(
    result: StudyResult, per: Per, *, directory: Path | None = None, all_columns: bool = False
) -> pandas.DataFrame:
    """Return the rows of *result* as a data frame, with the columns' units in ``attrs``.

    Args:
        result: The result.
        per: What each row stands for.
        directory: The results directory, which ``request`` needs.
        all_columns: Return all columns of points and experiments, not the short selection.

    Raises:
        ImportError: pandas is not installed.
        ValueError: *per* is unknown, or is ``request`` without *directory*.
    """
    if per == "point":
        rows = point_table(result)
    elif per == "experiment":
        rows = experiment_table(result)
    elif per != "request":
        raise ValueError(f"per: {per!r} is not 'point', 'experiment' or 'request'")
    elif directory is None:
        raise ValueError("per 'request' reads files: use StudyResult.load(DIRECTORY)")
    else:
        rows = request_table(result, directory)
    if not all_columns and per != "request":
        rows = short_table(result, rows)
    try:
        import pandas
    except ImportError as error:
        reason = "a data frame needs pandas, which is not installed: pip install 'pytest-llem[dataframe]'"
        raise ImportError(reason, name="pandas") from error
    frame = pandas.DataFrame(list(rows.rows), columns=list(rows.columns))
    # A metric without any value is a column of floats too.
    frame = frame.astype(dict.fromkeys(rows.units, "float64"))
    frame.attrs["units"] = dict(rows.units)
    return frame
