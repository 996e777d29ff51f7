"""Merge the results of several runs of one study, such as its shards, into one results directory.

The merged results depend only on what the runs measured: not on the order in which they are given, nor on how
often they are merged. So results that are merged already can be merged with further runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import MANIFEST, read_manifest, stored_files, stored_result, write_atomically
from pytest_llem.results.manifest_records import EntryStatus, ErrorRecord, Manifest, ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import (
    RESULT,
    StudyResult,
    build_study_result,
    read_design,
    result_lost,
    write_result,
)

#: States of an experiment without a result: of several runs' states, the last one in this list is kept.
_PRECEDENCE: tuple[EntryStatus, ...] = ("deselected", "pending", "running", "skipped", "failed", "completed")


@dataclass
class Merged:
    """The merged results of a study, or of the reference of its comparison.

    Attributes:
        result: The result.
        overlaps: Names of the runs that measured the same experiment, by the id of the experiment.
        missing: Experiments without a result that were not skipped.
        reference: The merged results of the reference; None if the study was not compared.
    """

    result: StudyResult
    overlaps: dict[str, list[str]] = field(default_factory=dict)
    missing: list[ManifestEntry] = field(default_factory=list)
    reference: Merged | None = None


@dataclass(frozen=True)
class _Run:
    """A results directory to merge, its manifest, and its study without results."""

    directory: Path
    manifest: Manifest
    design: StudyResult

    @classmethod
    def read(cls, directory: Path) -> _Run:
        try:
            manifest = read_manifest(directory)
            file = directory / RESULT
            design = StudyResult.read(file) if file.exists() else read_design(directory)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        points = {point.config_hash for point in design.points}
        if other := [one.experiment_id for one in manifest.experiments if one.config_hash not in points]:
            raise ValueError(f"{directory}: {MANIFEST} has {other[0]}, which is not part of the study there")
        return cls(directory, manifest, design)


def merge(directories: Iterable[Path], output: Path, reference: str, judge: Callable[[Merged], None]) -> Merged:
    """Merge results directories into *output*, and return the merged results.

    Args:
        directories: The results directories, in any order.
        output: The directory to write. One that was merged earlier from the same study is replaced.
        reference: Name of the folder in a results directory that has the reference's results.
        judge: Called with the results before they are written; may add verdicts to them.

    Raises:
        ValueError: A directory has no results, the runs differ in study or settings, or *output* has anything but
            merged results of this study.
        OSError: A file cannot be read or written.
    """
    given = {run.directory.resolve(): run for run in map(_Run.read, directories)}  # each run once
    runs = sorted(given.values(), key=lambda run: (run.manifest.started_at, run.directory.name))
    _refuse_different(runs)
    _refuse_overwrite(output, runs[0])
    fresh = output.with_name(f".{output.name}.{os.getpid()}.merging")
    try:
        merged = _write_experiments(runs, fresh)
        references = [_Run.read(run.directory / reference) for run in runs if (run.directory / reference).is_dir()]
        if references:
            _refuse_different(references)
            merged.reference = _write_experiments(references, fresh / reference)
        judge(merged)
        write_result(fresh, merged.result)
        if merged.reference is not None:
            write_result(fresh / reference, merged.reference.result)
        if output.exists():
            replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
            output.rename(replaced)
            fresh.rename(output)
            shutil.rmtree(replaced)
        else:
            fresh.rename(output)
    except OSError as error:
        # The error of a write, not of a file that cannot be read.
        if error.filename2 or not error.filename or Path(error.filename).is_relative_to(fresh):
            error.filename = str(output)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return merged


def _refuse_different(runs: Sequence[_Run]) -> None:
    """Raise ValueError unless all *runs* are of one study, run with the same settings."""
    first, *others = runs
    for other in others:
        names = f"{first.directory} and {other.directory}"
        studies = [f"{run.manifest.study_name} [{run.manifest.study_design_hash}]" for run in (first, other)]
        if studies[0] != studies[1]:
            raise ValueError(f"{names}: different studies, {studies[0]} and {studies[1]}")
        one, two = first.design.measurement_protocol, other.design.measurement_protocol
        for key in dict.fromkeys((*one, *two)):
            if one.get(key) != two.get(key):
                raise ValueError(f"{names}: run with different settings, {key}: {one.get(key)} and {two.get(key)}")


def _refuse_overwrite(output: Path, run: _Run) -> None:
    """Raise ValueError if *output* has anything but merged results of the study of *run*."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        found = read_manifest(output)
    except (ValueError, OSError):
        found = None
    if found is None or not found.merged_from:
        raise ValueError(f"{output}: exists, and has no merged results: it is not overwritten")
    if found.study_design_hash != run.manifest.study_design_hash:
        raise ValueError(f"{output}: merged results of another study, {found.study_name}: it is not overwritten")


