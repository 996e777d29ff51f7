"""A plot, as the page's script draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go  # this room is entered only where a page is written

#: One trace, one layout, or what changes of them: plain data, as plotly's JSON has it.
Json = dict[str, Any]

#: Marks, one after the other: colours come round sooner than these do.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")


@dataclass(frozen=True)
class Select:
    """One choice that the reader has: its options, and which of them is taken at first."""

    label: str
    options: list[str]
    first: int = 0


@dataclass
class Plot:
    """A figure, and what becomes of it with each choice.

    Colours are names of the page's (``var(--accent)``), which differ by light and dark.

    Attributes:
        key: Its id on the page.
        title: Its heading.
        caption: What it shows, and how it is read: also what screen readers say of it.
        figure: ``data`` and ``layout``.
        selects: The choices, in order.
        layers: What is put over the figure, by the indices of what was chosen so far: ``1`` for the first select's
            second option, ``1/0`` with the second select's first one. ``note`` is told below.
    """

    key: str
    title: str
    caption: str
    figure: Json
    selects: list[Select] = field(default_factory=list)
    layers: dict[str, Json] = field(default_factory=dict)

    def data(self) -> Json:
        """Return what its script needs."""
        return {"figure": self.figure, "layers": self.layers}


def figure(traces: list[Any], **layout: Any) -> Json:
    """Return a figure, which plotly has checked."""
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
        **{name: _over(axis, more.get(name, {})) for name in ("xaxis", "yaxis")},
    }
    checked: Json = go.Layout(given).to_plotly_json()
    return checked


def _over(axis: Json, more: Json) -> Json:
    return {**axis, **more, "title": {**axis["title"], **more.get("title", {})}}


def short(value: float | None) -> float | None:
    """Return *value* to the digits that a plot can show."""
    return None if value is None else float(f"{value:.6g}")
