"""The files of a study: the manifest while it runs, and its result."""

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
    """Why an experiment failed."""

    kind: ErrorKind
    """Kind of failure."""
    type: str
    """Name of the exception, signal or exit status."""
    message: str
    """Error message."""
    traceback: str | None = None
    """Traceback in the experiment's process; null if it did not raise."""
    phase: str | None = None
    """Phase of the experiment (``loading``, ``warming up``, ``measuring``, …)."""


class ManifestEntry(Record):
    """One experiment of the manifest.

    ``result_file`` is relative to the manifest. ``reason`` says why the experiment was skipped or expected to
    fail. ``replayed_from`` is the name of the results directory of a replayed result, and ``replay_mismatch`` what
    has changed since that was measured, null if nothing has.
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
    """The checkpoint of a study, valid at every moment.

    While the study runs, ``manifest.journal`` beside it may hold transitions after ``journal_sequence``;
    :func:`pytest_llem.results.manifest.read_manifest` reads both. ``resumed_from`` names the results directories
    beside this one whose results are replayed. ``boot_id`` is the boot of the machine whose process holds a lock
    on the directory during the run, null if the directory has no lock: with both, a reader detects that the
    process was killed.
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
        """Set the counters from the entries."""
        count = Counter(entry.status for entry in self.experiments)
        self.completed, self.failed, self.skipped = count["completed"], count["failed"], count["skipped"]
        self.pending = count["pending"] + count["running"]


class StudySummary(Record):
    """Totals of a study."""

    total: int
    """Number of selected experiments."""
    completed: int
    """Number of completed experiments."""
    failed: int
    """Number of failed experiments."""
    replayed: int = 0
    """Number of completed experiments whose result was taken from an earlier run."""
    wall_seconds: float
    """Time from the first start to the last end, in s."""
    energy_j: float | None = None
    """Energy of all measured windows, in J; null if any window has none or boundaries differ."""
    method: str | None = None
    """Weakest method in that sum."""


class PointResult(Record):
    """The result of one point over its cycles."""

    id: str
    """Id of the point, as in the items' ids without the cycle."""
    axes: dict[str, Any]
    """Values of the point's axes, by dotted key."""
    config: dict[str, Any]
    """Resolved configuration."""
    config_hash: str
    """Hash of ``config``."""
    cycles: list[int] = Field(default_factory=list)
    """Numbers of the completed cycles, in order."""
    metrics: dict[str, Summary]
    """Statistics by metric; their ``values`` are in the order of ``cycles``."""
    result_digests: list[str] = Field(default_factory=list)
    """SHA-256 of the result of each of ``cycles``, in their order, which shows whether two points are the same
    measurement. Empty in results of schema 1.3 and older.
    """
    testbed: dict[str, Any] = Field(default_factory=dict)
    """Testbed facts, which must match in a comparison."""
    sut: dict[str, Any] = Field(default_factory=dict)
    """System-under-test facts, which may differ in a comparison."""
    contention: PointContention | None = None
    """Contended cycles; null if no result records contention."""
    verdicts: list[GateVerdict] = Field(default_factory=list)
    """Verdicts of the point's gates."""
    replay_mismatch: str | None = None
    """What has changed since a replayed result was measured, so that no gate judges the point. Null if nothing
    has.
    """


class StudyResult(Document):
    """The result of a study.

    ``comparison`` is null if the study was not compared, ``started_at`` is null in results of versions that did
    not record it, and ``experiments`` is empty in a baseline.

    Example:
        Mean energy per output token of each point, in J::

            result = StudyResult.load("results/my-study_2026-01-31T12-00-00Z")
            for point in result.points:
                print(point.id, point.metrics["energy_per_output_token_j"].mean)
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
        """Return the StudyResult in a ``study_result.json`` or a results directory.

        A run that is in progress or was killed has not written that file: the result is then made of its completed
        experiments, with the status ``running`` or ``interrupted``.

        Args:
            path: The file, or the results directory.

        Raises:
            ValueError: *path* holds no StudyResult, or one of another major schema version.
            OSError: *path* cannot be read.
        """
        from pytest_llem.results.study_result import load_unfinished  # it imports this module

        path = Path(path)
        if not path.is_dir():
            return cls.read(path)
        file = path / "study_result.json"
        return cls.read(file) if file.exists() else load_unfinished(path)

    def to_dataframe(self, per: Literal["point", "experiment"] = "point") -> pandas.DataFrame:
        """Return the result as a data frame, with a row for each point or each experiment.

        The columns are those of ``summary.csv`` or ``experiments.csv``: axes by dotted key, and metrics by their
        names in the catalogue. The row of a point has the mean, ``…_sd``, ``…_ci95_low``, ``…_ci95_high`` and
        ``…_n``. ``attrs["units"]`` holds the unit of each column. NaN always means that there is no value.

        Args:
            per: ``point`` or ``experiment``.

        Raises:
            ImportError: pandas is not installed.
            ValueError: *per* is neither ``point`` nor ``experiment``.
        """
        from pytest_llem.results.tabular import dataframe  # it imports this module

        return dataframe(self, per)
