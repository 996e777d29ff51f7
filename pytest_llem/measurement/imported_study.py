"""Turn files of load generators into the results of a study: its points, cycles and results directory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pytest_llem.importers.formats import digest
from pytest_llem.importers.reading import ImportFileError, fail
from pytest_llem.importers.run import ToolRun
from pytest_llem.measurement.imported_runs import ImportedRuns
from pytest_llem.results.cycles import summarise
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord, ExperimentResult, Identity
from pytest_llem.results.manifest import ManifestWriter
from pytest_llem.results.manifest_records import Manifest, ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult, StudySummary, build_study_result, write_result
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.identity import axes_key, experiment_id, point_id, short_names, study_design_hash
from pytest_llem.times import utc

#: What belongs to one start of a server, and so to one cycle: each file, or each folder of files.
CyclePer = Literal["file", "folder"]

#: Settings that describe the load: one of them is the axis if several settings differ in the same way.
_LOAD = re.compile(r"concurrency|rate|streams")

_INDEX = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class ImportedPoint:
    """One configuration: its axes and its cycles, each with the runs on one start of the server."""

    axes: Mapping[str, Any]
    cycles: Sequence[ImportedRuns]

    @property
    def first(self) -> ToolRun:
        """The first run, from which the configuration is taken."""
        return self.cycles[0].first

    @property
    def config_hash(self) -> str:
        """16 hex digits that identify the configuration."""
        run = self.first
        text = json.dumps([run.format, dict(self.axes), run.model, dict(run.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def points_of(
    runs: Sequence[ToolRun], paths: Mapping[str, str], cycle_per: CyclePer | None = None
) -> list[ImportedPoint]:
    """Return the points that *runs* measured, in the order of their first runs.

    Args:
        runs: The runs, all of one tool.
        paths: Path of each axis's value in the file, by the axis's name; empty to make axes of the settings that
            differ between the runs.
        cycle_per: What belongs to one start of the server, if the files do not say; None if all runs do.

    Raises:
        ImportFileError: The runs are of several tools, two files are the same, or a path leads nowhere.
    """
    _check(runs)
    names = () if paths else _differing(runs)
    points: dict[Any, tuple[dict[str, Any], dict[str, list[ToolRun]]]] = {}
    for run in runs:
        axes = {axis: _value_at(run, axis, path) for axis, path in paths.items()}
        axes |= {name: _settings(run)[name] for name in names if name in _settings(run)}
        axes = axes or ({"backend": run.format} if run.model is None else {"model": run.model})
        _, cycles = points.setdefault(axes_key(axes), (axes, {}))
        cycles.setdefault(_server_start(run, cycle_per), []).append(run)
    return [
        ImportedPoint(axes, [ImportedRuns(one) for one in cycles.values()]) for axes, cycles in points.values()
    ]


def _check(runs: Sequence[ToolRun]) -> None:
    """Raise if runs are of several tools, or if two files are the same."""
    first = runs[0]
    for run in runs:
        if run.tool != first.tool:
            one, other = (f"{given.files[0]} of {given.tool}" for given in (first, run))
            raise ImportFileError(f"{one}, {other}: tools measure differently: import the files of one at a time")
    files: dict[str, Path] = {}
    for file in dict.fromkeys(file for run in runs for file in run.files):
        same = files.setdefault(digest(file), file)
        if same != file:
            fail(file, f"has the same content as {same}: one run is not two")


def _server_start(run: ToolRun, cycle_per: CyclePer | None) -> str:
    """Return the identity of the server's start that *run* measured."""
    if run.server_start is not None:
        return run.server_start
    if cycle_per is None:
        return ""
    return str(run.files[0] if cycle_per == "file" else run.files[0].absolute().parent)


def _settings(run: ToolRun) -> dict[str, Any]:
    return {**({} if run.model is None else {"model": run.model}), **run.settings}


def _differing(runs: Sequence[ToolRun]) -> list[str]:
    """Return the settings that differ between *runs*; of several that differ in the same way, only one."""
    known = dict.fromkeys(name for run in runs for name in _settings(run))
    found: dict[tuple[int, ...], str] = {}
    for name in sorted(known, key=lambda one: _LOAD.search(one) is None):
        values = [json.dumps(_settings(run).get(name)) for run in runs]
        pattern = tuple(values.index(value) for value in values)  # where each value occurs first
        if len(set(values)) > 1:
            found.setdefault(pattern, name)
    return [name for name in known if name in found.values()]


def _value_at(run: ToolRun, axis: str, path: str) -> Any:
    """Return the value at a *path* such as ``config.streams[0]`` in the file of *run*."""
    value = run.document
    for part in _INDEX.sub(r".\1", path).split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            fail(run.files[0], f"--axis {axis}={path}: there is no {part!r}")
    if not isinstance(value, str | int | float):
        fail(run.files[0], f"--axis {axis}={path}: is not a text, a number, true or false")
    return value


