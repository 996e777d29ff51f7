"""From the manifest and the experiments' results to the StudyResult."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pytest_llem.results.metrics import CATALOGUE, Metric, weakest
from pytest_llem.results.models import (
    ExperimentResult,
    GapRecord,
    Manifest,
    PointResult,
    StudyResult,
    StudySummary,
)
from pytest_llem.results.statistics import Summary, mean_interval
from pytest_llem.study.design import StudyConfig


def build_study_result(
    study: StudyConfig, manifest: Manifest, results: Mapping[str, ExperimentResult]
) -> StudyResult:
    """Return the outcome of *study*.

    Args:
        study: What was to be run.
        manifest: What became of it.
        results: By experiment id, those that completed.
    """
    ordered = [results[entry.experiment_id] for entry in manifest.experiments if entry.experiment_id in results]
    by_point: dict[str, list[ExperimentResult]] = {}
    for result in ordered:
        by_point.setdefault(result.identity.config_hash, []).append(result)
    return StudyResult(
        pytest_llem_version=manifest.pytest_llem_version,
        name=study.name,
        study_design_hash=study.design_hash,
        status=manifest.status,
        summary=_summary(manifest, ordered),
        points=[
            PointResult(
                id=point.id,
                axes=point.axes,
                config=point.config.model_dump(mode="json"),
                config_hash=point.config_hash,
                metrics=summarise(by_point.get(point.config_hash, [])),
            )
            for point in study.points
        ],
        experiments=manifest.experiments,
        excluded=[{"axes": left_out.axes, "reason": left_out.reason} for left_out in study.excluded],
        measurement_protocol=_protocol(study),
        environment=ordered[0].environment if ordered else manifest.environment,
        result_files=[entry.result_file for entry in manifest.experiments if entry.result_file],
        warnings=_warnings(ordered),
    )


def summarise(cycles: Sequence[ExperimentResult]) -> dict[str, Summary]:
    """Return the statistics of every metric over a point's *cycles*."""
    return {
        name: _summarise([cycle.metrics[name] for cycle in cycles if name in cycle.metrics], name)
        for name in CATALOGUE
    }


def _summarise(figures: Sequence[Metric], name: str) -> Summary:
    unit = CATALOGUE[name].unit
    values = [figure.value for figure in figures if figure.value is not None]
    if not values:
        reasons = [figure.reason for figure in figures if figure.reason]
        return Summary(mean=None, n=0, unit=unit, reason=reasons[0] if reasons else "no completed cycle")
    boundaries = {figure.boundary for figure in figures if figure.value is not None}
    mean, sd, interval = mean_interval(values)
    return Summary(
        mean=mean,
        sd=sd,
        cv=sd / abs(mean) if sd is not None and mean else None,
        ci95=interval,
        n=len(values),
        unit=unit,
        method=weakest(figure.method for figure in figures if figure.value is not None),
        boundary=boundaries.pop() if len(boundaries) == 1 else None,
    )


def _summary(manifest: Manifest, results: Sequence[ExperimentResult]) -> StudySummary:
    figures = [result.metrics["energy_j"] for result in results]
    energies = [result.window.window_energy_j for result in results]
    known = [energy for energy in energies if energy is not None]
    alike = len({figure.boundary for figure in figures}) == 1 and len(known) == len(energies)
    ended = [entry.completed_at for entry in manifest.experiments if entry.completed_at]
    return StudySummary(
        total=sum(entry.status != "deselected" for entry in manifest.experiments),
        completed=manifest.completed,
        failed=manifest.failed,
        wall_seconds=_seconds_between(manifest.started_at, max(ended)) if ended else 0.0,
        energy_j=sum(known) if alike else None,
        method=weakest(figure.method for figure in figures) if alike else None,
    )


def _warnings(results: Sequence[ExperimentResult]) -> list[str]:
    """Return each warning once, with the experiments it concerns unless it concerns all."""
    concerned: dict[str, list[str]] = {}
    for result in results:
        for warning in [*result.warnings, *_gap_warnings(result.gap)]:
            concerned.setdefault(warning, []).append(result.identity.experiment_id)
    return [
        warning if len(ids) == len(results) else f"{warning} ({_named(ids)})" for warning, ids in concerned.items()
    ]


def _gap_warnings(gap: GapRecord | None) -> list[str]:
    if gap is None or not gap.memory_left_mb:
        return []
    return [
        f"{', '.join(gap.memory_left_mb)} had not given back the memory of the experiment before: "
        "gap.memory_left_mb of the result says how much"
    ]


def _named(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"


def _seconds_between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _protocol(study: StudyConfig) -> dict[str, Any]:
    execution = study.execution
    return {
        "isolation": "a fresh spawned process for every experiment",
        "n_cycles": study.n_cycles,
        "cycle_order": execution.cycle_order,
        "shuffle_seed": study.design_hash if execution.shuffle_seed is None else execution.shuffle_seed,
        "experiment_gap_seconds": execution.experiment_gap_seconds,
        "cycle_gap_seconds": execution.cycle_gap_seconds,
        "window": "whole passes over all prompts; totals are per pass",
        "unit_of_repetition": "cycle",
        "interval": "Student t, 95 %",
    }
