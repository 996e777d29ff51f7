"""Plot and tabulate the power sampled in each cycle of a point, with the measured window."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.contents import Contents, Power
from pytest_llem.reporting.html.formatting import neutral
from pytest_llem.reporting.html.labels import labels_of
from pytest_llem.reporting.html.plots import Json, Plot, Select, figure, short
from pytest_llem.reporting.text import counted
from pytest_llem.results.points import PointResult

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
        "The power sampled in each cycle of a point. The shaded span is the measured window: it begins at 0, and "
        "a dashed line shows where the window of each cycle ends."
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


def why_no_power(points: Sequence[PointResult]) -> str:
    """Return the text shown if no power was sampled."""
    energies = (point.summary_of("energy_j") for point in points)
    methods = {one.method for one in energies if one.mean is not None}
    method = f" Energy is {' or '.join(sorted(one for one in methods if one))}." if methods - {None} else ""
    return f"No power was sampled: power over time is available only for GPUs that NVML reads.{method}"


def _point(cycles: Sequence[Power]) -> Json:
    """Return the layer of a point: the power and the window of each of its cycles."""
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
    longest = max(one.window_seconds for one in cycles)
    shapes = [_span(longest), _edge(0.0), *(_edge(end) for end in sorted({one.window_seconds for one in cycles}))]
    windows = ", ".join(f"cycle {one.cycle}: {one.window_seconds:.3g} s" for one in cycles[:10])
    reach = [samples[end][0] for one in cycles for samples in one.samples.values() for end in (0, -1)]
    margin = 0.04 * longest
    edges = [short(min(0.0, *reach) - margin), short(max(longest, *reach) + margin)]
    layout = {"shapes": shapes, "xaxis": {"range": edges}}
    return {"data": traces, "layout": layout, "note": f"Windows: {windows}."}


def _span(seconds: float) -> Json:
    """Return the shaded rectangle of a window of *seconds*."""
    fill = {"layer": "below", "fillcolor": "var(--window)", "line": {"width": 0}}
    return {"type": "rect", "x0": 0, "x1": short(seconds), **_FULL_HEIGHT, **fill}


def _edge(seconds: float) -> Json:
    """Return the dashed line at the beginning or end of a window."""
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
