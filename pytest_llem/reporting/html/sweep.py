"""Plot a metric against each swept axis, with one line for each combination of the other axes."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.formatting import axis_title, metrics_with_values, neutral, shown, title_of
from pytest_llem.reporting.html.labels import Axis, axes_of, labels_of
from pytest_llem.reporting.html.plots import (
    CUT,
    SYMBOLS,
    ByAxis,
    Json,
    Plot,
    Select,
    bars,
    figure,
    range_of,
    short,
)
from pytest_llem.reporting.text import counted
from pytest_llem.results.points import PointResult

#: Up to so many lines, the legend names them.
MAX_NAMED = 12

#: Values of the axis by which the plot is split into panels at first.
MAX_FIRST_PANELS = 4

#: A line of the plot: the other axes' values, and pairs of position along the axis and index of the point.
_Line = tuple[str, list[tuple[int, int]]]


def sweep_plot(points: Sequence[PointResult]) -> Plot | None:
    """Return the plot, or None if no axis has two values or no metric has a value."""
    axes = [axis for axis in axes_of(points) if len(axis.texts) > 1]
    metrics = metrics_with_values(points)
    if not axes or not metrics:
        return None
    labels = labels_of(points)
    layers: dict[str, Json] = {}
    for place, axis in enumerate(axes):
        lines = _lines(points, axis, axes)
        layers[str(place)] = _along(axis, lines, labels)
        for number, metric in enumerate(metrics):
            layers[f"{place}/{number}"] = _heights(points, metric, lines)
    # The axis with the most values gives the fewest lines: the plot shows it first.
    longest = max(range(len(axes)), key=lambda place: len(axes[place].texts))
    selects = [
        Select("along", [axis.name for axis in axes], longest),
        Select("metric", [title_of(metric) for metric in metrics]),
    ]
    caption = (
        "The mean over the cycles of each point against a swept axis, with its 95 % interval if there are several "
        "cycles. A line joins points that differ only in this axis; between them nothing was measured. The table "
        "of points has the same figures."
    )
    color, panel = _first_choice([axis for axis in axes if axis is not axes[longest]])
    by_axis = ByAxis("line", color, panel)
    return Plot("sweep", "Along the swept axes", caption, figure([], height=460), selects, layers, by_axis)


def _first_choice(others: Sequence[Axis]) -> tuple[str | None, str | None]:
    """Return the keys of the axes of colours and panels at first: the most values, if not too many."""
    by_size = sorted(others, key=lambda axis: -len(axis.texts))
    color = next((axis for axis in by_size if axis.has_colors), None)
    panel = next((axis for axis in by_size if axis is not color and len(axis.texts) <= MAX_FIRST_PANELS), None)
    return color.key if color else None, panel.key if panel else None


def _lines(points: Sequence[PointResult], axis: Axis, axes: Sequence[Axis]) -> list[_Line]:
    places = {text: place for place, text in enumerate(axis.texts.values())}
    lines: dict[str, list[tuple[int, int]]] = {}
    for index, point in enumerate(points):
        if (text := axis.text(point)) is not None:
            rest = ((one.name, one.text(point)) for one in axes if one is not axis)
            name = ", ".join(f"{other}={value}" for other, value in rest if value is not None)
            lines.setdefault(name, []).append((places[text], index))
    return [(rest, sorted(line)) for rest, line in lines.items()]


def _along(axis: Axis, lines: Sequence[_Line], labels: Sequence[str]) -> Json:
    """Return the part of the figure that is the same for all metrics along an axis."""
    shift = min(0.04, 0.4 / len(lines))  # so that the intervals of lines do not overlap
    traces = [
        go.Scatter(
            mode="lines+markers",
            name=neutral(rest or axis.name),
            meta=[index for _, index in line],
            x=[round(place + shift * (number - (len(lines) - 1) / 2), 3) for place, _ in line],
            marker={"size": 9, "symbol": SYMBOLS[(number // 8) % len(SYMBOLS)]},
            line={"width": 1.5},
            error_y={"type": "data", "symmetric": False, "thickness": 1.2, "width": 4},
            customdata=[[neutral(labels[index])] for _, index in line],
            hovertemplate="<b>%{customdata[0]}</b><br>%{text}<extra></extra>",
            showlegend=len(lines) <= MAX_NAMED and bool(rest),
        ).to_plotly_json()
        for number, (rest, line) in enumerate(lines)
    ]
    texts = [neutral(text) for text in axis.texts.values()]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(texts))),
            "ticktext": texts,
            "title": {"text": neutral(axis.name)},
            "range": [-0.4, len(texts) - 0.6],
        }
    }
    return {"data": traces, "layout": layout}


def _heights(points: Sequence[PointResult], metric: str, lines: Sequence[_Line]) -> Json:
    """Return the layer of a metric: the heights of its marks, the axis, and a note."""
    by_line = [[points[index].summary_of(metric) for _, index in line] for _, line in lines]
    known = [one for summaries in by_line for one in summaries if one.mean is not None]
    missing = sum(map(len, by_line)) - len(known)
    notes = [f"{counted(len(lines), 'line')}: hover over a mark for its name."] if len(lines) > MAX_NAMED else []
    if missing:
        notes.append(f"{counted(missing, 'point')} without a value {'is' if missing == 1 else 'are'} left out.")
    if not known:  # no point of these lines has a value
        return {"data": [{"y": [None] * len(line)} for line in by_line], "layout": {}, "note": " ".join(notes)}
    axis = range_of(known)
    if axis.cut:
        notes.append(CUT)
    traces = [
        {
            "y": [short(one.mean) for one in summaries],
            "error_y": bars(summaries, axis.type),
            "text": [shown(one) + (f" {one.method}" if one.method else "") for one in summaries],
        }
        for summaries in by_line
    ]
    return {"data": traces, "layout": {"yaxis": axis.axis(axis_title(metric, known))}, "note": " ".join(notes)}
