"""What a person sees in the terminal: the plan before, the table after."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from pytest_llem.planning.estimate import duration_text
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import gib
from pytest_llem.results.models import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.identity import point_id

if TYPE_CHECKING:
    from pytest_llem.reporting.study_run import StudyRun

#: Reasons shown in a plan.
MOST_REASONS = 5

#: Warnings shown; the rest are in the results.
MOST_WARNINGS = 5

#: Metric, heading.
COLUMNS = (
    ("output_tokens_per_second", "out tok/s"),
    ("ttft_p50_ms", "TTFT p50\nms"),
    ("energy_per_output_token_j", "J/out token"),
)


def plan_lines(plan: Plan, directory: Path) -> list[str]:
    """Return what is about to run, and what will not, a line each.

    Args:
        plan: What was selected.
        directory: What the study's path is shown relative to.
    """
    study = plan.study
    points, cycles = len(study.points), study.n_cycles
    text = f"llem: {study.name} [{study.design_hash}]: {_count(points, 'point')}"
    if cycles > 1:
        text += f" × {cycles} cycles = {_count(points * cycles, 'experiment')}, {study.execution.cycle_order}"
    if len(plan.experiments) != points * cycles:
        text += f", {len(plan.experiments):,} selected"
    if plan.seconds is None:
        text += ", time unknown"
    elif plan.seconds:
        text += f", about {duration_text(plan.seconds)}"
    if study.excluded:
        text += f" · {_count(len(study.excluded), 'combination')} left out"
    if plan.memory_bytes is not None:
        text += f" · needs about {gib(plan.memory_bytes)}"
    elif len(plan.refused) < len(plan.points):
        text += " · memory unknown"
    lines = [text]
    lines += _grouped("left out", ((_axes(one.axes), one.reason) for one in study.excluded))
    lines += _grouped("preflight, will fail", plan.refused.items())
    lines += [f"  note: {note.shown_from(directory)}" for note in study.notes]
    return lines


def _grouped(what: str, named: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with the first of the points that it concerns."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in named:
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in list(by_reason.items())[:MOST_REASONS]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(f"  {what}: {names[0]}{more}: {reason}")
    if len(by_reason) > MOST_REASONS:
        lines.append(
            f"  {what}: for {_count(len(by_reason) - MOST_REASONS, 'more reason')} (--llem-plan has them all)"
        )
    return lines


def _axes(axes: Mapping[str, Any]) -> str:
    return point_id(axes, {axis: axis for axis in axes})


def summary_lines(run: StudyRun, directory: Path, width: int) -> list[str]:
    """Return the table of a study, its warnings, and where the results are.

    Args:
        run: A study that has ended.
        directory: What the results' path is shown relative to.
        width: Of the terminal, in characters.
    """
    result = run.result
    if result is None:
        return []
    planned = Counter(entry.config_hash for entry in run.entries if entry.status != "deselected")
    shown = [point for point in result.points if point.config_hash in planned]
    lines = _render(_table(shown, planned), width)
    lines.append("")
    if any(point.metrics["seconds"].ci95 for point in shown):
        lines.append("mean over n cycles, ± half of its 95 % interval")
    lines += [f"warning: {warning}" for warning in result.warnings[:MOST_WARNINGS]]
    if len(result.warnings) > MOST_WARNINGS:
        lines.append(f"{_count(len(result.warnings) - MOST_WARNINGS, 'more warning')} in study_result.json")
    done = f"{result.summary.completed} of {_count(result.summary.total, 'experiment')} completed"
    if result.summary.failed:
        done += f", {result.summary.failed} failed"
    lines.append(done if result.status == "completed" else f"{done}, {result.status}")
    lines.append(f"results: {Path(os.path.relpath(run.directory, directory))}")
    return lines


def _table(points: Sequence[PointResult], planned: Mapping[str, int]) -> Table:
    methods = {point.metrics["energy_per_output_token_j"].method for point in points} - {None}
    mixed = len(methods) > 1
    drawable = (sys.stdout.encoding or "").lower().startswith("utf")
    table = Table(box=box.SIMPLE_HEAD if drawable else None, pad_edge=False, show_edge=False)
    table.add_column("point", overflow="fold", vertical="bottom")
    table.add_column("n", justify="right")
    for name, heading in COLUMNS:
        if name == "energy_per_output_token_j" and methods and not mixed:
            heading += f"\n{methods.copy().pop()}"
        table.add_column(heading, justify="right")
    if mixed:
        table.add_column("energy is")
    for point in points:
        n, wanted = point.metrics["seconds"].n, planned[point.config_hash]
        cells = [figure(point.metrics[name]) for name, _ in COLUMNS]
        if mixed:
            cells.append(point.metrics["energy_per_output_token_j"].method or "-")
        table.add_row(point.id, str(n) if n == wanted else f"{n} of {wanted}", *cells)
    return table


def figure(summary: Summary) -> str:
    """Return a mean to three digits, with the half-width of its interval in percent where there is one."""
    if summary.mean is None:
        return "-"
    text = f"{summary.mean:#.3g}".rstrip(".") if abs(summary.mean) < 1000 else f"{summary.mean:,.0f}"
    if summary.ci95 is None or not summary.mean:
        return text
    half = (summary.ci95[1] - summary.ci95[0]) / 2 / abs(summary.mean)
    return f"{text} ±{half:.0%}" if half >= 0.1 else f"{text} ±{half:.1%}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _render(table: Table, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, emoji=False, markup=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]
