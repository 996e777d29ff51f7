"""The results directory of a study's run: its manifest during the run, and its result at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.findings import Findings
from pytest_llem.results.manifest import ManifestWriter, write_atomically
from pytest_llem.results.manifest_records import ErrorRecord, Manifest, ManifestEntry, StudyStatus
from pytest_llem.results.study_result import (
    DESIGN,
    RESULT_LOST,
    StudyResult,
    add_results,
    complete,
    study_design,
    write_result,
)
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.times import now

#: Statuses of experiments that are still to run, or are running.
_NOT_ENDED = ("pending", "running")


@dataclass
class StudyRun:
    """A run of a study, which writes its results directory.

    Attributes:
        study: The study.
        directory: Results directory, created for this run.
        selected: Selected experiments by node id.
        writer: Writer of the manifest.
        result: The StudyResult; None until the study has ended.
        stopped: Why the plugin ended the study before all experiments had run; None if it did not.
        lost: Messages about saved results that are missing or changed at the end.
        page: Path of the HTML page; None if it was not written.
        latest: Result of the experiment that was completed last, or None.
    """

    study: StudyConfig
    directory: Path
    selected: dict[str, Experiment]
    writer: ManifestWriter
    result: StudyResult | None = None
    stopped: str | None = None
    lost: list[str] = field(default_factory=list)
    page: Path | None = None
    latest: ExperimentResult | None = None
    _summarised: tuple[StudyResult, Findings] | None = None
    _ended: int = 0  # number of ended experiments in _summarised

    @classmethod
    def open(
        cls,
        study: StudyConfig,
        selected: dict[str, Experiment],
        results_dir: Path,
        name: str,
        environment: dict[str, Any],
        resumed_from: Iterable[str] = (),
        shard: str | None = None,
    ) -> StudyRun:
        """Create the results directory and write the first manifest.

        Args:
            study: The study.
            selected: Selected experiments by node id; the study's others are deselected.
            results_dir: Parent of the new directory.
            name: Name of the new directory; a number is appended if it is taken.
            environment: Facts of this machine.
            resumed_from: Names of the results directories whose results are replayed.
            shard: Part of the study that is run, ``I/N``; None for all of it.

        Raises:
            OSError: The directory cannot be created.
        """
        selected_ids = {experiment.id for experiment in selected.values()}
        entries = [
            ManifestEntry(
                experiment_id=experiment.id,
                config_hash=experiment.point.config_hash,
                config_summary=experiment.point.id,
                cycle=experiment.cycle,
                status="pending" if experiment.id in selected_ids else "deselected",
            )
            for experiment in study.experiments
        ]
        manifest = Manifest(
            study_name=study.name,
            study_design_hash=study.design_hash,
            pytest_llem_version=package_version("pytest-llem") or "unknown",
            started_at=now(),
            total_experiments=len(selected_ids),
            environment=environment,
            resumed_from=list(resumed_from),
            shard=shard,
            experiments=entries,
        )
        design = study_design(study, manifest).model_dump_json() + "\n"
        directory = _make_directory(results_dir, name)
        try:
            write_atomically(directory / "study.yaml", study.text)
            if study.base_text is not None:
                write_atomically(directory / "study.base.yaml", study.base_text)
            # Before the manifest, so that the other files exist wherever a manifest exists.
            write_atomically(directory / DESIGN, design)
            return cls(study, directory, selected, ManifestWriter(directory, manifest))
        except BaseException:  # includes Ctrl-C: a directory without a manifest is of no use
            shutil.rmtree(directory, ignore_errors=True)
            raise

    @property
    def entries(self) -> list[ManifestEntry]:
        """The manifest's entries, in run order."""
        return self.writer.manifest.experiments

    def started(self, experiment: Experiment) -> None:
        """Record that an experiment starts."""
        self.writer.running(experiment.id)

    def completed(self, experiment: Experiment, payload: dict[str, Any]) -> ExperimentResult:
        """Save an experiment's result and return it.

        Args:
            experiment: The experiment.
            payload: What its item reported: result as JSON text, further files by suffix, worker, and replay.

        Raises:
            OSError: The result could not be saved.
        """
        result = ExperimentResult.model_validate_json(payload["result"])
        device = ", ".join(result.engine.device_names) or result.engine.device
        self.writer.completed(
            experiment.id,
            payload["result"],
            payload["files"],
            worker=payload["worker"],
            device=device,
            replayed_from=payload["replayed_from"],
            replay_mismatch=payload["replay_mismatch"],
        )
        self.latest = result
        return result

    def failed(
        self,
        experiment: Experiment,
        error: ErrorRecord,
        files: Mapping[str, str] | None = None,
        worker: str | None = None,
    ) -> None:
        """Record that an experiment failed, and save its *files*: text by suffix (``output.txt``)."""
        self.writer.failed(experiment.id, error, files, worker=worker)

    def unsaved(self, experiment: Experiment, reason: str) -> None:
        """Record that a result could not be saved, if the manifest can be written."""
        message = f"the result could not be saved: {reason}"
        with suppress(OSError):
            self.failed(experiment, ErrorRecord(kind="exception", type="OSError", message=message))

    def skipped(self, experiment: Experiment, reason: str, error: ErrorRecord | None = None) -> None:
        """Record that an experiment was skipped, or failed with *error* as xfail expects."""
        self.writer.skipped(experiment.id, reason, error)

    def has_ended(self, experiment: Experiment) -> bool:
        """Whether an experiment is completed, failed or skipped."""
        return self.writer.entry(experiment.id).status not in _NOT_ENDED

    def is_done(self) -> bool:
        """Whether nothing is pending or running any more."""
        return all(entry.status not in _NOT_ENDED for entry in self.entries)

    def is_untouched(self) -> bool:
        """Whether no experiment has started or was skipped."""
        return all(entry.status in ("pending", "deselected") for entry in self.entries)

    def discard(self) -> None:
        """Close the manifest and remove the directory, and its parent if nothing else is in it."""
        with suppress(OSError):  # the disk is full
            self.writer.finish("aborted")
        shutil.rmtree(self.directory, ignore_errors=True)
        parent = self.directory.parent
        if [one.name for one in parent.iterdir()] == [".gitignore"]:
            shutil.rmtree(parent, ignore_errors=True)

    def summarise(self) -> StudyResult:
        """Return the results of the points so far. They are read again if more experiments have ended since."""
        manifest = self.writer.manifest
        ended = sum(entry.status not in _NOT_ENDED for entry in self.entries)
        if self._summarised is None or self._ended != ended:
            result = study_design(self.study, manifest)
            self._summarised, self._ended = (result, add_results(result, manifest, self.directory)), ended
        return self._summarised[0]

    def finish(self, status: StudyStatus) -> StudyResult:
        """Close the manifest, and write and return the StudyResult.

        Raises:
            OSError: A file could not be written.
        """
        self.summarise()
        self.writer.finish(status)
        assert self._summarised is not None
        design, found = self._summarised
        self.result = complete(design, self.writer.manifest, found)
        self.lost = [one.error.message for one in self.entries if one.error and one.error.type == RESULT_LOST]
        if self.lost:  # their entries have become failed
            self.writer.finish(status)
        write_result(self.directory, self.result)
        with suppress(OSError):  # the StudyResult includes all of it
            (self.directory / DESIGN).unlink()
        return self.result


def _make_directory(results_dir: Path, name: str) -> Path:
    """Create and return a new directory, with a number appended to *name* if it is taken."""
    try:
        results_dir.mkdir(parents=True)
    except FileExistsError:  # the user's own directory gets no .gitignore
        if not results_dir.is_dir():
            raise
    else:
        (results_dir / ".gitignore").write_text("*\n", encoding="utf-8")
    for number in range(1, 10_000):
        directory = results_dir / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise FileExistsError(f"{results_dir / name}: exists, and so do all names up to {name}-9999")
