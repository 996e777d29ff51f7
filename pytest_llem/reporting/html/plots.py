"""Define the plots that the page's script draws, their common layout, and the ranges of their axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go  # optional: this module is imported only if a report is written

from pytest_llem.results.statistics import Summary

#: A trace, a layout, or changes to them, as plain data of plotly's JSON format.
Json = dict[str, Any]

#: Shown if the range of an axis does not have all intervals.
CUT = "Intervals that extend beyond the plot are cut off; double-click to show them whole."

#: Marks that distinguish traces after the colours repeat.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")

#: An axis is logarithmic if its values differ by more than this factor.
FAR_APART = 20

#: Up to so many decades, labels between the powers of ten fit.
_MAX_LABELLED_DECADES = 3.5

#: How far beyond the means the axis extends for intervals at most, as a share of the means' span.
_MAX_EXTENSION = 0.35


@dataclass(frozen=True)
class Select:
    """A select box: its options, and the index of the one selected at first."""

    label: str
    options: list[str]
    first: int = 0


@dataclass(frozen=True)
class ByAxis:
    """How the marks of a plot may be coloured by an axis, and split into panels, one for each value of another.

    Every trace whose marks stand for points has their indices as ``meta``.

    Attributes:
        default: What the colours distinguish without an axis, such as ``cycle``.
        color: Key of the axis of the colours at first; None for the default.
        panel: Key of the axis of the panels at first; None for one panel.
        has_panels: Whether there can be panels.
    """

    default: str
    color: str | None = None
    panel: str | None = None
    has_panels: bool = True


@dataclass
class Plot:
    """A figure, and how it changes with each select box.

    Colours are CSS variables of the page (``var(--accent)``), so that they follow light and dark mode.

    Attributes:
        key: Its id on the page.
        title: Its heading.
        caption: What it shows and how to read it; also its label for screen readers.
        figure: Plotly's ``data`` and ``layout``.
        selects: The select boxes, in order.
        layers: Changes that are merged over the figure, by the indices of the selected options: ``1`` for the
            second option of the first box, ``1/0`` for that and the first option of the second box. The key
            ``note`` is a text shown below the plot.
        by_axis: Colours and panels by axis; None if its marks do not stand for points.
    """

    key: str
    title: str
    caption: str
    figure: Json
    selects: list[Select] = field(default_factory=list)
    layers: dict[str, Json] = field(default_factory=dict)
    by_axis: ByAxis | None = None

    def data(self) -> Json:
        """Return the data that the page's script needs to draw the plot."""
        return {"figure": self.figure, "layers": self.layers}


def figure(traces: list[Any], **layout: Any) -> Json:
    """Return a figure that plotly has validated."""
    return {"data": [trace.to_plotly_json() for trace in traces], "layout": _layout(**layout)}


def _layout(*, height: int = 440, **more: Any) -> Json:
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "separatethousands": True,
        "ticks": "outside",
        "tickcolor": "var(--line)",
        "title": {"font": {"size": 13, "color": "var(--muted)"}, "standoff": 12},
    }
    given = {
        "height": height,
        "autosize": True,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--ink)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)", "family": "system-ui, sans-serif"},
            "align": "left",
            "namelength": -1,
        },
        "margin": {"l": 56, "r": 12, "t": 36, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--accent)"},
        "colorway": [f"var(--series-{n})" for n in range(1, 9)],
        **more,
        **{name: _with_changes(axis, more.get(name, {})) for name in ("xaxis", "yaxis")},
    }
    checked: Json = go.Layout(given).to_plotly_json()
    return checked


def _with_changes(axis: Json, more: Json) -> Json:
    return {**axis, **more, "title": {**axis["title"], **more.get("title", {})}}


def short(value: float | None) -> float | None:
    """Return *value* rounded to six digits, which is enough for a plot."""
    return None if value is None else float(f"{value:.6g}")


@dataclass(frozen=True)
class Range:
    """The range of an axis.

    Attributes:
        type: ``linear`` or ``log``.
        edges: Both ends, in plotly's form: logarithms to base 10 if the type is ``log``.
        cut: Whether any interval extends beyond the edges.
    """

    type: str
    edges: list[float]
    cut: bool

    def axis(self, title: str) -> dict[str, object]:
        """Return plotly's layout of the axis."""
        found: dict[str, object] = {"type": self.type, "range": self.edges, "title": {"text": title}}
        if self.type == "log":
            # D2 labels 1, 2 and 5 in each decade; 1 labels powers of ten only.
            found["dtick"] = "D2" if self.edges[1] - self.edges[0] < _MAX_LABELLED_DECADES else 1
            found["tickformat"] = ",.6~g"  # without a format, plotly labels 20 as 2
        return found


def range_of(summaries: Sequence[Summary]) -> Range:
    """Return the axis range for the means, of which there must be at least one, and their intervals."""
    means = [summary.mean for summary in summaries if summary.mean is not None]
    ends = [end for summary in summaries if summary.ci95 for end in summary.ci95]
    log = min(means) > 0 and max(means) > FAR_APART * min(means)
    if log:
        means = [math.log10(mean) for mean in means]
        ends = [math.log10(end) if end > 0 else -math.inf for end in ends]
    low, high = min(means), max(means)
    extension = _MAX_EXTENSION * ((high - low) or abs(high) or 1)
    bottom, top = max(low - extension, min([low, *ends])), min(high + extension, max([high, *ends]))
    margin = 0.06 * ((top - bottom) or abs(high) or 1)
    bottom = bottom - margin if log or low < 0 else max(0.0, bottom - margin)
    edges = [float(f"{bottom:.5g}"), float(f"{top + margin:.5g}")]
    cut = any(end < edges[0] or end > edges[1] for end in ends)
    return Range("log" if log else "linear", edges, cut)


def bars(summaries: Sequence[Summary], axis_type: str = "linear") -> dict[str, list[float | None]]:
    """Return plotly's error bars: how far each mean's interval extends above and below it, None if unknown.

    Args:
        summaries: The statistics.
        axis_type: ``linear`` or ``log``.
    """
    halves = [_halves(summary, axis_type) for summary in summaries]
    return {"array": [above for above, _ in halves], "arrayminus": [below for _, below in halves]}


def _halves(summary: Summary, axis_type: str) -> tuple[float | None, float | None]:
    if summary.mean is None or summary.ci95 is None:
        return None, None
    low, high = summary.ci95
    if axis_type == "log" and low <= 0:  # a log axis has no such value: end the bar far below the plot
        low = summary.mean * 1e-9
    return float(f"{high - summary.mean:.6g}"), float(f"{summary.mean - low:.9g}")
