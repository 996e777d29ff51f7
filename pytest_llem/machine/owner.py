"""Read the notes about the current and last owners of devices, which are files beside the locks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field

from pytest_llem.local_folder import local_folder
from pytest_llem.results.document import Record

#: Name of the locks' folder, which is in :func:`~pytest_llem.local_folder.local_folder`.
FOLDER = "pytest-llem-locks"

#: Longest age, in s, at which ``used_bytes`` of another process's note is used. It counts from the end of the
#: experiment, or from its start if the note has no end, because the process was killed.
MAX_AGE_S = 60.0
MAX_AGE_WITHOUT_END_S = 86_400.0

#: Maximum length of a name in characters, and of a note in bytes.
MAX_NAME_LENGTH = 200
MAX_NOTE_BYTES = 1 << 16

#: Number of earlier owners in a note.
MAX_EARLIER = 16


class Lease(Record):
    """The time for which an experiment was the owner of a device."""

    study: str
    """Name of the study."""
    experiment: str
    """Id of the experiment."""
    session: str | None = None
    """Unique name of its session of several processes; None for a session of one process."""
    since: AwareDatetime
    """When it became the owner."""
    ended: AwareDatetime | None = None
    """When it released the device; None if it has not, or was killed."""


class Owner(Lease):
    """The current or last owner of a device."""

    pid: int = Field(gt=0, lt=2**31)
    """Pid of the process."""
    began: float
    """Start time of the process, in s since 1970: another process may have its pid by now."""
    worker: str | None = None
    """Name of the pytest-xdist worker; None without xdist."""
    used_bytes: int | None = None
    """GPU memory in use before the experiment, in bytes; None if unknown."""
    earlier: list[Lease] = Field(default_factory=list)
    """Earlier owners of the same user, the latest first."""

    @classmethod
    def of_this_process(
        cls, study: str, experiment: str, worker: str | None = None, session: str | None = None
    ) -> Owner:
        """Return this process as the owner from now on."""
        import psutil

        began = psutil.Process().create_time()
        return cls(
            pid=os.getpid(),
            began=began,
            worker=worker,
            study=study,
            experiment=experiment,
            session=session,
            since=datetime.now(UTC),
        )

    def after(self, previous: Owner | None) -> Owner:
        """Return this owner from now on, with the *previous* one of the same user among the earlier ones."""
        now, earlier = datetime.now(UTC), []
        if previous is not None:
            # A previous owner that was killed has not ended its lease; it had the device until now at most.
            last = previous.model_copy(update={"ended": previous.ended or now})
            earlier = [Lease.model_validate(last, from_attributes=True), *previous.earlier][:MAX_EARLIER]
        return self.model_copy(update={"since": now, "earlier": earlier})

    def leases(self) -> Iterator[Lease]:
        """Yield this lease and the earlier ones. If its process was killed, this lease ends when it began."""
        yield self.model_copy(update={"ended": None if self.is_running() else self.ended or self.since})
        yield from self.earlier

    def __str__(self) -> str:
        worker = f" ({shown(self.worker)})" if self.worker else ""
        since = self.since.astimezone().strftime("%H:%M:%S")
        return (
            f"pid {self.pid}{worker} runs study {shown(self.study)}, "
            f"experiment {shown(self.experiment)} since {since}"
        )

    def is_same_process(self, other: Owner) -> bool:
        """Return whether both owners are the same process."""
        # Start times differ a little, because every process determines the boot time itself.
        return self.pid == other.pid and abs(self.began - other.began) < 2.0

    def is_running(self) -> bool:
        """Return whether the process is alive and has not released the device."""
        import psutil

        try:
            now = self.model_copy(update={"began": psutil.Process(self.pid).create_time()})
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return self.ended is None
        return self.ended is None and self.is_same_process(now)

    def used_before(self, successor: Owner) -> int | None:
        """Return the GPU memory in use before this owner, in bytes; None if unknown or too old for *successor*."""
        if self.is_same_process(successor):
            return self.used_bytes
        until, max_age = (self.ended, MAX_AGE_S) if self.ended else (self.since, MAX_AGE_WITHOUT_END_S)
        return self.used_bytes if 0 <= (successor.since - until).total_seconds() <= max_age else None


def locks_folder() -> Path:
    """Return the path of the locks' folder, which may not exist.

    Raises:
        OSError: There is no folder for temporary files.
    """
    return Path(local_folder(), FOLDER)


def holder(name: str) -> Owner | None:
    """Return the current owner of a device, by its note; None if there is none or it is unknown."""
    try:
        note = last_owner(locks_folder(), name)
    except OSError:  # no folder for temporary files
        return None
    return note if note and note.is_running() else None


def note_file(folder: Path, name: str) -> Path:
    """Return the path of this user's note about a device.

    Each user has its own, because in a sticky folder users cannot replace the files of others.
    """
    return folder / f"{name}.{os.geteuid()}.json"


def last_owner(folder: Path, name: str) -> Owner | None:
    """Return the current or last owner of a device, by its notes; None if there are none."""
    notes = [note for file in folder.glob(f"{name}.*.json") if (note := read_note(file)) is not None]
    return max(notes, key=lambda note: note.since, default=None)


def read_note(note: Path) -> Owner | None:
    """Return the owner in a note; None if the file is not a valid note, since any user can write there."""
    try:
        with os.fdopen(os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return Owner.model_validate(json.loads(file.read(MAX_NOTE_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None


def shown(name: str) -> str:
    """Return a name from a note without control characters, to print it in a terminal."""
    return "".join(one if one.isprintable() else "?" for one in name[:MAX_NAME_LENGTH])