def write_study(directory: Path, name: str, points: Sequence[ImportedPoint]) -> StudyResult:
    """Write the results of *points* to *directory*, as a run of a study does, and return the StudyResult.

    Args:
        directory: The results directory, which is empty or is created.
        name: Name of the study.
        points: The points.

    Raises:
        ImportFileError: A duration does not follow from a file.
        OSError: A file could not be written.
    """
    names = short_names(dict.fromkeys(axis for point in points for axis in point.axes))
    hashes = [point.config_hash for point in points]
    n_cycles = max(len(point.cycles) for point in points)
    design_hash = study_design_hash(hashes)
    results: dict[str, tuple[ExperimentResult, str | None]] = {}
    entries = []
    for point, config_hash in zip(points, hashes, strict=True):
        id_ = point_id(point.axes, names)
        for cycle, runs in enumerate(point.cycles, start=1):
            identity = Identity(
                experiment_id=experiment_id(id_, cycle, n_cycles),
                config_hash=config_hash,
                study_design_hash=design_hash,
                axes=dict(point.axes),
                cycle=cycle,
            )
            results[identity.experiment_id] = result_of(runs, identity), runs.to_csv()
            entries.append(
                ManifestEntry(
                    experiment_id=identity.experiment_id, config_hash=config_hash, config_summary=id_, cycle=cycle
                )
            )
    started_at = min(result.started_at for result, _ in results.values())
    version = package_version("pytest-llem") or "unknown"
    manifest = Manifest(
        study_name=name,
        study_design_hash=design_hash,
        pytest_llem_version=version,
        started_at=started_at,
        total_experiments=len(entries),
        experiments=entries,
    )
    directory.mkdir(parents=True, exist_ok=True)
    writer = ManifestWriter(directory, manifest)
    for entry in entries:
        result, requests = results[entry.experiment_id]
        writer.running(entry.experiment_id)
        files = {} if requests is None else {"requests.csv": requests}
        writer.completed(entry.experiment_id, result.model_dump_json(indent=1) + "\n", files)
        entry.started_at, entry.completed_at = result.started_at, result.completed_at
    writer.finish("completed")
    design = StudyResult(
        pytest_llem_version=version,
        name=name,
        study_design_hash=design_hash,
        status="completed",
        started_at=started_at,
        summary=StudySummary(total=len(entries), completed=0, failed=0, wall_seconds=0.0),
        points=[
            PointResult(
                id=point_id(point.axes, names),
                axes=dict(point.axes),
                config={},
                config_hash=config_hash,
                metrics={},
            )
            for point, config_hash in zip(points, hashes, strict=True)
        ],
        measurement_protocol={
            "isolation": "none: imported from files of another tool",
            "n_cycles": n_cycles,
            "unit_of_repetition": "start of the server",
            "interval": "Student t, 95 %",
            "gates": GatesConfig().model_dump(mode="json"),
        },
    )
    study = build_study_result(design, manifest, directory)
    write_result(directory, study)
    return study


def point_results(points: Sequence[ImportedPoint]) -> list[PointResult]:
    """Return the statistics of *points* over their cycles, without writing them.

    Raises:
        ImportFileError: A duration does not follow from a file.
    """
    names = short_names(dict.fromkeys(axis for point in points for axis in point.axes))
    found = []
    for point in points:
        identity = Identity(experiment_id=point_id(point.axes, names), config_hash=point.config_hash)
        results = [result_of(runs, identity) for runs in point.cycles]
        found.append(
            PointResult(
                id=identity.experiment_id,
                axes=dict(point.axes),
                config=results[0].effective_config,
                config_hash=point.config_hash,
                cycles=[*range(1, 1 + len(results))],
                metrics=summarise(results),
            )
        )
    return found


def result_of(runs: ImportedRuns, identity: Identity) -> ExperimentResult:
    """Return the result of *runs*, which are one experiment."""
    run = runs.first
    started_at, completed_at = _times(runs)
    version = {} if run.version is None else {run.tool: run.version}
    return ExperimentResult(
        pytest_llem_version=package_version("pytest-llem") or "unknown",
        identity=identity,
        effective_config=_config(runs),
        metrics=runs.metrics(),
        window=runs.window(),
        tokens=runs.tokens(),
        engine=EngineRecord(name=run.tool, versions=version, device="unknown", settings=dict(run.settings)),
        imported=runs.record(),
        started_at=started_at,
        completed_at=completed_at,
        warnings=sorted(runs.warnings(), key=lambda one: one.rank),
    )


def _config(runs: ImportedRuns) -> dict[str, Any]:
    """Return the fields of a study that a file can have. The others are null: they did not reach the tool."""
    unknown: dict[str, Any] = dict.fromkeys(("precision", "prompt_format", "max_output_tokens", "decoder"))
    known = {} if runs.completed is None else {"n": runs.completed}
    return {
        "backend": runs.first.format,
        "model": runs.first.model,
        **known,
        **unknown,
        "measurement": {"length_mode": None},
    }


def _times(runs: ImportedRuns) -> tuple[str, str]:
    """Return start and end. An unknown end is the file's time, and an unknown start is the end."""
    began, ended = zip(*map(_span, runs.runs), strict=True)
    return utc(min(began).timestamp()), utc(max(ended).timestamp())


def _span(run: ToolRun) -> tuple[datetime, datetime]:
    ended = run.ended_at or datetime.fromtimestamp(run.files[0].stat().st_mtime, UTC)
    seconds = run.seconds if run.clock == "unix" and run.ended_at is not None else None
    return ended - timedelta(seconds=seconds or 0.0), ended


def parse_axes(given: Iterable[str]) -> dict[str, str]:
    """Return the path of each axis that is given as ``name=path``, by its name.

    Raises:
        ImportFileError: One does not have this form, or is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path and name.isprintable()):
            raise ImportFileError(
                f"--axis {text}: must be NAME=JSON.path, such as streams=config.strategy.streams"
            )
        if name in found:
            raise ImportFileError(f"--axis {text}: {name} is given twice")
        found[name] = path
    return found
