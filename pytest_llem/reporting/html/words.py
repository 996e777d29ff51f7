"""Metrics, points and figures in words, as a page shows them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.terminal.tables import figure, number
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.identity import short_names, value_text

#: What stands where there is nothing.
NOTHING = "–"

#: The metrics that come first: those that most readers look for.
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

_SPELT = {
    "active_energy_j": "Active energy",
    "edp_js": "Energy-delay product",
    "energy_j": "Energy of a pass",
    "flops": "FLOPs",
    "gco2e_g": "CO₂e",
    "idle_power_w": "Idle power, model loaded",
    "itl": "Inter-token latency",
    "mbu": "MBU",
    "mfu": "MFU",
    "seconds": "Time of a pass",
    "roofline_slowdown": "Times the floor",
    "wh_per_1000_requests": "Energy per 1,000 requests",
}
_UNITS = {"j", "w", "ms", "mb", "c", "g"}
_CAPITALS = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E", "cpu": "CPU", "gpu": "GPU", "dram": "DRAM"}


def name_of(metric: str) -> str:
    """Return a metric's name for people, without its unit."""
    if metric in _SPELT:
        return _SPELT[metric]
    words = metric.split("_")
    if words[-1] in _UNITS:
        words.pop()
    text = " ".join(_CAPITALS.get(word, word) for word in words)
    return text[0].upper() + text[1:]


def unit_of(metric: str) -> str:
    """Return what stands behind its figures, or above them; empty for a ratio."""
    unit = CATALOGUE[metric].unit
    return {"ratio": "", "1/s": "1/s", "tokens": "tokens"}.get(unit, unit)


def title_of(metric: str) -> str:
    """Return its name and unit."""
    unit = unit_of(metric)
    return f"{name_of(metric)} ({unit})" if unit else name_of(metric)


def metrics_with_values(points: Sequence[PointResult]) -> list[str]:
    """Return the metrics of which any point has a value, the main ones first."""
    known = {name for point in points for name, summary in point.metrics.items() if summary.mean is not None}
    return [name for name in (*MAIN, *(name for name in CATALOGUE if name not in MAIN)) if name in known]


def shown(summary: Summary | None) -> str:
    """Return a mean and its interval, as the terminal shows them; a dash where there is none."""
    return NOTHING if summary is None or summary.mean is None else figure(summary)


def told(summary: Summary | None, unit: str) -> str:
    """Return all there is to say of a figure, or why there is none."""
    if summary is None or summary.mean is None:
        return f"no value: {(summary.reason if summary else None) or 'no reason was given'}"
    parts = [f"{summary.mean:.6g} {unit}".strip()]
    if summary.ci95 is not None:
        low, high = summary.ci95
        parts.append(f"95 % interval {low:.4g} to {high:.4g}")
    if summary.sd is not None:
        parts.append(f"sd {summary.sd:.3g}")
    parts.append(f"n = {summary.n}")
    parts += [part for part in (summary.method, summary.boundary) if part]
    parts += ["what it covers differs between cycles"] if summary.is_mixed else []
    parts += [f"not judged: {summary.not_judged}"] if summary.not_judged else []
    if summary.invalid is not None:
        parts.append(f"invalid: {summary.invalid}")
    if summary.covers_engine is False:
        parts.append("not of the engine's devices")
    return ", ".join(parts)


def cycle_figure(given: float | None) -> str:
    """Return one cycle's figure."""
    return NOTHING if given is None else number(given)


def label_of(index: int, point: PointResult) -> str:
    """Return what a point is called everywhere on the page: its number and its id."""
    return f"#{index + 1} {point.id}"


def ticks_of(points: Sequence[PointResult]) -> tuple[str, list[str]]:
    """Return what stands along an axis of points: its title, and a short text for each."""
    axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
    names = short_names(axes)
    if len(points) > 16 or any(list(point.axes) != axes for point in points) or not axes:
        return "point", [f"#{index + 1}" for index in range(len(points))]
    texts = [" · ".join(clipped(axis_text(point.axes[axis]), 24) for axis in axes) for point in points]
    return " · ".join(names[axis] for axis in axes), texts


def axis_text(value: Any) -> str:
    """Return an axis value as somebody wrote it; ids have it with what is unsafe in them spelt out."""
    return value if isinstance(value, str) else value_text(value)


def clipped(text: str, most: int = 80) -> str:
    """Return *text* on one line, and no longer than *most* characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def neutral(text: Any, most: int = 120) -> str:
    """Return *text* as plotly shows it literally: it takes a little HTML in every text."""
    return html.escape(clipped(str(text), most), quote=False)
