"""Write the history of studies as a self-contained HTML page that loads nothing over the network.

Jinja and plotly are imported only when a page is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go

from pytest_llem.gates.history import History, MetricChange, MetricHistory, Value
from pytest_llem.reporting.html.formatting import clipped, details, name_of, neutral, shown, title_of, unit_of
from pytest_llem.reporting.html.plots import Json, Plot, Select, bars, figure, short
from pytest_llem.reporting.html.template import render_template
from pytest_llem.reporting.terminal.history import (
    by_commit,
    extent_of,
    place_of,
    rule,
    size_of,
    span,
    verdict_of,
)
from pytest_llem.results.manifest import write_atomically

#: Leaves space for the sizes of changes above the plot, and the legend above them.
_MARGIN = {"l": 56, "r": 12, "t": 64, "b": 48}
_LEGEND = {"orientation": "h", "x": 0, "y": 1.08, "xanchor": "left", "yanchor": "bottom"}

#: Labels on the axis of runs.
_TICKS = 8


def write_history(history: History, file: Path) -> None:
    """Write the page of a history to *file*, and create the parent folder if needed.

    Raises:
        OSError: *file* cannot be written.
    """
    groups = [
        (study, testbed, series, _plot(f"history-{number}", series))
        for number, ((study, testbed), series) in enumerate(history.groups().items())
    ]
    title = ", ".join(dict.fromkeys(one.study for one in history.series))
    content = {
        "title": title,
        "version": version("pytest-llem"),
        "span": span(history.runs),
        "rule": rule(history),
        "history": history,
        "groups": groups,
        "changed": sum(bool(one.changes) for one in history.series),
        "by_commit": by_commit(history.series),
        "extent_of": extent_of,
        "size_of": size_of,
        "verdict_of": verdict_of,
        "name_of": name_of,
        "shown": shown,
        "details": details,
        "unit_of": unit_of,
        "clipped": clipped,
    }
    page = render_template("history.html.j2", title, (plot for *_, plot in groups), content)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, page)


def _plot(key: str, series: Sequence[MetricHistory]) -> Plot:
    traces = [
        go.Scatter(
            mode="markers",
            name="run",
            hovertemplate="%{text}<extra></extra>",
            marker={"size": 6, "color": "var(--accent)"},
            error_y={"type": "data", "symmetric": False, "color": "var(--bar)", "thickness": 1, "width": 0},
        ),
        go.Scatter(
            mode="markers",
            name="not judged",
            hovertemplate="%{text}<extra></extra>",
            marker={"size": 7, "symbol": "circle-open", "color": "var(--muted)"},
        ),
        go.Scatter(
            mode="lines",
            name="mean between changes",
            hoverinfo="skip",
            line={"color": "var(--series-2)", "width": 2},
        ),
    ]
    return Plot(
        key,
        "Over commits",
        "Mean of each run with its 95 % interval, in the order of commits or, if one is not known, of time; "
        "vertical lines are lasting changes.",
        figure(traces, showlegend=True, legend=_LEGEND, margin=_MARGIN),
        [Select("series", [_title(one) for one in series])],
        {str(number): _layer(one) for number, one in enumerate(series)},
    )


def _title(one: MetricHistory) -> str:
    marks = f" – {len(one.changes)} change{'s' * (len(one.changes) > 1)}" if one.changes else ""
    return f"{name_of(one.metric)}, {one.point}{f' ({one.differs})' if one.differs else ''}{marks}"


def _layer(one: MetricHistory) -> Json:
    place = {id(value): at for at, value in enumerate(one.values)}
    judged, others = one.judged, [value for value in one.values if value.not_judged is not None]
    step = max(1, math.ceil(len(one.values) / _TICKS))
    ticks = range(0, len(one.values), step)
    level_x, level_y = _levels(one, [place[id(value)] for value in judged])
    lines = [(place[id(change.first)] - 0.5, change) for change in one.changes]
    return {
        "data": [
            {**_marks(judged, place), "error_y": bars([value.summary for value in judged])},
            _marks(others, place),
            {"x": level_x, "y": level_y},
        ],
        "layout": {
            "yaxis": {"title": {"text": title_of(one.metric)}},
            "xaxis": {
                "tickvals": list(ticks),
                "ticktext": [neutral(place_of(one.values[at].run)).replace(" ", "<br>") for at in ticks],
            },
            "shapes": [_line(at, change) for at, change in lines],
            "annotations": [_note(at, change) for at, change in lines],
        },
        "note": one.not_judged_reason or "",
    }


def _line(at: float, change: MetricChange) -> Json:
    return {
        "type": "line",
        "yref": "paper",
        "x0": at,
        "x1": at,
        "y0": 0,
        "y1": 1,
        "line": {"color": _color(change)},
    }


def _note(at: float, change: MetricChange) -> Json:
    text = f"{size_of(change)[0]}{' (drift)' if change.change.is_drift else ''}"
    where = {"x": at, "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    return {**where, "text": text, "font": {"color": _color(change)}}


def _color(change: MetricChange) -> str:
    return "var(--bad)" if change.verdict == "REGRESSION" else "var(--good)"


def _marks(values: Sequence[Value], place: dict[int, int]) -> Json:
    return {
        "x": [place[id(value)] for value in values],
        "y": [short(value.summary.mean) for value in values],
        "text": ["<br>".join(map(neutral, _hover(value))) for value in values],
    }


def _hover(value: Value) -> Iterator[str]:
    yield place_of(value.run)
    if value.run.subject:
        yield value.run.subject
    yield details(value.summary, value.summary.unit)
    if value.not_judged:
        yield f"not judged: {value.not_judged}"


def _levels(one: MetricHistory, places: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """Return a line through the geometric means between changes, with a gap at each; a slope for a drift."""
    logs = [math.log(value.summary.mean or math.nan) for value in one.judged]
    bounds = [0]
    for change in one.changes:
        bounds += [change.change.first, change.change.last] if change.change.is_drift else [change.change.first]
    xs: list[float | None] = []
    ys: list[float | None] = []
    drifts = {change.change.first for change in one.changes if change.change.is_drift}
    for begin, end in pairwise([*bounds, len(logs)]):
        if end <= begin:
            continue
        mean = math.fsum(logs[begin:end]) / (end - begin)
        if begin in drifts:
            change = next(each for each in one.changes if each.change.first == begin)
            half = math.log(change.change.ratio) / 2
            ends = mean - half, mean + half
        else:
            ends = mean, mean
        xs += [places[begin] - 0.4, places[end - 1] + 0.4, None]
        ys += [short(math.exp(ends[0])), short(math.exp(ends[1])), None]
    return xs, ys
