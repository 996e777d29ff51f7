"""Plot a metric against each swept axis, with one line for each combination of the other axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from pytest_llem.reporting.html.formatting import (
    axis_text,
    label_of,
    metrics_with_values,
    neutral,
    shown,
    title_of,
)
from pytest_llem.reporting.html.plots import SYMBOLS, Json, Plot, Select, figure, short
from pytest_llem.reporting.html.ranges import bars, range_of
from pytest_llem.reporting.terminal.plan import counted
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.identity import short_names, value_text

#: Up to so many lines, the legend names them.
MAX_NAMED = 12

#: A line of the plot: the other axes' values, and pairs of position along the axis and index of the point.
_Line = tuple[str, list[tuple[int, int]]]


def sweep_plot(points: Sequence[PointResult]) -> Plot | None:
    """Return the plot, or None if no axis has two values or no metric has a value."""
    names = short_names(dict.fromkeys(axis for point in points for axis in point.axes))
    axes = {axis: values for axis in names if len(values := _values(points, axis)) > 1}
    metrics = metrics_with_values(points)
    if not axes or not metrics:
        return None
    layers: dict[str, Json] = {}
    for place, (axis, values) in enumerate(axes.items()):
        lines = _lines(points, axis, values, names)
        layers[str(place)] = _along(points, names[axis], values, lines)
        for number, metric in enumerate(metrics):
            layers[f"{place}/{number}"] = _heights(points, metric, lines)
    # The axis with the most values gives the fewest lines: the plot shows it first.
    longest = max(range(len(axes)), key=lambda place: len(list(axes.values())[place]))
    selects = [
        Select("along", [names[axis] for axis in axes], longest),
        Select("metric", [title_of(metric) for metric in metrics]),
    ]
    caption = (
        "The mean over the cycles of each point against a swept axis, with its 95 % interval if there are several "
        "cycles. A line joins points that differ only in this axis; between them nothing was measured. The table "
        "of points has the same figures."
    )
    return Plot("sweep", "Along the swept axes", caption, figure([], height=460), selects, layers)


def _values(points: Sequence[PointResult], axis: str) -> list[Any]:
    """Return the values of an axis: numbers sorted, others in the study's order."""
    found = {value_text(point.axes[axis]): point.axes[axis] for point in points if axis in point.axes}
    values = list(found.values())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted(values) if numbers else values


def _lines(points: Sequence[PointResult], axis: str, values: list[Any], names: dict[str, str]) -> list[_Line]:
    places = {value_text(value): place for place, value in enumerate(values)}
    lines: dict[str, list[tuple[int, int]]] = {}
    for index, point in enumerate(points):
        if axis in point.axes:
            rest = ", ".join(f"{names[one]}={axis_text(it)}" for one, it in point.axes.items() if one != axis)
            lines.setdefault(rest, []).append((places[value_text(point.axes[axis])], index))
    return [(rest, sorted(line)) for rest, line in lines.items()]


def _along(points: Sequence[PointResult], name: str, values: list[Any], lines: Sequence[_Line]) -> Json:
    """Return the part of the figure that is the same for all metrics along an axis."""
    shift = min(0.04, 0.4 / len(lines))  # so that the intervals of lines do not overlap
    traces = [
        go.Scatter(
            mode="lines+markers",
            name=neutral(rest or name),
            x=[round(place + shift * (number - (len(lines) - 1) / 2), 3) for place, _ in line],
            marker={"size": 9, "symbol": SYMBOLS[(number // 8) % len(SYMBOLS)]},
            line={"width": 1.5},
            error_y={"type": "data", "symmetric": False, "thickness": 1.2, "width": 4},
            customdata=[[neutral(label_of(index, points[index]))] for _, index in line],
            hovertemplate="<b>%{customdata[0]}</b><br>%{text}<extra></extra>",
            showlegend=len(lines) <= MAX_NAMED and bool(rest),
        ).to_plotly_json()
        for number, (rest, line) in enumerate(lines)
    ]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(values))),
            "ticktext": [neutral(axis_text(one), 24) for one in values],
            "title": {"text": neutral(name)},
            "range": [-0.4, len(values) - 0.6],
        }
    }
    return {"data": traces, "layout": layout}


def _heights(points: Sequence[PointResult], metric: str, lines: Sequence[_Line]) -> Json:
    absent = Summary(mean=None, n=0, unit="")  # results of older versions may not contain the metric
    by_line = [[points[index].metrics.get(metric, absent) for _, index in line] for _, line in lines]
    known = [one for summaries in by_line for one in summaries if one.mean is not None]
    missing = sum(map(len, by_line)) - len(known)
    notes = [f"{counted(len(lines), 'line')}: hover over a mark for its name."] if len(lines) > MAX_NAMED else []
    if missing:
        notes.append(f"{counted(missing, 'point')} without a value {'is' if missing == 1 else 'are'} left out.")
    methods = sorted({one.method for one in known if one.method})
    title = title_of(metric) + (f", {' and '.join(methods)}" if methods else "")
    if not known:  # along this axis
        return {"data": [{"y": [None] * len(line)} for line in by_line], "layout": {}, "note": " ".join(notes)}
    axis = range_of(known)
    if axis.cut:
        notes.append("Intervals that extend beyond the plot are cut off; double-click to show them whole.")
    traces = [
        {
            "y": [short(one.mean) for one in summaries],
            "error_y": bars(summaries, axis),
            "text": [shown(one) + (f" {one.method}" if one.method else "") for one in summaries],
        }
        for summaries in by_line
    ]
    return {"data": traces, "layout": {"yaxis": axis.axis(title)}, "note": " ".join(notes)}
