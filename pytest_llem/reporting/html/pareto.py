"""Plot energy per output token against output tokens per second, and mark the Pareto-optimal points."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from pytest_llem.reporting.html.formatting import neutral, shown
from pytest_llem.reporting.html.labels import labels_of, marks_of
from pytest_llem.reporting.html.plots import CUT, ByAxis, Plot, Range, bars, figure, range_of, short
from pytest_llem.reporting.text import counted
from pytest_llem.results.pareto import COST, SPEED, pareto_optimal
from pytest_llem.results.points import PointResult

#: Up to so many points, all have a label if it does not overlap with others; of more, the Pareto-optimal ones.
MAX_LABELLED = 40

#: Pareto-optimal points that the caption names.
MAX_NAMED = 6

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
        names = ", ".join(labels[index] for index in sorted(optimal)[:MAX_NAMED])
        more = f" and {len(optimal) - MAX_NAMED} more" if len(optimal) > MAX_NAMED else ""
        sentences.append(f"Pareto-optimal (no other point is both faster and uses less energy): {names}{more}.")
    if tied:
        what = counted(len(tied), "more point" if optimal else "point")
        sentences.append(f"{what} may be Pareto-optimal: the intervals overlap.")
    if any(points[index].metrics[metric].ci95 for index in known for metric in (SPEED, COST)):
        sentences.append("Bars are 95 % intervals of the mean.")
    if methods != ["measured"]:
        marked = ": hollow marks are not measured" if "measured" in methods else ", not measured"
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
