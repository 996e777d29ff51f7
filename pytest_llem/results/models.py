"""What is written down of a study: its result, and the manifest before there is one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pytest_llem.results.contention import PointContention
from pytest_llem.results.document import Document, Record
from pytest_llem.results.quality_warnings import StudyWarning
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import ComparisonRecord, GateVerdict

if TYPE_CHECKING:
    import pandas

ErrorKind = Literal["crash", "timeout", "oom", "exception", "interrupted", "preflight"]
EntryStatus = Literal["pending", "running", "completed", "failed", "skipped", "deselected"]
StudyStatus = Literal["running", "completed", "interrupted", "aborted"]


class ErrorRecord(Record):
    """Why an experiment failed.

    Attributes:
        kind: The sort of failure.
        type: Name of the exception, or of the signal or exit status.
        message: In words.
        traceback: Of the experiment's own process, where it raised.
        phase: What the experiment was doing (``loading``, ``warming up``, ``measuring``, …).
    """

    kind: ErrorKind
    type: str
    message: str
    traceback: str | None = None
    phase: str | None = None


class ManifestEntry(Record):
    """One experiment of the manifest.

    ``result_file`` is relative to the manifest; ``reason`` says why it was skipped, or expected to fail;
    ``replayed_from`` names the results directory that its result was taken from, where it was not run again;
    ``replay_mismatch`` says what has changed since that was measured, and is null where nothing has.
    """

    experiment_id: str
    config_hash: str
    config_summary: str
    cycle: int
    status: EntryStatus = "pending"
    result_file: str | None = None
    result_sha256: str | None = None
    error: ErrorRecord | None = None
    reason: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    attempt: int = 0
    worker: str | None = None
    device: str | None = None
    replayed_from: str | None = None
    replay_mismatch: str | None = None


class Manifest(Document):
    """The checkpoint of a study: valid at every moment.

    While the study runs, ``manifest.journal`` beside it may hold transitions after ``journal_sequence``:
    :func:`pytest_llem.results.manifest.read_manifest` reads both. ``resumed_from`` names the results directories
    beside this one whose results are replayed. ``boot_id`` is of the machine whose process holds a lock on the
    directory while it runs, and null where none does: by both a reader can tell that it was killed.
    """

    study_name: str
    study_design_hash: str
    pytest_llem_version: str
    status: StudyStatus = "running"
    started_at: str
    completed_at: str | None = None
    total_experiments: int
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    pending: int = 0
    journal_sequence: int = 0
    boot_id: str | None = None
    resumed_from: list[str] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    experiments: list[ManifestEntry]

    def recount(self) -> None:
        """Set the counters to what the entries say."""
        count = Counter(entry.status for entry in self.experiments)
        self.completed, self.failed, self.skipped = count["completed"], count["failed"], count["skipped"]
        self.pending = count["pending"] + count["running"]


class StudySummary(Record):
    """The study in a few figures.

    Attributes:
        total: Experiments that were to run.
        completed: Of them, completed.
        failed: Of them, failed.
        replayed: Of the completed ones, those whose result was taken from an earlier run.
        wall_seconds: From first start to last end.
        energy_j: Sum over the measured windows, null where any has none or boundaries differ.
        method: The weakest method in that sum.
    """

    total: int
    completed: int
    failed: int
    replayed: int = 0
    wall_seconds: float
    energy_j: float | None = None
    method: str | None = None


class PointResult(Record):
    """One point over its cycles.

    Attributes:
        id: As in the items' ids, without the cycle.
        axes: What distinguishes it: value by dotted key.
        config: Its resolved configuration.
        config_hash: Of that configuration.
        cycles: Those that are completed, in order.
        metrics: Statistics by metric, whose ``values`` are those of ``cycles``, in their order.
        result_digests: SHA-256 of the result of each of ``cycles``, in their order: what tells whether two points
            are the same measurement. Empty in results before schema 1.4.
        testbed: Facts of where and how it was measured, which a result has to share with one it is compared with.
        sut: Facts of what was measured, which may differ there.
        contention: Which cycles are contended; null where no result says.
        verdicts: Of the gates on it.
        replay_mismatch: What has changed since a result of it was measured that was replayed: no gate judges it.
            Null where nothing has.
    """

    id: str
    axes: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    cycles: list[int] = Field(default_factory=list)
    metrics: dict[str, Summary]
    result_digests: list[str] = Field(default_factory=list)
    testbed: dict[str, Any] = Field(default_factory=dict)
    sut: dict[str, Any] = Field(default_factory=dict)
    contention: PointContention | None = None
    verdicts: list[GateVerdict] = Field(default_factory=list)
    replay_mismatch: str | None = None


class StudyResult(Document):
    """The outcome of a study.

    ``comparison`` is null where it was compared with nothing; ``started_at`` in results of versions that did not
    tell; ``experiments`` is empty in a baseline.
    """

    pytest_llem_version: str
    name: str
    study_design_hash: str
    status: StudyStatus
    started_at: str | None = None
    summary: StudySummary
    points: list[PointResult]
    comparison: ComparisonRecord | None = None
    experiments: list[ManifestEntry] = Field(default_factory=list)
    excluded: list[dict[str, Any]] = Field(default_factory=list)
    measurement_protocol: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    result_files: list[str] = Field(default_factory=list)
    warnings: list[StudyWarning] = Field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> StudyResult:
        """Read a ``study_result.json``, or the one in a results directory.

        Where a run is still going on, or was killed, the directory holds none: the result is then what the
        experiments that are completed come to, and its status is ``running``.

        Raises:
            ValueError: *path* holds no StudyResult, or one of another major schema version.
            OSError: It cannot be read.
        """
        from pytest_llem.results.study_result import load_unfinished  # it stands on this module

        path = Path(path)
        if not path.is_dir():
            return cls.read(path)
        file = path / "study_result.json"
        return cls.read(file) if file.exists() else load_unfinished(path)

    def to_dataframe(self, per: Literal["point", "experiment"] = "point") -> pandas.DataFrame:
        """Return it as a data frame: a row for each point, or for each experiment.

        The columns are those of ``summary.csv`` and of ``experiments.csv``: axes by their dotted keys, metrics by
        their names in the catalogue: of a point the mean, and ``…_sd``, ``…_ci95_low``, ``…_ci95_high``, ``…_n``.
        ``attrs["units"]`` holds each column's unit. NaN means absent, and nothing else.

        Args:
            per: What there is a row for.

        Raises:
            ImportError: pandas is not installed.
            ValueError: *per* is neither.
        """
        from pytest_llem.results.tabular import dataframe  # it stands on this module

        return dataframe(self, per)
