"""Format the summary that a terminal shows at the end of a study."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llem._plugin.node_ids import REFERENCE
from pytest_llem.gates.matching import named
from pytest_llem.gates.verdict_text import percent
from pytest_llem.reporting.failures import failures
from pytest_llem.reporting.terminal.loads import load_lines, probe_lines
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.reporting.text import counted
from pytest_llem.results.cycles import gpu_spread
from pytest_llem.results.loads import has_loads
from pytest_llem.results.pareto import COST, SPEED
from pytest_llem.results.quality_warnings import worst
from pytest_llem.results.study_result import StudyResult, selected_points
from pytest_llem.study.problems import printable

if TYPE_CHECKING:
    from pytest_llem.results.study_run import StudyRun

#: Warnings shown; study_result.json has all of them.
MAX_WARNINGS = 5

#: Rows of the table: laying out 10,000 takes 15 s.
MAX_POINTS = 200

#: Errors shown, of those that several experiments failed with.
MAX_FAILURES = 5

#: Differences between GPUs shown.
MAX_SPREADS = 4

#: Beginning of a warning's line.
WARNING = "warning: "


def summary_lines(run: StudyRun, directory: Path, width: int, *, ids: bool = False) -> list[str]:
    """Return the table of points, the number of experiments by outcome, warnings, and the results' paths.

    Args:
        run: A study that has ended.
        directory: The directory that paths are shown relative to.
        width: Width of the terminal in characters.
        ids: Show each point's whole id instead of its axes, and the loads that searches have tried.
    """
    result = run.result
    if result is None:
        return []
    if not run.selected:  # only experiments of the reference have run
        return [f"results: {shown_from(directory, run.directory)}"]
    lines = table_lines(result, width, ids=ids)
    lines += _gpu_lines(result)
    for one in result.token_agreement:
        lines.append(
            f"greedy tokens of {one.point} equal to {one.reference}: {percent(one.share)} of {one.tokens:,}"
        )
    lines.append(_done(run, result))
    lines += _repeated_failures(result)
    has_reference = (run.directory / REFERENCE).exists()  # an interleaved run cannot be resumed
    if result.status != "completed" and not has_reference:
        lines.append("run again with --llem-resume to continue")
    shown = worst(result.warnings, MAX_WARNINGS)
    lines += [f"{'note: ' if one.severity == 'note' else WARNING}{one}" for one in shown]
    if len(result.warnings) > MAX_WARNINGS:
        lines.append(f"{counted(len(result.warnings) - MAX_WARNINGS, 'more warning')} in study_result.json")
    lines.append(f"results: {shown_from(directory, run.directory)}")
    if run.page is not None:
        lines.append(f"report: {shown_from(directory, run.page)}")
    return lines


def shown_from(directory: Path, path: Path) -> Path:
    """Return *path* relative to *directory*; as it is if the two have only the root in common."""
    shared = Path(os.path.commonpath([directory, path]))
    return path if shared == Path(shared.anchor) else Path(os.path.relpath(path, directory))


def table_lines(result: StudyResult, width: int, *, ids: bool = False) -> list[str]:
    """Return the table of points, its legend, and the best loads of servers.

    Args:
        result: A study's result.
        width: Width of the terminal in characters.
        ids: Show each point's whole id instead of its axes, and the loads that searches have tried.
    """
    shown, planned = selected_points(result)
    if (left_out := len(shown) - MAX_POINTS) > 0:
        shown = sorted(shown, key=lambda point: point.metrics["seconds"].n == 0)[:MAX_POINTS]
    made = points_table(shown, planned, width, ids=ids)
    lines = render(made.table, made.width)
    if left_out > 0:
        lines.append(f"{counted(left_out, 'more point')} in summary.csv")
    if ids and has_loads(shown):
        lines += probe_lines(shown, width)
    lines.append("")
    if has_loads(shown):
        lines += load_lines(shown)
    return lines + made.legend


def _gpu_lines(result: StudyResult) -> Iterator[str]:
    """Yield the standard deviation between GPUs, of points whose cycles ran on several."""
    found = []
    for point in result.points:
        spreads = ((name, gpu_spread(point, name)) for name in (COST, SPEED))
        found += [(point, name, spread) for name, spread in spreads if spread is not None]
    for point, name, spread in found[:MAX_SPREADS]:
        text = f"{point.id}: {name}: standard deviation {spread.between:.1%} between {spread.gpus} GPUs"
        if spread.interval is not None:
            text += f" (95 %: {spread.interval[0]:.1%} to {spread.interval[1]:.1%})"
        yield text if spread.within is None else f"{text}, {spread.within:.1%} between cycles on one"
    if len(found) > MAX_SPREADS:
        yield f"{len(found) - MAX_SPREADS} more such differences between GPUs: gpus of study_result.json"


def _repeated_failures(result: StudyResult) -> Iterator[str]:
    """Yield a line for each error that several experiments failed with. pytest reports each of them by itself."""
    repeated = [one for one in failures(result.experiments) if len(one.ids) > 1 and one.expected is None]
    for one in repeated[:MAX_FAILURES]:
        phase = f" while {one.error.phase}" if one.error.phase else ""
        first = next(iter(one.error.message.splitlines()), "")
        yield printable(f"failed {len(one.ids)} times: {one.error.kind}{phase}: {first} [{named(one.ids)}]")


def _done(run: StudyRun, result: StudyResult) -> str:
    """Return the number of experiments by outcome."""
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
