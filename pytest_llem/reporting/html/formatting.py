"""Name and format metrics, points and figures for the report; short labels of points from the axes that vary."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.text import mean_text, number, short_texts
from pytest_llem.results.loads import ATTAINMENT, GOOD_COST, GOODPUT, has_loads, load_of, varying_axes
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.identity import value_text

#: Shown in place of a missing value.
NOTHING = "–"

#: The main metrics, which come first.
MAIN = (
    "output_tokens_per_second",
    "energy_per_output_token_j",
    "ttft_p50_ms",
    "itl_p50_ms",
    "e2e_p50_ms",
    "seconds",
    "mean_power_w",
    "energy_j",
    "active_energy_j",
    "peak_memory_mb",
    "roofline_slowdown",
)

#: The main metrics of servers under load.
_LOAD_MAIN = (
    "output_tokens_per_second",
    GOOD_COST,
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p99_ms",
    ATTAINMENT,
    GOODPUT,
    "itl_p99_ms",
    "e2e_p99_ms",
    "energy_per_output_token_j",
    "requests_per_second",
    "concurrency_mean",
    "mean_power_w",
)

#: Names of metrics that are not the words of their keys.
_NAMES = {
    "active_energy_j": "Active energy",
    "edp_js": "Energy-delay product",
    "energy_j": "Energy of a pass",
    "energy_per_good_token_j": "Energy per token within the SLO",
    "flops": "FLOPs",
    "gco2e_g": "CO₂e",
    "goodput_rps": "Goodput: requests within the SLO",
    "idle_power_w": "Idle power, model loaded",
    "itl": "Inter-token latency",
    "mbu": "MBU",
    "mfu": "MFU",
    "seconds": "Time of a pass",
    "slo_attainment": "Share of requests within the SLO",
    "roofline_slowdown": "Roofline slowdown",
    "wh_per_1000_requests": "Energy per 1,000 requests",
}
_UNITS = {"j", "w", "ms", "mb", "c", "g"}
_CAPITALS = {
    "ttft": "TTFT",
    "itl": "ITL",
    "tpot": "TPOT",
    "e2e": "E2E",
    "cpu": "CPU",
    "gpu": "GPU",
    "dram": "DRAM",
}


def name_of(metric: str) -> str:
    """Return a metric's display name, without its unit."""
    if metric in _NAMES:
        return _NAMES[metric]
    words = metric.split("_")
    if words[-1] in _UNITS:
        words.pop()
    text = " ".join(_CAPITALS.get(word, word) for word in words)
    return text[0].upper() + text[1:]


def unit_of(metric: str) -> str:
    """Return the unit to show with a metric's figures; empty for a ratio."""
    unit = CATALOGUE[metric].unit
    return {"ratio": "", "1/s": "1/s", "tokens": "tokens"}.get(unit, unit)


def title_of(metric: str) -> str:
    """Return a metric's display name and unit."""
    unit = unit_of(metric)
    return f"{name_of(metric)} ({unit})" if unit else name_of(metric)


def axis_title(metric: str, summaries: Iterable[Summary]) -> str:
    """Return a metric's display name and unit, and how its energies were obtained."""
    methods = sorted({one.method for one in summaries if one.method})
    return ", ".join(filter(None, (title_of(metric), " and ".join(methods))))


def main_metrics(points: Sequence[PointResult]) -> tuple[str, ...]:
    """Return the main metrics of the points on a page, which come first."""
    return _LOAD_MAIN if has_loads(points) else MAIN


def metrics_with_values(points: Sequence[PointResult]) -> list[str]:
    """Return the metrics with a value at any point, main metrics first."""
    known = {name for point in points for name, summary in point.metrics.items() if summary.mean is not None}
    return [name for name in dict.fromkeys([*main_metrics(points), *CATALOGUE]) if name in known]


def shown(summary: Summary) -> str:
    """Return a mean and its interval as the terminal shows them; a dash if there is no value."""
    return NOTHING if summary.mean is None else mean_text(summary)


def details(summary: Summary, unit: str) -> str:
    """Return the details of a figure: value, interval, method and warnings, or why there is no value."""
    if summary.mean is None:
        return f"no value: {summary.reason or 'no reason was given'}"
    parts = [f"{summary.mean:.6g} {unit}".strip()]
    if summary.ci95 is not None:
        low, high = summary.ci95
        parts.append(f"95 % interval {low:.4g} to {high:.4g}")
    if summary.sd is not None:
        parts.append(f"sd {summary.sd:.3g}")
    parts.append(f"n = {summary.n}")
    parts += [part for part in (summary.method, summary.boundary) if part]
    parts += ["boundary differs between cycles"] if summary.is_mixed else []
    parts += [f"not judged: {summary.not_judged}"] if summary.not_judged else []
    if summary.invalid is not None:
        parts.append(f"invalid: {summary.invalid}")
    if summary.covers_engine is False:
        parts.append("does not cover the engine's devices")
    return ", ".join(parts)


