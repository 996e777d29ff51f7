"""Plot points: a metric against each swept axis, and energy against speed with the Pareto-optimal points."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.formatting import axis_title, metrics_with_values, neutral, shown, title_of
from pytest_llem.reporting.html.labels import Axis, axes_of, labels_of, marks_of
from pytest_llem.reporting.html.plots import (
    CUT,
    SYMBOLS,
    ByAxis,
    Json,
    Plot,
    Range,
    Select,
    bars,
    figure,
    range_of,
    short,
)
from pytest_llem.reporting.text import counted
from pytest_llem.results.pareto import COST, SPEED, pareto_optimal
from pytest_llem.results.points import PointResult

#: Up to so many lines, the legend names them.
MAX_LINES = 12

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
            showlegend=len(lines) <= MAX_LINES and bool(rest),
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
    notes = [f"{counted(len(lines), 'line')}: hover over a mark for its name."] if len(lines) > MAX_LINES else []
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


#: Up to so many points, all have a label if it does not overlap with others; of more, the Pareto-optimal ones.
MAX_LABELLED = 40

#: Pareto-optimal points that the caption names.
MAX_CAPTIONED = 6

#: Marks of points by the energy's method, other than ``measured``. Estimated and attributed energy is hollow.
_METHOD_SYMBOLS = {"estimated": "diamond-open", "attributed": "square-open", "sampled": "triangle-up"}


def pareto_plot(points: Sequence[PointResult]) -> Plot | None:
    """Return the plot, or None if no point has both metrics."""
    known = [
        index
        for index, point in enumerate(points)
        if all(point.summary_of(metric).mean is not None for metric in (SPEED, COST))
    ]
    if not known:
        return None
    optimal, tied = pareto_optimal(points)
    kinds = sorted({_kind(points[index]) for index in known})
    speed = range_of([points[index].metrics[SPEED] for index in known])
    cost = range_of([points[index].metrics[COST] for index in known])
    labels, mark_texts = labels_of(points), marks_of(points)
    traces = [_frontier(points, [index for index in known if index in optimal], kind) for kind in kinds]
    for kind in kinds:
        for best in (False, True):  # so that the optimal ones are drawn on top
            chosen = [one for one in known if _kind(points[one]) == kind and (one in optimal) == best]
            if chosen:
                traces.append(_markers(points, chosen, (labels, mark_texts), (speed, cost), kind, best))
    methods = sorted({kind[0] for kind in kinds})
    method = f" ({methods[0]})" if len(methods) == 1 else " (method: see legend)"
    plot = figure(
        traces,
        height=480,
        xaxis=speed.axis("output tokens per second"),
        yaxis=cost.axis(f"J per output token{method}"),
    )
    sentences = [f"{counted(len(known), 'point')}; down and to the right is better."]
    if optimal:
        names = ", ".join(labels[index] for index in sorted(optimal)[:MAX_CAPTIONED])
        more = f" and {len(optimal) - MAX_CAPTIONED} more" if len(optimal) > MAX_CAPTIONED else ""
        sentences.append(f"Pareto-optimal (no other point is both faster and uses less energy): {names}{more}.")
    if tied:
        what = counted(len(tied), "more point" if optimal else "point")
        sentences.append(f"{what} may be Pareto-optimal: the intervals overlap.")
    if any(points[index].metrics[metric].ci95 for index in known for metric in (SPEED, COST)):
        sentences.append("Bars are 95 % intervals of the mean.")
    if methods != ["measured"]:
        marked = ": hollow marks and triangles are not measured" if "measured" in methods else ", not measured"
        sentences.append(f"Energy is {' or '.join(methods)}{marked}.")
    if len(kinds) > 1:
        sentences.append("Energies of different methods or boundaries are not compared with each other.")
    if speed.cut or cost.cut:
        sentences.append(CUT)
    by_axis = ByAxis("Pareto-optimal or not")
    return Plot("pareto", "Energy against speed", " ".join(sentences), plot, by_axis=by_axis)


def _markers(
    points: Sequence[PointResult],
    chosen: Sequence[int],
    texts: tuple[Sequence[str], Sequence[str]],
    axes: tuple[Range, Range],
    kind: tuple[str, str],
    best: bool,
) -> object:
    method, boundary = kind
    labels, mark_texts = texts
    name = f"{'Pareto-optimal' if best else 'other points'}, {method}{f' ({boundary})' if boundary else ''}"
    speeds, costs = ([points[index].metrics[metric] for index in chosen] for metric in (SPEED, COST))
    color = "var(--accent)" if best else "var(--muted)"
    style = {"type": "data", "symmetric": False, "color": "var(--bar)", "thickness": 1, "width": 2}
    return go.Scatter(
        mode="markers+text" if best or len(points) <= MAX_LABELLED else "markers",
        meta=chosen,
        text=[neutral(mark_texts[index]) for index in chosen],
        textfont={"size": 11, "color": "var(--muted)"},
        name=neutral(name),
        x=[short(one.mean) for one in speeds],
        y=[short(one.mean) for one in costs],
        error_x={**style, **bars(speeds, axes[0].type)},
        error_y={**style, **bars(costs, axes[1].type)},
        marker={
            "size": 12 if best else 9,
            "color": color,
            "symbol": _METHOD_SYMBOLS.get(method, "circle"),
            "line": {
                "width": 2 if best or method in _METHOD_SYMBOLS else 0,
                "color": "var(--ink)" if best else color,
            },
        },
        customdata=[
            [neutral(labels[index]), shown(speed), shown(cost), method, cost.n]
            for index, speed, cost in zip(chosen, speeds, costs, strict=True)
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]} tokens/s"
        "<br>%{customdata[2]} J per output token, %{customdata[3]}<br>n = %{customdata[4]}<extra></extra>",
    )


def _frontier(points: Sequence[PointResult], optimal: Sequence[int], kind: tuple[str, str]) -> object:
    """Return the line through the optimal points, in steps, because nothing between them was measured."""
    known = sorted(
        (_mean(points[one], SPEED), _mean(points[one], COST)) for one in optimal if _kind(points[one]) == kind
    )
    return go.Scatter(
        mode="lines",
        x=[short(speed) for speed, _ in known],
        y=[short(cost) for _, cost in known],
        line={"shape": "vh", "color": "var(--accent)", "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )


def _kind(point: PointResult) -> tuple[str, str]:
    """Return method and boundary of a point's energy: energies of one kind are comparable."""
    cost = point.summary_of(COST)
    return cost.method or "unknown", cost.boundary or ""


def _mean(point: PointResult, metric: str) -> float:
    mean = point.metrics[metric].mean
    assert mean is not None
    return mean
