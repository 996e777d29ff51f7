"""Plot and tabulate what is known of each experiment: latencies, power over time, and values by cycle."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.contents import (
    LATENCY_COLUMNS,
    SHOWN_PERCENTILES,
    Contents,
    Cycle,
    Power,
    percentiles,
)
from pytest_llem.reporting.html.formatting import (
    MAIN,
    cycle_figure,
    metrics_with_values,
    neutral,
    title_of,
    unit_of,
)
from pytest_llem.reporting.html.labels import labels_of, ticks_of
from pytest_llem.reporting.html.plots import SYMBOLS, ByAxis, Json, Plot, Select, figure, short
from pytest_llem.reporting.text import counted
from pytest_llem.results.points import PointResult


def latency_plot(contents: Contents) -> Plot | None:
    """Return the plot, or None if no request has a latency."""
    columns = [name for name in LATENCY_COLUMNS if any(one.get(name) for one in contents.latencies.values())]
    if not columns:
        return None
    title, ticks = ticks_of(contents.points)
    chosen = sorted(contents.latencies)
    # Few boxes are drawn one below the other, where long names fit; many side by side.
    across = len(chosen) > 16
    marked = [index for index in chosen if not across or index % max(1, len(chosen) // 10) == 0]
    point_axis: Json = {
        "tickvals": marked,
        "ticktext": [neutral(ticks[index]) for index in marked],
        "title": {"text": neutral(title)},
    }
    if not across:
        point_axis["autorange"] = "reversed"
    layers: dict[str, Json] = {}
    for place, column in enumerate(columns):
        layers[str(place)] = _boxes(contents, column, chosen, across=across)
    latency_axis: Json = {"title": {"text": "ms"}, "rangemode": "tozero"}
    base = figure(
        [],
        height=460 if across else max(260, 110 + 44 * len(chosen)),
        showlegend=False,
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        xaxis=point_axis if across else latency_axis,
        yaxis=latency_axis if across else point_axis,
    )
    caption = (
        "Over the answered requests with a token, of all cycles of each point: the box spans the 25th to the 75th "
        "percentile, its line is the median, and the whiskers span the 5th to the 95th percentile. Requests of "
        "one batch are not independent of each other. The table below has the figures."
    )
    selects = [Select("latency", [LATENCY_COLUMNS[column] for column in columns])]
    by_axis = ByAxis("one", has_panels=False)
    return Plot("latency", "Latency distributions", caption, base, selects, layers, by_axis)


def latency_rows(contents: Contents) -> list[tuple[str, str, int, list[str]]]:
    """Return rows of latency, point, number of requests, and :data:`SHOWN_PERCENTILES` in ms."""
    rows, labels = [], labels_of(contents.points)
    for column, name in LATENCY_COLUMNS.items():
        for index, one in sorted(contents.latencies.items()):
            if values := one.get(column):
                figures = [f"{figure:.4g}" for figure in percentiles(values).values()]
                rows.append((name, labels[index], len(values), figures))
    return rows


def _boxes(contents: Contents, column: str, chosen: list[int], *, across: bool) -> Json:
    known = {index: percentiles(values) for index in chosen if (values := contents.latencies[index].get(column))}
    places, labels = list(known), labels_of(contents.points)
    ends = {name: [short(found[p]) for found in known.values()] for name, p in _BOX_PERCENTILES.items()}
    box = go.Box(
        **ends,
        meta=places,
        **{"x" if across else "y": places, "orientation": "v" if across else "h"},
        name="",
        boxpoints=False,
        width=0.5,
        marker={"color": "var(--accent)"},
        line={"width": 1.5},
        fillcolor="var(--box)",
        hoverinfo="skip",
    )
    # Plotly's boxes cannot show the point's name when hovered over: a mark at the median does.
    medians = ends["median"]
    mark = go.Scatter(
        mode="markers",
        meta=places,
        x=places if across else medians,
        y=medians if across else places,
        marker={"size": 9, "color": "var(--accent)", "symbol": "line-ns" if not across else "line-ew"},
        customdata=[
            [neutral(labels[index]), *(f"{found[p]:.4g}" for p in SHOWN_PERCENTILES)]
            for index, found in known.items()
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>"
        + "<br>".join(f"p{p}: %{{customdata[{place}]}} ms" for place, p in enumerate(SHOWN_PERCENTILES, 1))
        + "<extra></extra>",
    )
    missing = len(contents.points) - len(known)
    note = (
        f"{counted(missing, 'point')} without these {'is' if missing == 1 else 'are'} left out." if missing else ""
    )
    return {"data": [box.to_plotly_json(), mark.to_plotly_json()], "layout": {}, "note": note}


#: Percentiles of a box, by the name of plotly's argument.
_BOX_PERCENTILES = {"lowerfence": 5, "q1": 25, "median": 50, "q3": 75, "upperfence": 95}


_FULL_HEIGHT = {"yref": "paper", "y0": 0, "y1": 1}
_DASHES = ("solid", "dot", "dash", "dashdot")


def power_plot(contents: Contents) -> Plot | None:
    """Return the plot, or None if no power was sampled."""
    if not contents.power:
        return None
    chosen = sorted(contents.power)
    layers = {str(place): _point(contents.power[index]) for place, index in enumerate(chosen)}
    labels = labels_of(contents.points)
    selects = [Select("point", [labels[index] for index in chosen])]
    caption = (
        "The power sampled in each cycle of a point. The shaded span is the time that the meter covers: it "
        "begins at 0, and a dashed line shows where that of each cycle ends."
    )
    if contents.power_left_out:
        left_out = counted(contents.power_left_out, "later cycle")
        caption += f" Left out to keep the page small: the power of {left_out}."
    base = figure(
        [],
        xaxis={"title": {"text": "seconds since the window began"}},
        yaxis={"title": {"text": "power (W)"}, "rangemode": "tozero"},
    )
    return Plot("power", "Power over time", caption, base, selects, layers)


def no_power_reason(points: Sequence[PointResult]) -> str:
    """Return the text shown if no power was sampled."""
    energies = (point.summary_of("energy_j") for point in points)
    methods = {one.method for one in energies if one.mean is not None}
    method = f" Energy is {' or '.join(sorted(one for one in methods if one))}." if methods - {None} else ""
    return f"No power was sampled: power over time is available only for GPUs that NVML reads.{method}"


def _point(cycles: Sequence[Power]) -> Json:
    """Return the layer of a point: for each of its cycles, the power and the time that the meter covers."""
    several = any(len(one.samples) > 1 for one in cycles)
    traces = [
        go.Scatter(
            mode="lines",
            name=f"cycle {one.cycle}" + (f" · {neutral(device, 16)}" if several else ""),
            x=[round(at, 3) for at, _ in samples],
            y=[short(watts) for _, watts in samples],
            line={"width": 1.5, "dash": _DASHES[number % len(_DASHES)], "color": f"var(--series-{place % 8 + 1})"},
            hovertemplate="%{y} W after %{x} s",
            showlegend=True,
        ).to_plotly_json()
        for place, one in enumerate(cycles)
        for number, (device, samples) in enumerate(one.samples.items())
    ]
    longest = max(one.seconds for one in cycles)
    shapes = [_span(longest), _edge(0.0), *(_edge(end) for end in sorted({one.seconds for one in cycles}))]
    covered = ", ".join(f"cycle {one.cycle}: {one.seconds:.3g} s" for one in cycles[:10])
    reach = [samples[end][0] for one in cycles for samples in one.samples.values() for end in (0, -1)]
    margin = 0.04 * longest
    edges = [short(min(0.0, *reach) - margin), short(max(longest, *reach) + margin)]
    layout = {"shapes": shapes, "xaxis": {"range": edges}}
    return {"data": traces, "layout": layout, "note": f"Covered by the meter: {covered}."}


def _span(seconds: float) -> Json:
    """Return the shaded rectangle of the *seconds* that the meter covers."""
    fill = {"layer": "below", "fillcolor": "var(--window)", "line": {"width": 0}}
    return {"type": "rect", "x0": 0, "x1": short(seconds), **_FULL_HEIGHT, **fill}


def _edge(seconds: float) -> Json:
    """Return the dashed line at the beginning or end of the time that the meter covers."""
    line = {"width": 1, "dash": "dash", "color": "var(--muted)"}
    return {"type": "line", "x0": short(seconds), "x1": short(seconds), **_FULL_HEIGHT, "line": line}


def power_rows(contents: Contents) -> list[tuple[str, int, str, list[str]]]:
    """Return rows of point, cycle, device, and the minimum, mean and maximum of the samples in W."""
    rows, labels = [], labels_of(contents.points)
    for index in sorted(contents.power):
        for one in contents.power[index]:
            for device, samples in one.samples.items():
                watts = [watts for _, watts in samples]
                mean = sum(watts) / len(watts)
                figures = [f"{value:.4g}" for value in (min(watts), mean, max(watts))]
                rows.append((labels[index], one.cycle, device, figures))
    return rows


#: Values in this plot over all metrics, unless the first ones alone have more: more would make the page slow.
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