def _write_experiments(runs: Sequence[_Run], folder: Path) -> Merged:
    """Write the study, the manifest and the results of experiments to *folder*."""
    (folder / "experiments").mkdir(parents=True)
    first = runs[0]
    for file in first.directory.glob("study*.yaml"):
        shutil.copyfile(file, folder / file.name)
    by_id: dict[str, list[tuple[_Run, ManifestEntry]]] = {}
    for run in runs:
        for entry in run.manifest.experiments:
            by_id.setdefault(entry.experiment_id, []).append((run, entry))
    merged = Merged(_without_results(first.design))
    entries = [_merge_entry(found, folder, merged) for found in by_id.values()]
    names = {name for run in runs for name in run.manifest.merged_from or [run.directory.name]}
    ends = [run.manifest.completed_at for run in runs if run.manifest.completed_at is not None]
    manifest = Manifest(
        study_name=first.manifest.study_name,
        study_design_hash=first.manifest.study_design_hash,
        pytest_llem_version=first.manifest.pytest_llem_version,
        started_at=first.manifest.started_at,
        completed_at=max(ends, default=None),
        total_experiments=sum(entry.status != "deselected" for entry in entries),
        merged_from=sorted(names),
        environment=first.manifest.environment,
        experiments=entries,
    )
    is_complete = all(entry.status in ("completed", "failed", "skipped") for entry in entries)
    manifest.status = "completed" if is_complete else "interrupted"
    build_study_result(merged.result, manifest, folder)
    merged.missing = [entry for entry in entries if entry.status not in ("completed", "skipped")]
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return merged


def _without_results(design: StudyResult) -> StudyResult:
    points = [
        PointResult(id=one.id, axes=one.axes, config=one.config, config_hash=one.config_hash, metrics={})
        for one in design.points
    ]
    return design.model_copy(update={"points": points, "comparison": None})


def _merge_entry(found: Sequence[tuple[_Run, ManifestEntry]], folder: Path, merged: Merged) -> ManifestEntry:
    """Return the entry of an experiment, given its entries in all runs, and copy its result to *folder*."""
    measured: dict[str, list[tuple[_Run, ManifestEntry]]] = {}
    for run, entry in found:
        if entry.status == "completed":
            measured.setdefault(str(entry.result_sha256), []).append((run, entry))
    if len(measured) > 1:
        runs = {run.directory.name for same in measured.values() for run, _ in same}
        merged.overlaps[found[0][1].experiment_id] = sorted(runs)
    candidates: list[tuple[str, str, _Run, ManifestEntry, str]] = []
    for digest, same in measured.items():
        # An entry of the run that measured it takes precedence over those of runs that replayed it.
        for run, entry in sorted(same, key=lambda one: (one[1].replayed_from is not None, _order(one[1]))):
            if (text := stored_result(run.directory, entry)) is not None:
                measured_at = ExperimentResult.model_validate_json(text).started_at if len(measured) > 1 else ""
                candidates.append((measured_at, digest, run, entry, text))
                break
    if candidates:
        *_, run, entry, text = max(candidates, key=lambda one: one[:2])
        assert entry.result_file is not None
        file = folder / entry.result_file
        file.write_text(text, encoding="utf-8")
        for suffix, content in stored_files(run.directory, entry).items():
            file.with_suffix(f".{suffix}").write_text(content, encoding="utf-8")
        return entry
    entry = max((one for _, one in found), key=lambda one: (_PRECEDENCE.index(one.status), _order(one)))
    if entry.status == "completed":
        return _failed(entry, result_lost(entry))
    if entry.status == "running":
        message = "it had not ended when the results were merged"
        return _failed(entry, ErrorRecord(kind="interrupted", type="Interrupted", message=message))
    return entry


def _failed(entry: ManifestEntry, error: ErrorRecord) -> ManifestEntry:
    changes = {"status": "failed", "error": error, "result_file": None, "result_sha256": None}
    return entry.model_copy(update=changes)


def _order(entry: ManifestEntry) -> tuple[str, str]:
    """Return a key that orders entries of an experiment alike, in whichever order their runs are given."""
    return entry.completed_at or "", entry.model_dump_json()
