"""The state of a study's experiments, as the manifest records it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field

from pytest_llem.results.document import Record, RecordFile, Time

ErrorKind = Literal["crash", "timeout", "oom", "exception", "interrupted", "preflight", "partner", "load"]
EntryStatus = Literal["pending", "running", "completed", "failed", "skipped", "deselected"]
StudyStatus = Literal["running", "completed", "interrupted", "aborted"]


class ErrorRecord(Record):
    """Why an experiment failed."""

    kind: ErrorKind
    """Kind of failure. ``partner``: the other side of an interleaved comparison failed; ``load``: the load could
    not be put on the server.
    """
    type: str
    """Name of the exception, of the signal, or of another cause (``Exit``, ``Timeout``, …)."""
    message: str
    """Error message."""
    traceback: str | None = None
    """Traceback in the experiment's process, at a timeout of its threads; null if there is none."""
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
    """State of the experiment. ``skipped``: pytest skipped it, or it failed as xfail expects. A ``deselected``
    experiment does not run.
    """
    result_file: str | None = None
    """Path of the result, relative to the manifest; null until it is written."""
    result_sha256: str | None = None
    """SHA-256 of the result file."""
    error: ErrorRecord | None = None
    """Why the experiment failed; null if it did not."""
    reason: str | None = None
    """Why the experiment was skipped or expected to fail."""
    started_at: Time | None = None
    """Start, UTC, as ISO 8601."""
    completed_at: Time | None = None
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


class Manifest(RecordFile):
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
    started_at: Time
    """Start of the run, UTC, as ISO 8601."""
    completed_at: Time | None = None
    """End of the run, UTC, as ISO 8601; null while it runs."""
    total_experiments: int
    """Number of selected experiments."""
    completed: int = 0
    """Number of completed experiments."""
    failed: int = 0
    """Number of failed experiments."""
    skipped: int = 0
    """Number of skipped experiments."""
    pending: int = 0
    """Number of experiments that have not ended."""
    journal_sequence: int = 0
    """Number of the last line of ``manifest.journal`` that this file includes; higher ones are newer."""
    boot_id: str | None = None
    """Boot of the machine whose process holds a lock on the directory during the run; null without a lock. With
    both, a reader detects that the process was killed.
    """
    resumed_from: list[str] = Field(default_factory=list)
    """Names of the results directories beside this one whose results are replayed."""
    shard: str | None = None
    """Part of the study that was run, ``I/N``; null if it was not divided."""
    merged_from: list[str] = Field(default_factory=list)
    """Names of the results directories that were merged, sorted; empty for a run."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and packages, and what the hook ``pytest_llem_environment`` added."""
    experiments: list[ManifestEntry]
    """All experiments, in run order."""

    def recount(self) -> None:
        """Set the counters from the entries."""
        count = Counter(entry.status for entry in self.experiments)
        self.completed, self.failed, self.skipped = count["completed"], count["failed"], count["skipped"]
        self.pending = count["pending"] + count["running"]
