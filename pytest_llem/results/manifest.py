"""The manifest: what is done, what is running, what is left, true at every moment."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.results.models import ErrorRecord, Manifest, ManifestEntry, StudyStatus


def now() -> str:
    """Return the time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_atomically(path: Path, text: str) -> str:
    """Write *text* so that a reader, or a crash, meets the old file or the new one whole.

    Returns:
        SHA-256 of what was written, in hex.

    Raises:
        OSError: It could not be written; *path* is as it was.
    """
    content = text.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return hashlib.sha256(content).hexdigest()


class ManifestWriter:
    """Keeps ``manifest.json`` in step with the study, one atomic write a transition.

    Args:
        directory: The study's results directory; it exists.
        manifest: The state to start from; written at once.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._entries = {entry.experiment_id: entry for entry in manifest.experiments}
        self._write()

    def entry(self, experiment_id: str) -> ManifestEntry:
        """Return an experiment's entry.

        Raises:
            KeyError: The study has no such experiment.
        """
        return self._entries[experiment_id]

    def running(self, experiment_id: str) -> None:
        """An experiment starts, for the first time or again."""
        entry = self.entry(experiment_id)
        entry.status = "running"
        entry.started_at = now()
        entry.completed_at = entry.error = entry.reason = entry.result_file = entry.result_sha256 = None
        entry.attempt += 1
        self._write()

    def completed(
        self, experiment_id: str, result: str, files: Mapping[str, str], *, worker: str | None, device: str | None
    ) -> None:
        """An experiment has a result: save it, then say so.

        Args:
            experiment_id: Which one.
            result: The ExperimentResult as JSON text.
            files: Further files by suffix (``requests.csv``), text.
            worker: The xdist worker that ran it.
            device: What it ran on.

        Raises:
            OSError: It could not be saved; the entry is unchanged.
        """
        entry = self.entry(experiment_id)
        stem = f"experiments/{entry.config_hash}-c{entry.cycle}"
        (self.directory / "experiments").mkdir(exist_ok=True)
        for suffix, content in files.items():
            write_atomically(self.directory / f"{stem}.{suffix}", content)
        entry.result_sha256 = write_atomically(self.directory / f"{stem}.json", result)
        entry.result_file = f"{stem}.json"
        entry.worker, entry.device = worker, device
        entry.error = None
        entry.status = "completed"
        entry.completed_at = now()
        self._write()

    def failed(self, experiment_id: str, error: ErrorRecord, *, worker: str | None = None) -> None:
        """An experiment has no result, and why."""
        entry = self.entry(experiment_id)
        entry.status = "failed"
        entry.error = error
        entry.worker = worker
        entry.result_file = entry.result_sha256 = None
        entry.completed_at = now()
        self._write()

    def skipped(self, experiment_id: str, reason: str, error: ErrorRecord | None = None) -> None:
        """pytest skipped an experiment; or it failed with *error*, as was expected."""
        entry = self.entry(experiment_id)
        entry.status, entry.reason, entry.error = "skipped", reason, error
        if error is not None:
            entry.completed_at = now()
        self._write()

    def finish(self, status: StudyStatus) -> None:
        """The study ends; an experiment caught running is interrupted."""
        for entry in self.manifest.experiments:
            if entry.status == "running":
                entry.status = "failed"
                entry.error = ErrorRecord(
                    kind="interrupted", type="Interrupted", message="the session ended while it was running"
                )
                entry.completed_at = now()
        self.manifest.status = status
        self.manifest.completed_at = now()
        self._write()

    def _write(self) -> None:
        manifest = self.manifest
        count = Counter(entry.status for entry in manifest.experiments)
        manifest.completed, manifest.failed = count["completed"], count["failed"]
        manifest.skipped = count["skipped"]
        manifest.pending = count["pending"] + count["running"]
        write_atomically(self.directory / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
