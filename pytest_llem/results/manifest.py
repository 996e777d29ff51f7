"""The manifest: what is done, what is running, what is left, true at every moment.

``manifest.json`` is the whole state at one time, ``manifest.journal`` what has happened since, a line each: so a
transition costs the same however many experiments there are. Either is valid whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.results.journal import Journal, Line, read_journal
from pytest_llem.results.liveness import DirectoryLock, boot_id, is_locked
from pytest_llem.results.models import EntryStatus, ErrorRecord, Manifest, ManifestEntry, StudyStatus

#: The state as a whole, and what has happened since.
MANIFEST, JOURNAL = "manifest.json", "manifest.journal"

#: The manifest is written whole after so many transitions for each of its entries, …
REFRESH_SHARE = 1 / 64

#: … or when the last time it was is so many times as long ago as it took.
REFRESH_PAUSE = 100


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
        _sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):  # on a file system that is read-only by now
            temporary.unlink(missing_ok=True)
        raise
    return hashlib.sha256(content).hexdigest()


def _sync_directory(directory: Path) -> None:
    """Have a file's new name survive a power failure."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_manifest(directory: str | Path) -> Manifest:
    """Return the state of the study whose results are in *directory*, while it runs or whenever it ended.

    A run whose process was killed since this machine was booted is ``interrupted``, whatever the file says.

    Raises:
        ValueError: There is no manifest, or what is there is none, or of another major schema version.
        OSError: It cannot be read.
    """
    directory = Path(directory)
    file = directory / MANIFEST
    killed = False
    while True:
        try:
            before = file.stat()
            manifest = Manifest.read(file)
            newer = list(read_journal(directory / JOURNAL, manifest.journal_sequence))
            after = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{directory}: holds no {MANIFEST}, so no results of a study") from None
        # The journal is emptied once the manifest holds it: one read before and the other after lack something.
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            continue
        if killed or manifest.status != "running" or not _is_abandoned(directory, manifest):
            break
        killed = True  # unless it has come to its end since it was read
    places = {entry.experiment_id: at for at, entry in enumerate(manifest.experiments)}
    for entry in newer:
        if entry.experiment_id in places:
            manifest.experiments[places[entry.experiment_id]] = entry
    if killed and manifest.status == "running":
        _interrupt(manifest, "its session was killed while it was running", None)
        manifest.status = "interrupted"
    manifest.recount()
    return manifest


def _is_abandoned(directory: Path, manifest: Manifest) -> bool:
    """Whether nobody writes *manifest* any more; false where the writer may be on another machine."""
    return manifest.boot_id is not None and manifest.boot_id == boot_id() and not is_locked(directory)


def _interrupt(manifest: Manifest, message: str, at: str | None) -> None:
    for entry in manifest.experiments:
        if entry.status == "running":
            entry.status = "failed"
            entry.error = ErrorRecord(kind="interrupted", type="Interrupted", message=message)
            entry.completed_at = at


def stored_result(directory: str | Path, entry: ManifestEntry) -> str | None:
    """Return the ExperimentResult of a completed *entry* as JSON text; None where it is not there whole.

    What the entry names is read only where it is the experiment's own file: a manifest may be anybody's.
    """
    if entry.status != "completed" or entry.result_file is None or entry.result_file != _result_file(entry):
        return None
    file = Path(directory) / entry.result_file
    try:
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() == entry.result_sha256:
            return content.decode()
    except (OSError, ValueError):  # no text, or no name of a file
        pass
    return None


def _result_file(entry: ManifestEntry) -> str | None:
    """Return where the result of *entry* belongs, relative to the manifest; None where that is no place for it."""
    stem = f"{entry.config_hash}-c{entry.cycle}"
    return f"experiments/{stem}.json" if Path(stem).name == stem else None


def stored_files(directory: str | Path, entry: ManifestEntry) -> dict[str, str]:
    """Return what lies beside the result of a completed *entry*: text by suffix (``requests.csv``)."""
    if entry.result_file is None:
        return {}
    result = Path(directory) / entry.result_file
    found = {}
    for file in result.parent.glob(f"{result.stem}.*"):
        with suppress(OSError, ValueError):  # not ours
            if file != result and file.is_file():
                found[file.name.removeprefix(f"{result.stem}.")] = file.read_text(encoding="utf-8")
    return found


