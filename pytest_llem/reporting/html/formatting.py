"""Name and format metrics, points and figures for the report."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.text import mean_text, number
from pytest_llem.results.loads import ATTAINMENT, GOOD_COST, GOODPUT, has_loads
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary

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
