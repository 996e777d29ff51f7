"""What is written down: the result of an experiment, of a study, and the manifest between them.

Readers accept files of the same major schema version.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_llem.results.metrics import Metric
from pytest_llem.results.statistics import Summary

#: Major.minor. A minor version only adds fields.
SCHEMA_VERSION = "1.1"

ErrorKind = Literal["crash", "timeout", "oom", "exception", "interrupted", "preflight"]
EntryStatus = Literal["pending", "running", "completed", "failed", "skipped", "deselected"]
StudyStatus = Literal["running", "completed", "interrupted", "aborted"]
GapReason = Literal["fixed", "target", "timeout", "skipped"]


class Record(BaseModel):
    """Base of everything that is written."""

    # Fields may be called model_…, which pydantic before 2.10 warns of.
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class Document(Record):
    """A record that is a file of its own, and says by which schema it was written."""

    schema_version: str = SCHEMA_VERSION

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what *file* holds.

        Raises:
            ValueError: It is no such document, or one of another major schema version.
            OSError: It cannot be read.
        """
        content = file.read_bytes()
        try:
            found = cls.model_validate_json(content)
            version, reason = found.schema_version, None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            version, reason = _version(content), f"{where}: {first['msg']}"
        if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
            raise ValueError(f"{file}: schema version {version} cannot be read here (this is {SCHEMA_VERSION})")
        if reason is not None:
            raise ValueError(f"{file}: not a {cls.__name__}: {reason}")
        return found


def _version(content: bytes) -> str:
    """Return the schema version of a document that is not as expected; ours where it says none."""
    try:
        return Document.model_validate_json(content).schema_version
    except ValidationError:
        return SCHEMA_VERSION


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


class Identity(Record):
    """Which experiment a result belongs to.

    Attributes:
        experiment_id: Unique in its study.
        config_hash: Of the resolved configuration.
        study_design_hash: Of the study, null for a lone experiment.
        axes: What distinguishes the point from the study's others: value by dotted key.
        cycle: Which repetition, from 1.
    """

    experiment_id: str
    config_hash: str
    study_design_hash: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)
    cycle: int = 1


class EngineRecord(Record):
    """What ran.

    Attributes:
        name: The engine.
        versions: Of the engine's packages.
        device: ``cpu`` or ``cuda``.
        device_names: Of each device.
        settings: The engine's effective settings, as it reports them after loading.
        model_source: ``builtin``, ``local``, ``model_path`` or ``hub``.
        model_revision: Commit on the hub, where known.
        random_weights: The weights are no trained model's.
    """

    name: str
    versions: dict[str, str] = Field(default_factory=dict)
    device: str
    device_names: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    model_source: str | None = None
    model_revision: str | None = None
    random_weights: bool = False


class TokenRecord(Record):
    """Token accounting of one pass.

    Attributes:
        prompts: Number of prompts.
        input_tokens: Without padding.
        output_tokens: Up to and including each sequence's end.
        truncated_prompts: Prompts cut to ``max_input_tokens``.
        padding_waste: Share of the input positions that hold padding, 0 to 1.
        output_digest: SHA-256 of the first pass's output token ids, null where they are unknown.
    """

    prompts: int
    input_tokens: int
    output_tokens: int
    truncated_prompts: int = 0
    padding_waste: float = 0.0
    output_digest: str | None = None


class WarmupRecord(Record):
    """What ran before the window.

    Attributes:
        runs: Number of batches.
        seconds: How long it took.
        converged: Latencies settled; null where nobody looked.
        cv: Coefficient of variation of the last latencies.
    """

    runs: int
    seconds: float
    converged: bool | None = None
    cv: float | None = None


class BaselineRecord(Record):
    """Power of the idle machine with the model loaded, before warm-up.

    Attributes:
        idle_context_w: In W; null where it was not measured.
        seconds: What the meter covers; null where nothing was measured.
        method: How it was obtained.
        source: What it was read from.
        boundary: What it covers; that of ``energy_j``.
        reason: Why ``idle_context_w`` is null.
    """

    idle_context_w: float | None = None
    seconds: float | None = None
    method: str = "unavailable"
    source: str | None = None
    boundary: str | None = None
    reason: str | None = None


class WindowRecord(Record):
    """The measured window as a whole; metrics are per pass.

    Attributes:
        passes: Whole passes in it.
        window_seconds: Synchronised at both ends.
        window_energy_j: Over the boundary of ``energy_j``.
        energy_seconds: What the meter covers; longer where it waits for a tick.
        tick_seconds: Of the meter's counter, where it moves in ticks.
        quantisation_error: tick / window.
    """

    passes: int
    window_seconds: float
    window_energy_j: float | None = None
    energy_seconds: float | None = None
    tick_seconds: float | None = None
    quantisation_error: float | None = None


class GapRecord(Record):
    """The idle time before an experiment.

    Attributes:
        seconds: How long it was.
        reason: What ended it: the time that was set (``fixed``), GPUs as cool and idle as before the first
            experiment (``target``), or the longest time that is waited for that (``timeout``). ``skipped``: there
            was none.
        note: Why there was none.
    """

    seconds: float
    reason: GapReason
    note: str | None = None


class DeviceEnergy(Record):
    """One device's share of the window's energy, in J over the whole window."""

    device: str
    boundary: str
    energy_j: float | None
    method: str
    source: str | None = None
    reason: str | None = None


class ExperimentResult(Document):
    """One point measured in one cycle.

    ``metrics`` holds every name of :data:`pytest_llem.results.metrics.CATALOGUE`; one that could not be had is
    null with its reason. Totals are per pass over the prompts. ``gap`` is null where no study was run.
    """

    pytest_llem_version: str
    identity: Identity
    effective_config: dict[str, Any]
    metrics: dict[str, Metric]
    devices: list[DeviceEnergy] = Field(default_factory=list)
    window: WindowRecord
    baseline: BaselineRecord | None = None
    warmup: WarmupRecord | None = None
    gap: GapRecord | None = None
    tokens: TokenRecord
    engine: EngineRecord
    environment: dict[str, Any] = Field(default_factory=dict)
    started_at: str
    completed_at: str
    warnings: list[str] = Field(default_factory=list)


class ManifestEntry(Record):
    """One experiment of the manifest.

    ``result_file`` is relative to the manifest; ``reason`` says why it was skipped, or expected to fail;
    ``replayed_from`` names the results directory that its result was taken from, where it was not run again.
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


class Manifest(Document):
    """The checkpoint of a study: valid at every moment.

    While the study runs, ``manifest.journal`` beside it may hold transitions after ``journal_sequence``:
    :func:`pytest_llem.results.manifest.read_manifest` reads both.
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
        metrics: Statistics by metric.
    """

    id: str
    axes: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    metrics: dict[str, Summary]


class StudyResult(Document):
    """The outcome of a study."""

    pytest_llem_version: str
    name: str
    study_design_hash: str
    status: StudyStatus
    summary: StudySummary
    points: list[PointResult]
    experiments: list[ManifestEntry]
    excluded: list[dict[str, Any]] = Field(default_factory=list)
    measurement_protocol: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    result_files: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

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