class ManifestWriter:
    """Keeps the manifest in step with the study.

    The truth is in memory: what could not be written is written with the next transition that can be.

    Args:
        directory: The study's results directory; it exists.
        manifest: The state to start from; written at once.

    Raises:
        OSError: It could not be written. So with every transition.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._entries = {entry.experiment_id: entry for entry in manifest.experiments}
        self._file = directory / MANIFEST
        self._journal = Journal(directory / JOURNAL)
        self._unwritten: dict[str, ManifestEntry] = {}
        self._transitions = 0  # since the manifest was written whole
        self._refreshed = self._refresh_took = 0.0
        self._lock: DirectoryLock | None = None
        with suppress(OSError):  # without a lock nobody can tell whether this process is still there
            self._lock = DirectoryLock(directory)
            manifest.boot_id = boot_id()
        manifest.recount()
        self._refresh()

    def entry(self, experiment_id: str) -> ManifestEntry:
        """Return an experiment's entry.

        Raises:
            KeyError: The study has no such experiment.
        """
        return self._entries[experiment_id]

    def running(self, experiment_id: str) -> None:
        """An experiment starts, for the first time or again."""
        with self._transition(experiment_id, "running") as entry:
            entry.started_at = now()
            entry.completed_at = entry.error = entry.reason = None
            entry.result_file = entry.result_sha256 = None
            entry.replayed_from = entry.replay_mismatch = None
            entry.attempt += 1

    def completed(
        self,
        experiment_id: str,
        result: str,
        files: Mapping[str, str],
        *,
        worker: str | None = None,
        device: str | None = None,
        replayed_from: str | None = None,
        replay_mismatch: str | None = None,
    ) -> None:
        """An experiment has a result: save it, then say so.

        Args:
            experiment_id: Which one.
            result: The ExperimentResult as JSON text.
            files: Further files by suffix (``requests.csv``), text.
            worker: The xdist worker that ran it.
            device: What it ran on.
            replayed_from: Name of the results directory that it was taken from, where it was not run.
            replay_mismatch: What has changed since it was measured, where it was not run.

        Raises:
            OSError: It could not be saved, and the entry is unchanged; or that could not be written down.
        """
        found = self.entry(experiment_id)
        stem = f"experiments/{found.config_hash}-c{found.cycle}"
        (self.directory / "experiments").mkdir(exist_ok=True)
        for suffix, content in files.items():
            write_atomically(self.directory / f"{stem}.{suffix}", content)
        digest = write_atomically(self.directory / f"{stem}.json", result)
        with self._transition(experiment_id, "completed") as entry:
            entry.result_file, entry.result_sha256 = f"{stem}.json", digest
            entry.worker, entry.device = worker, device
            entry.replayed_from, entry.replay_mismatch = replayed_from, replay_mismatch
            entry.error = None
            entry.completed_at = now()

    def failed(self, experiment_id: str, error: ErrorRecord, *, worker: str | None = None) -> None:
        """An experiment has no result, and why."""
        with self._transition(experiment_id, "failed") as entry:
            entry.error = error
            entry.worker = worker
            entry.result_file = entry.result_sha256 = None
            entry.replayed_from = entry.replay_mismatch = None
            entry.completed_at = now()

    def skipped(self, experiment_id: str, reason: str, error: ErrorRecord | None = None) -> None:
        """pytest skipped an experiment; or it failed with *error*, as was expected."""
        with self._transition(experiment_id, "skipped") as entry:
            entry.reason, entry.error = reason, error
            if error is not None:
                entry.completed_at = now()

    def finish(self, status: StudyStatus) -> None:
        """The study ends; an experiment caught running is interrupted. No journal is left."""
        _interrupt(self.manifest, "the session ended while it was running", now())
        self.manifest.status = status
        self.manifest.completed_at = now()
        self.manifest.recount()
        self._refresh()
        self._journal.remove()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _transition(self, experiment_id: str, status: EntryStatus) -> Iterator[ManifestEntry]:
        """Let the caller change an entry, then count it and write it down."""
        entry = self.entry(experiment_id)
        yield entry
        self._count(entry.status, -1)
        entry.status = status
        self._count(status, 1)
        self._unwritten[experiment_id] = entry
        self._transitions += 1
        one, other = (self._refresh, self._append) if self._is_due() else (self._append, self._refresh)
        try:
            one()
        except OSError:
            other()

    def _count(self, status: EntryStatus, change: int) -> None:
        counter = "pending" if status == "running" else status
        if counter != "deselected":
            setattr(self.manifest, counter, getattr(self.manifest, counter) + change)

    def _is_due(self) -> bool:
        return (
            self._transitions >= len(self._entries) * REFRESH_SHARE
            or time.monotonic() - self._refreshed >= self._refresh_took * REFRESH_PAUSE
            or not self._file.is_file()
        )

    def _append(self) -> None:
        lines = []
        for entry in self._unwritten.values():
            self.manifest.journal_sequence += 1
            lines.append(Line(sequence=self.manifest.journal_sequence, entry=entry))
        self._journal.append(lines, durable=any(line.entry.completed_at for line in lines))
        self._unwritten.clear()

    def _refresh(self) -> None:
        """Write the manifest whole. What fails is not tried again at every transition, or each would take long."""
        begun = time.monotonic()
        self._transitions = 0
        try:
            write_atomically(self._file, self.manifest.model_dump_json(indent=1) + "\n")
        finally:
            self._refreshed = time.monotonic()
            self._refresh_took = self._refreshed - begun
        self._unwritten.clear()
        self._journal.clear()


def runs_of(results_dir: Path, name: str, design_hash: str) -> list[tuple[Path, Manifest]]:
    """Return the runs that are there of a study's name or design: those of its name first, the newest first."""
    found = []
    for directory in results_dir.iterdir() if results_dir.is_dir() else ():
        try:
            manifest = read_manifest(directory)
        except (OSError, ValueError):  # something else, which may well be there
            continue
        if manifest.study_name == name or manifest.study_design_hash == design_hash:
            found.append((directory, manifest))
    found.sort(key=lambda run: (run[1].study_name == name, run[1].started_at), reverse=True)
    return found
