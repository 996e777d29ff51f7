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

ErrorKind = Literal["crash", "timeout", "oom", "exception", "interrupted", "preflight", "partner"]
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
    """One experiment of the manifest."""

    experiment_id: str
    """Id of the experiment, unique in its study."""
    config_hash: str
    """Hash of the resolved configuration, which names the result file."""
    config_summary: str
    """Id of the point."""
    cycle: int
    """Number of the cycle, from 1."""
    status: EntryStatus = "pending"
    """State of the experiment. ``skipped`` and ``deselected`` experiments do not run."""
    result_file: str | None = None
    """Path of the result, relative to the manifest; null until it is written."""
    result_sha256: str | None = None
    """SHA-256 of the result file."""
    error: ErrorRecord | None = None
    """Why the experiment failed; null if it did not."""
    reason: str | None = None
    """Why the experiment was skipped or expected to fail."""
    started_at: str | None = None
    """Start, UTC, as ISO 8601."""
    completed_at: str | None = None
    """End, UTC, as ISO 8601."""
    attempt: int = 0
    """Number of the attempt, from 1; 0 before the first one."""
    worker: str | None = None
    """Name of the xdist worker; null without xdist."""
    device: str | None = None
    """Names of the devices that the experiment used."""
    replayed_from: str | None = None
    """Name of the results directory that a replayed result is from; null if the experiment ran."""
    replay_mismatch: str | None = None
    """What has changed since a replayed result was measured; null if nothing has."""


class Manifest(Document):
    """The checkpoint of a study, valid at every moment.

    :func:`pytest_llem.results.manifest.read_manifest` also reads the journal beside it.
    """

    study_name: str
    """Name of the study."""
    study_design_hash: str
    """Hash over the points; the same for the same study on every machine."""
    pytest_llem_version: str
    """Version of pytest-llem that runs the study."""
    status: StudyStatus = "running"
    """State of the run. A killed run keeps ``running``; readers on the same machine report it as
    ``interrupted``.
    """
    started_at: str
    """Start of the run, UTC, as ISO 8601."""
    completed_at: str | None = None
    """End of the run, UTC, as ISO 8601; null while it runs."""
    total_experiments: int
    """Number of experiments of the study."""
    completed: int = 0
    """Number of completed experiments."""
    failed: int = 0
    """Number of failed experiments."""
    skipped: int = 0
    """Number of skipped experiments."""
    pending: int = 0
    """Number of experiments that have not ended."""
    journal_sequence: int = 0
    """Number of transitions that this file holds; ``manifest.journal`` has later ones."""
    boot_id: str | None = None
    """Boot of the machine whose process holds a lock on the directory during the run; null without a lock. With
    both, a reader detects that the process was killed.
    """
    resumed_from: list[str] = Field(default_factory=list)
    """Names of the results directories beside this one whose results are replayed."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and packages, and what the hook ``pytest_llem_environment`` added."""
    experiments: list[ManifestEntry]
    """All experiments, in run order."""

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


class CycleTurns(Record):
    """The turns of a cycle that was interleaved with the other side of a comparison, pass by pass."""

    cycle: int
    """Number of the cycle."""
    pair: str
    """Id of the cycle and its counterpart on the other side."""
    metrics: dict[str, list[float]]
    """Values of a metric over each turn alone, by metric; without metrics that a turn has no value of."""


class PointResult(Record):
    """The result of one point over its cycles."""

    id: str
    """Id of the point, as in the items' ids without the cycle."""
    axes: dict[str, Any]
    """Values of the point's axes, by dotted key."""
    config: dict[str, Any]
    """Resolved configuration; once there are results, their ``effective_config``."""
    config_hash: str
    """Hash of the configuration."""
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
    turns: list[CycleTurns] = Field(default_factory=list)
    """Turns of those cycles that were measured alternately, in order."""
    verdicts: list[GateVerdict] = Field(default_factory=list)
    """Verdicts of the point's gates."""
    replay_mismatch: str | None = None
    """What has changed since a replayed result was measured, so that no gate judges the point. Null if nothing
    has.
    """


class TokenAgreement(Record):
    """How far the greedy outputs of two engines agree for the same prompts, model and settings."""

    point: str
    """Id of a point."""
    reference: str
    """Id of the point of the study's first engine that it is compared with."""
    share: float
    """Tokens before the first difference of each request ÷ tokens, 0 to 1."""
    requests: int
    """Number of compared requests, of the first pass of the first cycle."""
    tokens: int
    """Number of their tokens."""


class StudyResult(Document):
    """The result of a study.

    Example:
        Mean energy per output token of each point, in J::

            result = StudyResult.load("results/my-study_2026-01-31T12-00-00Z")
            for point in result.points:
                print(point.id, point.metrics["energy_per_output_token_j"].mean)
    """

    pytest_llem_version: str
    """Version of pytest-llem that wrote the file."""
    name: str
    """Name of the study."""
    study_design_hash: str
    """Hash over the points; the same for the same study on every machine."""
    status: StudyStatus
    """State of the run."""
    started_at: str | None = None
    """Start of the run, UTC, as ISO 8601; null in results of versions that did not record it."""
    summary: StudySummary
    """Totals."""
    points: list[PointResult]
    """All points with their statistics, in the study's order."""
    token_agreement: list[TokenAgreement] = Field(default_factory=list)
    """Agreement of the greedy outputs of several engines."""
    comparison: ComparisonRecord | None = None
    """Comparison with a reference; null if the study was not compared."""
    experiments: list[ManifestEntry] = Field(default_factory=list)
    """All experiments, in run order; empty in a baseline."""
    excluded: list[dict[str, Any]] = Field(default_factory=list)
    """Combinations of the sweep that were left out: ``config`` and ``reason`` of each."""
    measurement_protocol: dict[str, Any] = Field(default_factory=dict)
    """Settings that all points share: isolation, start method, cycles, order, gaps and ``gates``."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and packages, and what the hook ``pytest_llem_environment`` added."""
    result_files: list[str] = Field(default_factory=list)
    """Paths of the results of experiments, relative to this file."""
    warnings: list[StudyWarning] = Field(default_factory=list)
    """What may be wrong with the values, the worst first, each with the experiments that it concerns."""

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