def cycle_figure(given: float | None) -> str:
    """Return one cycle's value as text; a dash if there is none."""
    return NOTHING if given is None else number(given)


def clipped(text: str, max_characters: int = 80) -> str:
    """Return *text* on one line, cut to *max_characters*."""
    line = " ".join(text.split())
    return line if len(line) <= max_characters else f"{line[: max_characters - 1]}…"


def neutral(text: Any, max_characters: int = 120) -> str:
    """Return *text* escaped and cut for plotly, which interprets some HTML in every text."""
    return html.escape(clipped(str(text), max_characters), quote=False)


#: How many values of an axis can have a colour each (numbers, along a scale; other values), or a panel each.
MAX_NUMBERS, MAX_COLORS, MAX_PANELS = 24, 8, 12

#: Characters of a mark's label in a plot.
_MAX_MARK = 24


@dataclass(frozen=True)
class Axis:
    """An axis that varies between points.

    Attributes:
        key: Its dotted key.
        name: Its short name.
        texts: Short texts of its values, which differ from each other, by the whole texts. Numbers are sorted,
            others in the study's order.
        is_number: Whether all its values are numbers.
    """

    key: str
    name: str
    texts: dict[str, str]
    is_number: bool

    @property
    def has_colors(self) -> bool:
        """Whether each value can have a colour."""
        return 1 < len(self.texts) <= (MAX_NUMBERS if self.is_number else MAX_COLORS)

    def text(self, point: PointResult) -> str | None:
        """Return the short text of a point's value; None if the point does not have the axis."""
        return self.texts[axis_text(point.axes[self.key])] if self.key in point.axes else None


def axes_of(points: Sequence[PointResult]) -> list[Axis]:
    """Return the axes that vary between *points*."""
    found = []
    for key, name in varying_axes(points).items():
        values = {axis_text(point.axes[key]): point.axes[key] for point in points if key in point.axes}
        is_number = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values.values())
        texts = sorted(values, key=lambda text: values[text]) if is_number else list(values)
        found.append(Axis(key, name, short_texts(texts), is_number))
    return found


def axis_text(value: Any) -> str:
    """Return an axis value as the study has it. (Point ids escape unsafe characters instead.)"""
    return value if isinstance(value, str) else value_text(value)


def labels_of(points: Sequence[PointResult]) -> list[str]:
    """Return the labels of *points*: their numbers, and the values of the axes that vary."""
    axes = axes_of(points)
    return [
        f"#{number} "
        + (", ".join(f"{axis.name}={text}" for axis in axes if (text := axis.text(point)) is not None) or point.id)
        for number, point in enumerate(points, start=1)
    ]


def marks_of(points: Sequence[PointResult]) -> list[str]:
    """Return a short text beside each point's mark in a plot: its load on a server, its values, or its number."""
    title, ticks = ticks_of(points)
    loads = [load_of(point) for point in points] if has_loads(points) else []
    if loads and len({*loads}) == len(loads):
        return [f"#{n}" if load is None else f"{load:g}" for n, load in enumerate(loads, start=1)]
    is_short = title != "point" and max(map(len, ticks)) <= _MAX_MARK
    return ticks if is_short else [f"#{number}" for number in range(1, len(points) + 1)]


def ticks_of(points: Sequence[PointResult]) -> tuple[str, list[str]]:
    """Return the title of an axis of points, and a short text for each point."""
    axes = axes_of(points)
    texts = [[axis.text(point) for axis in axes] for point in points]
    if len(points) > 16 or any(None in one for one in texts) or not axes:
        return "point", [f"#{index + 1}" for index in range(len(points))]
    return " · ".join(axis.name for axis in axes), [" · ".join(filter(None, one)) for one in texts]


def axes_data(points: Sequence[PointResult]) -> list[dict[str, Any]]:
    """Return the axes by which the page's script can colour marks and make panels."""
    return [
        {
            "name": neutral(axis.name),
            "values": [neutral(text) for text in axis.texts.values()],
            "isNumber": axis.is_number,
            "of": [
                None if (text := axis.text(point)) is None else list(axis.texts.values()).index(text)
                for point in points
            ],
        }
        for axis in axes_of(points)
    ]
