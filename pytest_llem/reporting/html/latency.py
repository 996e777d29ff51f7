"""Plot and tabulate the latencies of each point over the answered requests of all its cycles."""

from __future__ import annotations

import plotly.graph_objects as go

from pytest_llem.reporting.html.contents import LATENCY_COLUMNS, SHOWN_PERCENTILES, Contents, percentiles
from pytest_llem.reporting.html.formatting import neutral
from pytest_llem.reporting.html.labels import labels_of, ticks_of
from pytest_llem.reporting.html.plots import ByAxis, Json, Plot, Select, figure, short
from pytest_llem.reporting.text import counted


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
        "Over all answered requests of all cycles of each point: the box spans the 25th to the 75th percentile, "
        "its line is the median, and the whiskers span the 5th to the 95th percentile. Requests of one batch are "
        "not independent of each other. The table below has the figures."
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
