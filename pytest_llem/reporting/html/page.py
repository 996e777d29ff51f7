"""Render the report as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.gates.verdict_text import percent
from pytest_llem.planning.estimate import duration_text
from pytest_llem.reporting.failures import failures, not_completed
from pytest_llem.reporting.html import rows
from pytest_llem.reporting.html.contents import SHOWN_PERCENTILES, Contents
from pytest_llem.reporting.html.experiment_plots import (
    cycles_plot,
    latency_plot,
    latency_rows,
    no_power_reason,
    power_plot,
    power_rows,
)
from pytest_llem.reporting.html.formatting import NOTHING, clipped, main_metrics, name_of, title_of, unit_of
from pytest_llem.reporting.html.labels import MAX_PANELS, axes_of, labels_of
from pytest_llem.reporting.html.loads import load_plots
from pytest_llem.reporting.html.plots import Plot
from pytest_llem.reporting.html.point_plots import pareto_plot, sweep_plot
from pytest_llem.reporting.html.template import render_template
from pytest_llem.reporting.terminal.loads import load_findings
from pytest_llem.reporting.text import counted, interval_text, number
from pytest_llem.results.drift import server_drift
from pytest_llem.results.facts import TESTBED
from pytest_llem.results.loads import has_loads
from pytest_llem.results.pareto import best, comparable, host_kinds, pareto_optimal
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.verdicts import GateVerdict

#: What the status of an incomplete run means.
_STATUS = {
    "running": "It is still running or was killed; the page shows the results so far.",
    "interrupted": "It was interrupted before all experiments had run.",
    "aborted": "pytest ended it before all experiments had run, as with -x.",
}


#: Headings of the cards that name the best point of a metric.
_BEST = {
    "output_tokens_per_second": "Most tokens per second",
    "energy_per_output_token_j": "Least energy per output token",
    "ttft_p50_ms": "Shortest time to first token (p50)",
}


@dataclass(frozen=True)
class Card:
    """A card with a key figure, at the top of the page.

    Attributes:
        name: Its heading.
        figure: The figure as text, with its unit.
        about: What the figure is of.
        tone: CSS class: ``good``, ``bad``, ``estimated`` or empty.
    """

    name: str
    figure: str
    about: str
    tone: str = ""


def render(contents: Contents) -> str:
    """Return the whole page."""
    plots = [
        pareto_plot(contents.points),
        sweep_plot(contents.points),
        cycles_plot(contents),
        power_plot(contents),
        latency_plot(contents),
    ]
    loads = load_plots(contents.points)
    shown = {plot.key: plot for plot in [*plots, *loads] if plot is not None}
    content = {**_content(contents, shown), "loads": loads}
    return render_template("report.html.j2", contents.result.name, shown.values(), content, contents.points)


def _content(contents: Contents, plots: dict[str, Plot]) -> dict[str, Any]:
    result, points = contents.result, contents.points
    metrics, optimal, axes = rows.columns(points), pareto_optimal(points).first, axes_of(points)
    main = [metric for metric in main_metrics(points)[:7] if metric in metrics]
    failed = failures(result.experiments)
    return {
        "result": result,
        "contents": contents,
        "subtitle": _subtitle(contents),
        "status": _STATUS.get(result.status),
        "cards": _cards(contents, optimal),
        "plots": plots,
        "no_power_reason": no_power_reason(points),
        "axes": axes,
        "color_axes": [one for one in axes if one.has_colors],
        "panel_axes": [one for one in axes if 1 < len(one.texts) <= MAX_PANELS],
        "columns": rows.headings(points, metrics, len(axes)),
        "points": rows.point_rows(contents, axes, metrics, optimal),
        "methods_differ": rows.methods_differ(points),
        "without": _without(contents),
        "cycle_columns": [title_of(metric) for metric in main],
        "cycles": rows.cycle_rows(contents, main),
        "power": power_rows(contents),
        "latencies": latency_rows(contents),
        "percentiles": SHOWN_PERCENTILES,
        "failures": failed[: rows.MAX_FAILURES],
        "failures_left_out": max(0, len(failed) - rows.MAX_FAILURES),
        "skips": rows.skips(result),
        "excluded": [(_axes(one.get("axes", {})), one.get("reason", "")) for one in result.excluded],
        "gates": rows.gate_rows(result.points),
        "environment": rows.groups(result.environment),
        "protocol": rows.pairs({key: one for key, one in result.measurement_protocol.items() if key != "gates"}),
        "gate_settings": rows.pairs(result.measurement_protocol.get("gates") or {}),
        "testbed": [(TESTBED[key].name, text) for key, text in rows.facts(points, "testbed") if key in TESTBED],
        "sut": rows.facts(points, "sut"),
        "settings": rows.shared_settings(points),
        "number": number,
        "clipped": clipped,
        "counted": counted,
    }


def _subtitle(contents: Contents) -> str:
    points = contents.points
    models = sorted({str(point.config.get("model")) for point in points if point.config.get("model")})
    axes = [axis.name for axis in axes_of(points)]
    cycles = contents.result.measurement_protocol.get("n_cycles")
    number_of_points = len(points) + contents.left_out
    text = f"Energy, latency and throughput of inference: {counted(number_of_points, 'point')}"
    if axes:
        text += f" over {', '.join(axes[:6])}{' and more' if len(axes) > 6 else ''}"
    if isinstance(cycles, int):
        are_complete = all(point.n_cycles == cycles for point in points)
        text += f", {counted(cycles, 'cycle' if are_complete else 'planned cycle')} each"
    if models:
        more = f" and {counted(len(models) - 4, 'more model')}" if len(models) > 4 else ""
        text += f", of {', '.join(models[:4])}{more}"
    return text


def _cards(contents: Contents, optimal: set[int]) -> list[Card]:
    result, points = contents.result, contents.points
    summary = result.summary
    cards = [_done(result)]
    verdicts = [verdict for point in result.points for verdict in point.verdicts]
    if verdicts:
        cards.append(_gates(verdicts))
    for one in result.token_agreement:
        about = f"of {one.tokens:,} greedy tokens: {clipped(one.point)} and {clipped(one.reference)}"
        cards.append(Card("Tokens before the first difference", percent(one.share), about))
    cards += _best_loads(points)
    if (drift := server_drift(points)) is not None:
        name, change = drift.largest
        about = f"{name}, from a server's first load to the same at the end, on {counted(drift.servers, 'server')}"
        cards.append(Card("Drift", f"{change:+.1%}", about, "bad" if drift.is_large else ""))
    for metric, name in _BEST.items():
        cards += [_best(points, index, metric, name) for index in _first_of_each_group(points, metric)]
    if optimal and len(points) > 1:
        cards.append(Card("Pareto-optimal", str(len(optimal)), f"of {counted(len(points), 'point')}"))
    if summary.energy_j is not None:
        about = f"of all measured windows, {summary.method}" if summary.method else "of all measured windows"
        cards.append(Card("Energy", f"{number(summary.energy_j)} J", about, _tone(summary.method)))
    if summary.wall_seconds:
        cards.append(Card("Duration", duration_text(summary.wall_seconds), "from first start to last end"))
    return cards


def _best_loads(points: list[PointResult]) -> Iterator[Card]:
    """Yield the best load of each server within the SLO, or that none is, and what searches found."""
    if has_loads(points):
        for server, what, load, about in load_findings(points):
            yield Card(f"{what[0].upper()}{what[1:]}", load, ", ".join(filter(None, (server, about))))


def _gates(verdicts: Sequence[GateVerdict]) -> Card:
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    failed, skipped = outcomes["failed"], outcomes["skipped"]
    figure = f"{failed} failed" if failed else "none decided" if skipped == len(verdicts) else "none failed"
    about = f"of {counted(len(verdicts), 'gate')}" + (f", {skipped} skipped" if skipped else "")
    return Card("Gates", figure, about, "bad" if failed else "" if skipped else "good")


def _done(result: StudyResult) -> Card:
    summary = result.summary
    numbers = not_completed(result) | ({"replayed": summary.replayed} if summary.replayed else {})
    about = ", ".join(f"{n} {what}" for what, n in numbers.items()) or "completed"
    tone = "bad" if summary.failed else "good" if 0 < summary.completed == summary.total else ""
    return Card("Experiments", f"{summary.completed} of {summary.total}", about, tone)


def _first_of_each_group(points: list[PointResult], metric: str) -> list[int]:
    """Return the lowest index of the best points of each comparable group. An only point counts as the best."""
    groups = comparable(points, metric)
    if len(points) == 1:
        return [index for group in groups for index in group]
    first = best(points, metric).first
    return [min(found) for group in groups if (found := first.intersection(group))]


def _best(points: list[PointResult], index: int, metric: str, name: str) -> Card:
    one = points[index].metrics[metric]
    assert one.mean is not None
    interval = ", ".join(filter(None, (interval_text(one), f"n = {one.n}")))
    host = host_kinds(points)[index]
    return Card(
        name if len(points) > 1 else name_of(metric),
        f"{number(one.mean)} {unit_of(metric).replace('1/s', 'tokens/s')}",
        ", ".join(filter(None, (f"{interval}: {labels_of(points)[index]}", one.method, host and f"on {host}"))),
        _tone(one.method),
    )


def _tone(method: str | None) -> str:
    return "estimated" if method == "estimated" else ""


def _without(contents: Contents) -> list[tuple[str, str]]:
    """Return the metrics without a value at any measured point, and the reason."""
    measured = [point for point in contents.points if point.cycles]
    found: dict[str, str] = {}
    for point in measured:
        for metric, summary in point.metrics.items():
            if summary.mean is None:
                found.setdefault(metric, summary.reason or NOTHING)
    has_value = {metric for point in measured for metric, one in point.metrics.items() if one.mean is not None}
    return [(title_of(metric), reason) for metric, reason in found.items() if metric not in has_value]


def _axes(axes: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={rows.plain(value)}" for axis, value in axes.items())
