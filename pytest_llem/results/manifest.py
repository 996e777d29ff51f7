"""The manifest: which experiments of a study are completed, running and pending, correct at every moment.

``manifest.json`` holds the whole state at one time and ``manifest.journal`` one line for each transition since, so
that a transition costs the same however many experiments there are. Both are valid whenever the process is killed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_llem.results.journal import Journal, Line, read_journal
from pytest_llem.results.liveness import DirectoryLock, boot_id, is_locked
from pytest_llem.results.manifest_records import EntryStatus, ErrorRecord, Manifest, ManifestEntry, StudyStatus
from pytest_llem.times import now

#: File names of the whole state, and of the transitions since it was written.
MANIFEST, JOURNAL = "manifest.json", "manifest.journal"

#: Folder of the experiments' files, and suffix of a result there.
_EXPERIMENTS, _RESULT = "experiments", "json"

#: Limits the size of the journal: the whole manifest is written after this number of transitions per entry.
REFRESH_SHARE = 1 / 64

#: Limits the time that whole writes take, here to 1 %: the whole manifest is also written after this multiple of
#: the time that the last whole write took.
REFRESH_PAUSE = 100


def write_atomically(path: Path, text: str) -> str:
    """Write *text* to *path* so that after a crash the file is either the old one or the new one, complete.

    If *path* is a link, the file that it names is written. Lone surrogates, which UTF-8 cannot hold, are escaped.

    Returns:
        SHA-256 of the written bytes, in hex.

    Raises:
        OSError: The file could not be written; *path* is unchanged.
    """
    content = text.encode(errors="backslashreplace")
    file_path = path.resolve()
    temporary = file_path.with_name(f".{file_path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(file_path)
        _sync_directory(file_path.parent)
    except BaseException as error:
        with suppress(OSError):  # the file system may be read-only by now
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # names the temporary file, or none
            error.filename, error.filename2 = str(path), None
        raise
    return hashlib.sha256(content).hexdigest()


def _sync_directory(directory: Path) -> None:
    """Wait until the names of the files in *directory* would survive a power failure."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_manifest(directory: str | Path) -> Manifest:
    """Return the state of the study whose results are in *directory*, during the run or after it.

    A run whose process was killed since this machine was booted is ``interrupted``, whatever the file says.

    Raises:
        ValueError: The directory or the manifest is missing, invalid, or has another major schema version.
        OSError: The manifest cannot be read.
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
            if not directory.exists():
                raise ValueError(f"{directory}: no such file or folder") from None
            runs = sorted(directory.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
            hint = f"; name a run in it, such as {runs[-1].parent}" if runs else ""
            raise ValueError(f"{directory}: holds no {MANIFEST}, so no results of a study{hint}") from None
        # The writer empties the journal after writing the manifest. If that happened between the two reads,
        # transitions are missing: read again.
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            continue
        if killed or manifest.status != "running" or not _is_abandoned(directory, manifest):
            break
        killed = True  # unless the run ended after the manifest was read: read once more
    places = {entry.experiment_id: at for at, entry in enumerate(manifest.experiments)}
    for entry in newer:
        if entry.experiment_id in places:
            manifest.experiments[places[entry.experiment_id]] = entry
    if killed and manifest.status == "running":
        _interrupt(manifest, "its run was killed while it was running", None)
        manifest.status = "interrupted"
    manifest.recount()
    return manifest


def _is_abandoned(directory: Path, manifest: Manifest) -> bool:
    """Whether the writer of *manifest* has ended; false if it may be running on another machine."""
    return manifest.boot_id is not None and manifest.boot_id == boot_id() and not is_locked(directory)


def _interrupt(manifest: Manifest, message: str, at: str | None) -> None:
    for entry in manifest.experiments:
        if entry.status == "running":
            entry.status = "failed"
            entry.error = ErrorRecord(kind="interrupted", type="Interrupted", message=message)
            entry.completed_at = at


def stored_result(directory: str | Path, entry: ManifestEntry) -> str | None:
    """Return the ExperimentResult of a completed *entry* as JSON text; None if the file is missing or changed.

    A path that is not the experiment's own file is not read: the manifest may come from anyone.
    """
    file = stored_file(directory, entry, _RESULT)
    if file is None:
        return None
    try:
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() == entry.result_sha256:
            return content.decode()
    except (OSError, ValueError):  # ValueError: not text, or an invalid file name
        pass
    return None


def stored_file(directory: str | Path, entry: ManifestEntry, suffix: str) -> Path | None:
    """Return the path of a file of a completed *entry*, which need not exist, by its suffix (``requests.csv``).

    It is None if the manifest names another file than the experiment's own as its result.
    """
    is_own = Path(stem := _stem(entry)).name == stem and entry.result_file == _path(entry, _RESULT)
    return Path(directory, _path(entry, suffix)) if entry.status == "completed" and is_own else None


def _stem(entry: ManifestEntry) -> str:
    return f"{entry.config_hash}-c{entry.cycle}"


def _path(entry: ManifestEntry, suffix: str) -> str:
    """Return the path of a file of *entry*, relative to the manifest."""
    return f"{_EXPERIMENTS}/{_stem(entry)}.{suffix}"


def stored_files(directory: str | Path, entry: ManifestEntry) -> dict[str, str]:
    """Return the further files of a completed *entry*: text by suffix (``requests.csv``)."""
    result = stored_file(directory, entry, _RESULT)
    if result is None:
        return {}
    found = {}
    for file in result.parent.glob(f"{glob.escape(result.stem)}.*"):
        with suppress(OSError, ValueError):  # not written by pytest-llem
            if file != result and file.is_file():
                # Bytes, since reading text would replace the carriage returns in answers.
                found[file.name.removeprefix(f"{result.stem}.")] = file.read_bytes().decode()
    return found


class ManifestWriter:
    """Writes each transition of the study's experiments to the manifest.

    The state in memory is authoritative: a transition that could not be written is written with the next one.

    Args:
        directory: The study's results directory, which exists.
        manifest: The state to start from, which is written at once.

    Raises:
        OSError: The manifest could not be written. Every transition raises it too.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._entries = {entry.experiment_id: entry for entry in manifest.experiments}
        self._file = directory / MANIFEST
        self._journal = Journal(directory / JOURNAL)
        self._unwritten: dict[str, ManifestEntry] = {}
        self._suffixes: dict[str, tuple[str, ...]] = {}  # of the further files of each experiment
        self._transitions = 0  # since the manifest was written whole
        self._refreshed = self._refresh_took = 0.0
        self._lock: DirectoryLock | None = None
        with suppress(OSError):  # without a lock, readers cannot detect that this process has ended
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
        """Record that an experiment starts, for the first time or again."""
        with self._transition(experiment_id, "running") as entry:
            entry.started_at = now()
            entry.completed_at = entry.error = entry.reason = None
            entry.result_file = entry.result_sha256 = None
            entry.replayed_from = entry.replay_mismatch = None
            entry.worker = entry.device = None
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
        """Save an experiment's result, then record that it is completed. Files of an earlier attempt are removed.

        Args:
            experiment_id: Id of the experiment.
            result: The ExperimentResult as JSON text.
            files: Text of further files, by suffix (``requests.csv``).
            worker: The xdist worker that ran it.
            device: The device that it ran on.
            replayed_from: Name of the results directory of a replayed result; None if it was measured.
            replay_mismatch: What has changed since a replayed result was measured.

        Raises:
            OSError: The result could not be saved, and the entry is unchanged; or the manifest could not be
                written.
        """
        found = self.entry(experiment_id)
        (self.directory / _EXPERIMENTS).mkdir(exist_ok=True)
        self._write_files(found, files)
        result_file = _path(found, _RESULT)
        digest = write_atomically(self.directory / result_file, result)
        with self._transition(experiment_id, "completed") as entry:
            entry.result_file, entry.result_sha256 = result_file, digest
            entry.worker, entry.device = worker, device
            entry.replayed_from, entry.replay_mismatch = replayed_from, replay_mismatch
            entry.error = None
            entry.completed_at = now()

    def failed(
        self,
        experiment_id: str,
        error: ErrorRecord,
        files: Mapping[str, str] | None = None,
        *,
        worker: str | None = None,
    ) -> None:
        """Record that an experiment failed with *error*, and save its *files*, text by suffix, if possible."""
        with self._transition(experiment_id, "failed") as entry:
            entry.error = error
            entry.worker = worker
            entry.result_file = entry.result_sha256 = None
            entry.replayed_from = entry.replay_mismatch = None
            entry.completed_at = now()
        with suppress(OSError):  # pytest shows the output too, and a full disk must not hide why it failed
            self._write_files(self.entry(experiment_id), files or {})

    def _write_files(self, entry: ManifestEntry, files: Mapping[str, str]) -> None:
        """Write an experiment's *files*, text by suffix, and remove others of an earlier attempt."""
        if files:
            (self.directory / _EXPERIMENTS).mkdir(exist_ok=True)
        for suffix in set(self._suffixes.get(entry.experiment_id, ())) - files.keys():
            (self.directory / _path(entry, suffix)).unlink(missing_ok=True)
        self._suffixes[entry.experiment_id] = tuple(files)
        for suffix, content in files.items():
            write_atomically(self.directory / _path(entry, suffix), content)

    def skipped(self, experiment_id: str, reason: str, error: ErrorRecord | None = None) -> None:
        """Record that pytest skipped an experiment, or that it failed with *error* as xfail expects."""
        with self._transition(experiment_id, "skipped") as entry:
            entry.reason, entry.error = reason, error
            if error is not None:
                entry.completed_at = now()

    def finish(self, status: StudyStatus) -> None:
        """Record the end of the study and remove the journal. A running experiment fails as interrupted."""
        _interrupt(self.manifest, "the run ended while it was running", now())
        self.manifest.status = status
        self.manifest.completed_at = now()
        self.manifest.recount()
        self._refresh()
        self._journal.remove()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _transition(self, experiment_id: str, status: EntryStatus) -> Iterator[ManifestEntry]:
        """Let the caller change an entry, then update the counters and write the change."""
        entry = self.entry(experiment_id)
        yield entry
        self._count(entry.status, -1)
        entry.status = status
        self._count(status, 1)
        self._unwritten[experiment_id] = entry
        self._transitions += 1
        is_due = self._is_due()
        try:
            self._refresh() if is_due else self._append()
        except OSError:  # the other file may be writable
            self._append() if is_due else self._refresh()

    def _count(self, status: EntryStatus, change: int) -> None:
        counter = "pending" if status == "running" else status
        if counter != "deselected":
            setattr(self.manifest, counter, getattr(self.manifest, counter) + change)

    def _is_due(self) -> bool:
        """Whether the whole manifest is to be written, and not a line of the journal."""
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
        """Write the whole manifest. A failed write is not repeated at each transition, which would take long."""
        begun = time.monotonic()
        self._transitions = 0
        try:
            write_atomically(self._file, self.manifest.model_dump_json(indent=1) + "\n")
        finally:
            self._refreshed = time.monotonic()
            self._refresh_took = self._refreshed - begun
        self._unwritten.clear()
        self._journal.clear()


def runs_of(
    results_dir: Path, name: str, design_hash: str, unreadable: list[str] | None = None
) -> list[tuple[Path, Manifest]]:
    """Return the runs in *results_dir* with the study's name or design: first those of its name, newest first.

    Why a manifest there cannot be read is appended to *unreadable*.
    """
    found = []
    for directory in results_dir.iterdir() if results_dir.is_dir() else ():
        try:
            manifest = read_manifest(directory)
        except (OSError, ValueError) as error:
            if unreadable is not None and (directory / MANIFEST).exists():  # else it is not a results directory
                unreadable.append(str(error))
            continue
        if manifest.study_name == name or manifest.study_design_hash == design_hash:
            found.append((directory, manifest))
    found.sort(key=lambda run: (run[1].study_name == name, run[1].started_at), reverse=True)
    return found
