"""Plot what a server costs and how fast it answers against its load, and what searches have tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from pytest_llem.reporting.html.formatting import axis_title, name_of, neutral, shown, title_of
from pytest_llem.reporting.html.labels import labels_of
from pytest_llem.reporting.html.plots import SYMBOLS, ByAxis, Json, Plot, Select, bars, figure, range_of, short
from pytest_llem.results.loads import (
    GOODPUT,
    KINDS,
    LoadSeries,
    has_loads,
    is_within_slo,
    load_cost,
    load_kind,
    load_of,
    load_series,
    slo_of,
)
from pytest_llem.results.pareto import COST
from pytest_llem.results.points import PointResult
from pytest_llem.results.serving import ProbeRecord
from pytest_llem.results.statistics import Summary

_AXIS_TITLES = {"concurrency": "concurrency (requests in flight)", "rate": "rate (requests/s)"}

#: Latencies that a select box offers, with their names, and the percentiles of each.
_LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency",
    "e2e": "End-to-end latency",
}
_PERCENTILES = {50: "solid", 90: "dash", 99: "dot"}

_BY_AXIS = ByAxis("server")

_HOLLOW = "Hollow marks are not within the SLO."


def load_plots(points: Sequence[PointResult]) -> list[Plot]:
    """Return the plots of a study of servers under load; none for another study."""
    if not has_loads(points):
        return []
    plots = []
    for kind in KINDS:
        series = [one for one in load_series(points) if one.kind == kind]
        lines = [one for one in series if load_of(points[one.places[0]]) is not None]
        if len({load_of(points[index]) for line in lines for index in line.places}) > 1:
            plots += _LoadPlots(points, kind, lines).plots()
    searches = [(point, cycle) for point in points for cycle, load in enumerate(point.loads) if load.probes]
    return [*plots, *([_probes(searches)] if searches else [])]


@dataclass(frozen=True)
class _LoadPlots:
    """The plots against loads of one kind.

    Attributes:
        points: All points of the page.
        kind: The kind of load.
        lines: The points with such a load, as lines of points that differ only in their load.
    """

    points: Sequence[PointResult]
    kind: str
    lines: Sequence[LoadSeries]

    def plots(self) -> list[Plot]:
        """Return the plots that have values."""
        return [plot for plot in (self._energy(), self._latency(), self._goodput()) if plot is not None]

    def _energy(self) -> Plot | None:
        metrics = [one for one in dict.fromkeys((load_cost(self.points), COST)) if self._known(one)]
        if not metrics:
            return None
        layers = {}
        for place, metric in enumerate(metrics):
            known = self._known(metric)
            yaxis = range_of(known).axis(axis_title(metric, known))
            traces = [self._line(number, metric) for number in range(len(self.lines))]
            layers[str(place)] = {"data": traces, "layout": {"yaxis": yaxis}, "note": ""}
        return Plot(
            f"energy-{self.kind}",
            f"Energy per token against {self.kind}",
            self._caption("Energy per token of each load, with its 95 % interval if there are several cycles."),
            self._figure(),
            [Select("metric", [title_of(metric) for metric in metrics])],
            layers,
            _BY_AXIS,
        )

    def _latency(self) -> Plot | None:
        latencies = {key: name for key, name in _LATENCIES.items() if self._known(f"{key}_p50_ms")}
        if not latencies:
            return None
        slos = [slo_of(self.points[index]) or {} for line in self.lines for index in line.places]
        layers = {}
        for place, (key, name) in enumerate(latencies.items()):
            traces = [
                self._line(number, f"{key}_p{p}_ms", dash=dash, what=f"p{p}", with_bars=False)
                for number in range(len(self.lines))
                for p, dash in _PERCENTILES.items()
            ]
            limits = {float(slo[f"{key}_ms"]) for slo in slos if slo.get(f"{key}_ms")}
            shapes = [shape for limit in sorted(limits) for shape in _slo_region(limit)]
            top = max([*limits, *(one.mean or 0.0 for p in _PERCENTILES for one in self._known(f"{key}_p{p}_ms"))])
            axis = {"title": {"text": f"{name} (ms)"}, "range": [0, 1.08 * top]}
            layers[str(place)] = {"data": traces, "layout": {"yaxis": axis, "shapes": shapes}, "note": ""}
        caption = "Percentiles over the requests of each load: solid 50, dashed 90, dotted 99."
        if any(slo_of(point) for point in self.points):
            caption += " The SLO's region is shaded, where it limits this latency."
        return Plot(
            f"latency-{self.kind}",
            f"Latency against {self.kind}",
            self._caption(caption),
            self._figure(),
            [Select("latency", list(latencies.values()))],
            layers,
            _BY_AXIS,
        )

    def _goodput(self) -> Plot | None:
        if not self._known(GOODPUT):
            return None
        traces = [
            self._line(number, metric, dash=dash, what=what)
            for number in range(len(self.lines))
            for metric, dash, what in ((GOODPUT, "solid", "within the SLO"), ("requests_per_second", "dot", "all"))
        ]
        caption = (
            "Requests per second that were answered within the SLO (solid), and all that were answered (dotted)."
        )
        yaxis = {"title": {"text": "requests/s"}, "range": [0, None]}  # an interval may extend below 0
        return Plot(
            f"goodput-{self.kind}",
            f"Goodput against {self.kind}",
            self._caption(caption),
            {**self._figure(yaxis=yaxis), "data": traces},
            by_axis=_BY_AXIS,
        )

    def _known(self, metric: str) -> list[Summary]:
        """Return the statistics of a metric at the points that have a value of it."""
        found = [self.points[index].summary_of(metric) for line in self.lines for index in line.places]
        return [one for one in found if one.mean is not None]

    def _caption(self, text: str) -> str:
        return f"{text} {_HOLLOW}" if any(is_within_slo(point) is False for point in self.points) else text

    def _figure(self, **layout: Json) -> Json:
        """Return a figure whose ticks are the loads; its axis is logarithmic if they differ by a factor of 8."""
        known = {load_of(self.points[index]) for line in self.lines for index in line.places}
        loads = sorted(load for load in known if load)
        axis: Json = {"title": {"text": _AXIS_TITLES[self.kind]}}
        if len(loads) <= 12:
            axis |= {"tickvals": loads, "ticktext": [f"{load:g}" for load in loads]}
        axis |= {"type": "log"} if loads[-1] >= 8 * loads[0] else {"rangemode": "tozero"}
        return figure([], height=400, xaxis=axis, **layout)

    def _line(
        self, number: int, metric: str, *, dash: str = "solid", what: str = "", with_bars: bool = True
    ) -> Json:
        """Return a trace of *metric* along a line, which *what* distinguishes from other traces of the line."""
        line, color = self.lines[number], f"var(--series-{number % 8 + 1})"
        summaries = [self.points[index].summary_of(metric) for index in line.places]
        name = ", ".join(filter(None, (line.name if len(self.lines) > 1 else "", what)))
        labels = labels_of(self.points)
        within_slo = [is_within_slo(self.points[index]) is not False for index in line.places]
        trace: Json = go.Scatter(
            mode="lines+markers",
            name=neutral(name or name_of(metric)),
            meta=line.places,
            x=[load_of(self.points[index]) for index in line.places],
            y=[short(one.mean) for one in summaries],
            line={"width": 1.8, "dash": dash, "color": color},
            marker={"size": 9, "color": color, "symbol": _symbols(number, within_slo)},
            customdata=[
                [neutral(labels[index]), title_of(metric), shown(one)]
                for index, one in zip(line.places, summaries, strict=True)
            ],
            hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}: %{customdata[2]}<extra></extra>",
            showlegend=bool(name),
        ).to_plotly_json()
        if with_bars and (known := [one for one in summaries if one.mean is not None]):
            trace["error_y"] = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4}
            trace["error_y"] |= bars(summaries, range_of(known).type)
        return trace


def _probes(searches: Sequence[tuple[PointResult, int]]) -> Plot:
    """Return the plot of the loads that searches have tried, numbered in their order."""
    values: dict[str, Callable[[ProbeRecord], float | None]] = {
        "Requests within the SLO (%)": lambda one: None if one.attainment is None else 100 * one.attainment,
        "Energy per output token (J)": lambda one: one.energy_per_output_token_j,
        "Output tokens per second": lambda one: one.output_tokens_per_second,
    }
    traces: list[object] = []
    heights: dict[str, list[Json]] = {title: [] for title in values}
    for number, (point, cycle) in enumerate(searches):
        probes = list(enumerate(point.loads[cycle].probes, start=1))
        probes.sort(key=lambda probe: probe[1].load)
        name = f"{point.id}, cycle {point.cycles[cycle]}"
        traces.append(
            go.Scatter(
                mode="lines+markers+text",
                name=neutral(name),
                x=[probe.load for _, probe in probes],
                text=[str(order) for order, _ in probes],
                textposition="top center",
                textfont={"size": 11, "color": "var(--muted)"},
                line={"width": 1, "dash": "dot"},
                marker={"size": 9, "symbol": _symbols(number, [probe.within_slo for _, probe in probes])},
                customdata=[[neutral(name), order, neutral(probe.outcome)] for order, probe in probes],
                hovertemplate="<b>%{customdata[0]}</b><br>probe %{customdata[1]}, load %{x}: %{y:.4~g}"
                "<br>%{customdata[2]}<extra></extra>",
                showlegend=len(searches) > 1,
            )
        )
        for title, value_of in values.items():
            heights[title].append({"y": [short(value_of(probe)) for _, probe in probes]})
    kinds = {load_kind(point) for point, _ in searches}
    axis = {"title": {"text": _AXIS_TITLES[kinds.pop()] if len(kinds) == 1 else "load"}, "rangemode": "tozero"}
    layers = {
        str(place): {
            "data": heights[title],
            "layout": {"yaxis": {"title": {"text": title}, "rangemode": "tozero"}},
            "note": "",
        }
        for place, title in enumerate(values)
    }
    caption = (
        "Each load that a search for the largest load within the SLO has tried, numbered in order. Hollow marks "
        "are not within the SLO; one at which the server was not steady has no value."
    )
    select = Select("value", list(values))
    return Plot(
        "probes", "Loads that the search tried", caption, figure(traces, height=400, xaxis=axis), [select], layers
    )


def _symbols(number: int, filled: Iterable[bool]) -> list[str]:
    symbol = SYMBOLS[number % len(SYMBOLS)]
    return [symbol if one else f"{symbol}-open" for one in filled]


def _slo_region(limit: float) -> list[Json]:
    """Return the shapes that mark the latencies up to *limit* in ms."""
    across = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    region = {"type": "rect", **across, "y0": 0, "y1": limit, "fillcolor": "var(--window)", "line": {"width": 0}}
    edge = {"type": "line", **across, "y0": limit, "y1": limit, "line": {"color": "var(--good)", "width": 1.5}}
    label = {"text": f"SLO: {limit:g} ms", "textposition": "start", "font": {"color": "var(--good)", "size": 12}}
    return [region, {**edge, "label": label}]
