"""What a person sees in the terminal when a study has ended."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from pytest_llem.nodes import REFERENCE
from pytest_llem.reporting.plan import counted
from pytest_llem.results.models import StudyResult
from pytest_llem.results.severity import worst
from pytest_llem.results.statistics import Summary

if TYPE_CHECKING:
    from pytest_llem.reporting.study_run import StudyRun

#: Warnings shown; the rest are in the results.
MOST_WARNINGS = 5

#: Rows of the table; laying out 10,000 takes a quarter of a minute, and nobody reads them.
MOST_POINTS = 200

#: How a line begins that warns.
WARNING = "warning: "

#: Metric, heading.
COLUMNS = (
    ("output_tokens_per_second", "out tok/s"),
    ("ttft_p50_ms", "TTFT p50\nms"),
    ("energy_per_output_token_j", "J/out token"),
)


def summary_lines(run: StudyRun, directory: Path, width: int, *, ids: bool = False) -> list[str]:
    """Return the table of a study, what became of its experiments, its warnings, and where the results are.

    Args:
        run: A study that has ended.
        directory: What the results' path is shown relative to.
        width: Of the terminal, in characters.
        ids: Show each point's id, and not its axes.
    """
    from pytest_llem.reporting.points import BEST, OPTIMAL, points_table  # it stands on this module

    result = run.result
    if result is None:
        return []
    planned = Counter(entry.config_hash for entry in run.entries if entry.status != "deselected")
    shown = [point for point in result.points if point.config_hash in planned]
    if (left_out := len(shown) - MOST_POINTS) > 0:
        shown = sorted(shown, key=lambda point: point.metrics["seconds"].n == 0)[:MOST_POINTS]
    made = points_table(shown, planned, width, ids=ids)
    lines = render(made.table, width)
    if left_out > 0:
        lines.append(f"{counted(left_out, 'more point')} in summary.csv")
    lines.append("")
    if any(point.metrics["seconds"].ci95 for point in shown):
        lines.append("mean over n cycles, ± half of its 95 % interval")
    if made.has_best:
        lines.append(f"{BEST} best mean of its column")
    if made.has_optimal:
        lines.append(f"{OPTIMAL} Pareto-optimal in J/out token and out tok/s")
    lines.append(_done(run, result))
    if result.status != "completed" and not (run.directory / REFERENCE).exists():  # two sides are not resumed
        lines.append("--llem-resume goes on from here")
    lines += [f"{WARNING}{warning}" for warning in worst(result.warnings, MOST_WARNINGS)]
    if len(result.warnings) > MOST_WARNINGS:
        lines.append(f"{counted(len(result.warnings) - MOST_WARNINGS, 'more warning')} in study_result.json")
    lines.append(f"results: {Path(os.path.relpath(run.directory, directory))}")
    if run.page is not None:
        lines.append(f"report: {Path(os.path.relpath(run.page, directory))}")
    return lines


def _done(run: StudyRun, result: StudyResult) -> str:
    """Return what became of the experiments, in numbers."""
    interrupted = sum(entry.error is not None and entry.error.kind == "interrupted" for entry in run.entries)
    expected = sum(entry.status == "skipped" and entry.error is not None for entry in run.entries)
    numbers = {
        "failed": result.summary.failed - interrupted,
        "interrupted": interrupted,
        "failed as expected": expected,
        "skipped": sum(entry.status == "skipped" for entry in run.entries) - expected,
        "not run": sum(entry.status == "pending" for entry in run.entries),
    }
    text = f"{result.summary.completed} of {counted(result.summary.total, 'experiment')} completed"
    if result.summary.replayed:
        text += f" ({result.summary.replayed} of them replayed)"
    text += "".join(f", {number} {what}" for what, number in numbers.items() if number)
    if run.stopped is not None:
        text += f"; stopped: {run.stopped}"
    return text


def figure(summary: Summary) -> str:
    """Return a mean to three digits, with the half-width of its interval in percent where there is one."""
    if summary.mean is None:
        return "-"
    text = number(summary.mean)
    if summary.ci95 is None or not summary.mean:
        return text
    half = (summary.ci95[1] - summary.ci95[0]) / 2 / abs(summary.mean)
    return f"{text} ±{half:.0%}" if half >= 0.1 else f"{text} ±{half:.1%}"


def number(value: float) -> str:
    """Return *value* to three digits, or to the unit where it has more."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def plain_table() -> Table:
    """Return a table without edges; without lines, too, where the terminal could not draw them."""
    drawable = (sys.stdout.encoding or "").lower().startswith("utf")
    return Table(box=box.SIMPLE_HEAD if drawable else None, pad_edge=False, show_edge=False)


def render(table: Table, width: int) -> list[str]:
    """Return the lines of *table*, without colours, at most *width* characters wide."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, emoji=False, markup=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]
