"""Format the plan of a study: the lines that a terminal shows before it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llem.planning.estimate import duration_text, gib
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.resume import Replay
from pytest_llem.reporting.text import counted
from pytest_llem.study.identity import point_id

#: Reasons shown of each kind; ``--llem-plan`` writes all of them.
MAX_REASONS = 5


def plan_lines(plan: Plan, directory: Path) -> list[str]:
    """Return lines that say what will run, how long it will take, and what is left out.

    Args:
        plan: The plan of the selected experiments.
        directory: The directory that paths are shown relative to.
    """
    study = plan.study
    points, cycles = len(study.points), study.n_cycles
    text = f"llem: {study.name} [{study.design_hash}]: {counted(points, 'point')}"
    if cycles > 1:
        most = f"up to {cycles} cycles, at most" if study.execution.until_decided else f"{cycles} cycles ="
        text += f" × {most} {counted(points * cycles, 'experiment')}, {study.execution.cycle_order}"
    if len(plan.experiments) != points * cycles:
        text += f", {len(plan.experiments):,} selected"
    if skipped := sum(experiment.point.skip is not None for experiment in plan.experiments):
        text += f", {skipped:,} skipped"
    if replayed := len(plan.experiments) - len(plan.to_run):
        text += f", {replayed:,} replayed"
    if plan.run_seconds is None:
        text += f", time unknown{_windows(plan)}"
    elif plan.run_seconds:
        about = "at most about" if study.execution.until_decided else "about"
        text += f", {about} {duration_text(plan.run_seconds)}"
    if plan.deadlines:
        text += f" · deadline {_deadline(plan)}"
    if (gpus := max((number or 0 for number in plan.gpus.values()), default=0)) > 1:
        text += f" · {'up to ' if len(set(plan.gpus.values())) > 1 else ''}{gpus} GPUs each"
    if study.execution.start_method != "spawn":
        text += f" · {study.execution.start_method}"
    if study.excluded:
        text += f" · {counted(len(study.excluded), 'combination')} left out"
    if plan.memory_bytes is not None:
        text += f" · needs about {gib(plan.memory_bytes)}"
        if plan.memory_bytes > (available := plan.available_bytes):
            text += f", available {gib(available)}"
    elif len(plan.refused) < len(plan.points):
        text += " · memory unknown"
    lines = [text]
    if plan.workers is not None:
        lines.append(f"  {plan.workers}")
    if plan.reference is not None:
        lines += _reference(plan.reference, plan.against or "")
        lines += _grouped("interleaved cycle by cycle", plan.whole_cycles.items())
    lines += [f"  {line}" for line in plan.minimum_detectable_effect]
    lines += _grouped("left out", ((_axes(one.axes), one.reason) for one in study.excluded))
    lines += _grouped("preflight, will fail", plan.refused.items())
    if plan.replay is not None:
        lines.append(f"  resume: {_replayed(plan, plan.replay, directory)}")
        lines += _grouped("resume, measured again", plan.replay.changed.items())
    lines += [f"  note: {note.shown_from(directory)}" for note in study.notes]
    lines += [f"  note: {note}" for note in plan.notes]
    return lines


def _reference(plan: Plan, name: str) -> list[str]:
    """Return lines on the interleaved run of the reference."""
    seconds = plan.run_seconds
    time = "time unknown" if seconds is None else f"about {duration_text(seconds)} more"
    what = plan.study.gates.interleave
    experiments = counted(len(plan.experiments), "experiment")
    text = f"  against {name}: {experiments} interleaved {what} by {what}, {time}"
    return [text, *_grouped("preflight of the reference, will fail", plan.refused.items())]


def _replayed(plan: Plan, replay: Replay, directory: Path) -> str:
    """Return the number of replayed results of each directory, and when they were measured."""
    times: dict[Path, list[str]] = {}
    factors: dict[str, None] = {}
    for one in plan.experiments:
        if plan.is_replayed(one):
            stored = replay.results[one.id]
            times.setdefault(stored.directory, []).append(stored.measured_at[:16].replace("T", " "))
            if stored.emission_factors is not None:
                factors[stored.emission_factors] = None
    parts = [
        f"{len(found):,} from {os.path.relpath(source, directory)} (measured {_span(found)} UTC)"
        for source, found in times.items()
    ]
    if factors:  # those of the stored results, which the ini file may have replaced since
        parts.append(f"gco2e_g with {'; '.join(factors)}")
    if replay.damaged:
        parts.append(f"{replay.damaged:,} damaged, measured again")
    found = ", ".join(parts) or ("nothing is replayed" if replay.changed else "there are no results to replay")
    return "; ".join([found, *(f"cannot be read: {one}" for one in replay.unreadable)])


def _span(times: Sequence[str]) -> str:
    """Return the first and the last of *times*; the day is not repeated if it is the same."""
    first, last = min(times), max(times)
    return first if first == last else f"{first} to {last.removeprefix(f'{first[:10]} ')}"


def _windows(plan: Plan) -> str:
    """Return the known part of an unknown time: the windows of loads on servers; empty without such loads."""
    windows, drift = plan.load_seconds
    if not windows:
        return ""
    return f" (windows: {duration_text(windows)}{f', and {duration_text(drift)} for drift' if drift else ''})"


def _deadline(plan: Plan) -> str:
    """Return the time limit of experiments: ``9 min each``, ``9–45 min each``, or the limit in the study."""
    each = " each" if len(plan.experiments) > 1 else ""
    given = plan.study.execution.experiment_timeout_seconds
    if given is not None:
        return f"{given:,.15g} s{each} (given)"
    first, last = (duration_text(end(plan.deadlines.values())) for end in (min, max))
    if first != last:
        number, _, unit = first.partition(" ")
        last = f"{number if last.endswith(f' {unit}') else first}–{last}"
    return f"{last}{each}"


def _grouped(what: str, named: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with the first point and the number of further points that it concerns."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in named:
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in list(by_reason.items())[:MAX_REASONS]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(f"  {what}: {names[0]}{more}: {reason}")
    if len(by_reason) > MAX_REASONS:
        lines.append(
            f"  {what}: {counted(len(by_reason) - MAX_REASONS, 'more reason')} (--llem-plan writes all of them)"
        )
    return lines


def _axes(axes: Mapping[str, Any]) -> str:
    return point_id(axes, {axis: axis for axis in axes})
