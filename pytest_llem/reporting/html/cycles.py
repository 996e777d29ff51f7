"""Plot every experiment's value in run order, which shows drift as a slope and outliers as isolated marks."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.contents import Contents, Cycle
from pytest_llem.reporting.html.formatting import (
    MAIN,
    cycle_figure,
    metrics_with_values,
    neutral,
    title_of,
    unit_of,
)
from pytest_llem.reporting.html.labels import labels_of
from pytest_llem.reporting.html.plots import SYMBOLS, ByAxis, Json, Plot, Select, figure, short
from pytest_llem.reporting.text import counted

#: Values in this plot over all metrics: more would make the page slow.
MAX_VALUES = 100_000

_RELATIVE, _ABSOLUTE = "relative to the point's mean", "as measured"


def cycles_plot(contents: Contents) -> Plot | None:
    """Return the plot, or None if no experiment completed or no metric has a value."""
    groups, metrics = _by_cycle(contents), metrics_with_values(contents.points)
    plotted = metrics[: max(len(MAIN), MAX_VALUES // max(1, len(contents.cycles)))]
    if not groups or not metrics:
        return None
    labels = labels_of(contents.points)
    traces = [
        go.Scatter(
            mode="markers",
            name=f"cycle {number}",
            x=[order for order, _ in group],
            marker={"size": 8, "symbol": SYMBOLS[place % len(SYMBOLS)], "opacity": 0.9},
            meta=[one.point for _, one in group],
            customdata=[[neutral(labels[one.point])] for _, one in group],
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>cycle {number}: %{{text}}"
            "<br>position %{x}<extra></extra>",
            showlegend=len(groups) > 1,
        )
        for place, (number, group) in enumerate(groups.items())
    ]
    # A point's only cycle does not differ from the point's mean.
    repeats = any(len(point.cycles) > 1 for point in contents.points)
    values = [_RELATIVE, _ABSOLUTE] if repeats else [_ABSOLUTE]
    layers: dict[str, Json] = {}
    for index, metric in enumerate(plotted):
        layers[str(index)] = {"data": [{"text": _texts(contents, group, metric)} for group in groups.values()]}
        for place, value in enumerate(values):
            layers[f"{index}/{place}"] = _heights(contents, metric, groups, relative=value == _RELATIVE)
    drift = "Relative to the mean of its point, drift shows as a slope and an outlier as an isolated mark. "
    caption = (
        f"The value of {counted(len(contents.cycles), 'completed experiment')}, in the order in which they ran. "
        f"{drift if _RELATIVE in values else ''}The table of experiments has the main figures of each."
    )
    if len(plotted) < len(metrics):
        caption += f" Left out to keep the page small: {counted(len(metrics) - len(plotted), 'more metric')}."
    selects = [
        Select("metric", [title_of(metric) for metric in plotted]),
        Select("values", values),
    ]
    base = figure(traces, xaxis={"title": {"text": "order in which experiments ran"}, "rangemode": "tozero"})
    return Plot("cycles", "Every cycle in run order", caption, base, selects, layers, ByAxis("cycle"))


def _by_cycle(contents: Contents) -> dict[int, list[tuple[int, Cycle]]]:
    """Return the experiments by cycle, each with its position in run order, counted from 1."""
    groups: dict[int, list[tuple[int, Cycle]]] = {}
    for order, one in enumerate(contents.cycles, 1):
        groups.setdefault(one.entry.cycle, []).append((order, one))
    return dict(sorted(groups.items()))


def value_of(contents: Contents, cycle: Cycle, metric: str) -> float | None:
    """Return one experiment's value of *metric*, or None if it has none or the result does not contain it."""
    values = contents.points[cycle.point].summary_of(metric).values
    return values[cycle.place] if cycle.place < len(values) else None


def _heights(
    contents: Contents, metric: str, groups: dict[int, list[tuple[int, Cycle]]], *, relative: bool
) -> Json:
    """Return the layer of a metric: the heights of its marks, the axis, and a note."""
    traces, values = [], []
    for group in groups.values():
        found = [value_of(contents, one, metric) for _, one in group]
        heights = [_deviation(contents, metric, one, value) for (_, one), value in zip(group, found, strict=True)]
        traces.append({"y": heights if relative else [short(one) for one in found]})
        values += [one for one in found if one is not None]
    note = "" if values else "This result does not contain the value of each cycle."
    title = "% off the mean of its point" if relative else title_of(metric)
    is_log = not relative and values and min(values) > 0 and max(values) > 20 * min(values)
    axis: Json = {
        "title": {"text": title},
        "type": "log" if is_log else "linear",
        "ticksuffix": " %" if relative else "",
    }
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0}
    shapes = [{**zero, "line": {"color": "var(--muted)", "width": 1, "dash": "dot"}}] if relative else []
    return {"data": traces, "layout": {"yaxis": axis, "shapes": shapes}, "note": note}


def _deviation(contents: Contents, metric: str, cycle: Cycle, value: float | None) -> float | None:
    mean = contents.points[cycle.point].summary_of(metric).mean
    return None if value is None or not mean else float(f"{100 * (value - mean) / abs(mean):.4g}")


def _texts(contents: Contents, group: Sequence[tuple[int, Cycle]], metric: str) -> list[str]:
    return [f"{cycle_figure(value_of(contents, one, metric))} {unit_of(metric)}".strip() for _, one in group]
