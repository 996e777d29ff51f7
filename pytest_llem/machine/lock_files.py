"""The files in the folder of device locks: a lock of each device with notes of its owners, and a queue.

Processes wait for devices in the order in which they began to wait. Each has a ticket: a file with the monotonic
time in its name. The process holds a lock on the file and touches it regularly, so that others notice if it ends
or is suspended.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from pytest_llem.machine.owner import MAX_NOTE_BYTES, Owner, last_owner, note_file, read_note
from pytest_llem.results.document import Record


class DeviceLock:
    """The lock of one device, and this user's note about its owner.

    Args:
        folder: Folder of the locks.
        name: Name of the device.
        owner: This process.

    Attributes:
        used_before: GPU memory in use before the previous experiment, in bytes; None if unknown, or not yet owned.
    """

    def __init__(self, folder: Path, name: str, owner: Owner) -> None:
        self._lock = FileLock(folder / f"{name}.lock")
        self._name = name
        self._folder = folder
        self._note = note_file(folder, name)
        self._owner = owner
        self._is_owner = False
        self.used_before: int | None = None

    def acquire(self) -> bool:
        """Lock the device if it is free, and return whether this process holds the lock."""
        return self._lock.acquire()

    def begin(self) -> None:
        """Become the owner of the locked device."""
        with suppress(OSError):
            os.utime(self._lock.path)  # or a cleaner of temporary files would remove it as unused
        last = last_owner(self._folder, self._name)
        own = read_note(self._note)
        self._owner = self._owner.after(own)
        self.used_before = last.used_before(self._owner) if last else None
        self._is_owner = True
        self.note(used_bytes=self.used_before)

    def hand_over(self, owner: Owner) -> None:
        """Make another experiment of this process the owner."""
        previous = self._owner.model_copy(update={"ended": datetime.now(UTC)})
        self._owner = owner.after(previous).model_copy(update={"used_bytes": self._owner.used_bytes})
        self.note()

    def note(self, **changes: object) -> None:
        """Change fields of the owner, and write its note."""
        self._owner = self._owner.model_copy(update=changes)
        fresh = self._note.with_suffix(".new")
        with suppress(OSError):  # the lock works without the note
            fresh.unlink(missing_ok=True)
            # O_EXCL and O_NOFOLLOW: another user may have put a file or link there in the meantime.
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), "w") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(self._owner.model_dump_json())
            fresh.replace(self._note)

    def release(self) -> None:
        """Release the device. May be called without owning it."""
        try:
            if self._lock.is_held and self._is_owner:
                self.note(ended=datetime.now(UTC))
        finally:
            self._lock.release()


class FileLock:
    """An exclusive lock on a file. The kernel releases it when the process that holds it ends; the file remains.

    The file may belong to another user and be in a sticky folder. Linux may then refuse to open it with
    ``O_CREAT`` (``fs.protected_regular``), so that flag is used only if the file does not exist.

    Args:
        path: The file. Symbolic links are not followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock if it is free, and return whether this object holds it. This does not wait.

        Raises:
            OSError: The file cannot be opened, or its file system does not support locks.
        """
        while self._descriptor is None:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_file_of(descriptor):
                    self._descriptor = descriptor
            except BlockingIOError:
                return False
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # close() alone would not: a forked process may share the lock
            os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            with suppress(FileNotFoundError):
                return os.open(self.path, flags)
            with suppress(FileExistsError):
                descriptor = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                os.fchmod(descriptor, 0o666)  # independent of the umask
                return descriptor

    def _is_file_of(self, descriptor: int) -> bool:
        """Return whether *path* is still the file that *descriptor* has opened."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        except FileNotFoundError:
            return False


#: Time after which a ticket that was not touched is ignored, in s: its process is probably suspended.
MAX_UNTOUCHED_S = 10.0

_PREFIX = "ticket-"


class Ticket(Record):
    """A process, and the devices that it waits for: any *count* of a *pool*."""

    owner: Owner
    """The process that waits."""
    pool: list[str] = Field(max_length=1000)
    """Names of the devices that it can use."""
    count: int = 1
    """Number of them that it needs."""


@dataclass
class QueuePosition:
    """This process's position in the queue: its ticket's file. The kernel unlocks it when the process ends.

    Example:
        position = QueuePosition.take(folder, Ticket(owner=owner, pool=["GPU-a", "GPU-b"], count=1))
        while any("GPU-a" in ticket.pool for ticket in position.ahead()):  # a process ahead may take GPU-a
            position.touch()
            time.sleep(0.1)
        position.leave()
    """

    path: Path
    _descriptor: int

    @classmethod
    def take(cls, folder: Path, ticket: Ticket) -> QueuePosition:
        """Take the last position in the queue.

        Raises:
            OSError: The file cannot be written.
        """
        # Names sort by time: the monotonic clock is the same in all processes of a machine.
        name = f"{_PREFIX}{time.monotonic_ns():020}-{uuid.uuid4().hex[:8]}"
        temporary = folder / f".{name}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o644)
        os.fchmod(descriptor, 0o644)  # independent of the umask
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, ticket.model_dump_json().encode())
        temporary.rename(folder / name)  # only now visible to others: locked and complete
        return cls(folder / name, descriptor)

    def touch(self) -> None:
        """Show that this process is not suspended."""
        with suppress(OSError):  # the system may have removed it as an old temporary file
            os.utime(self.path)

    def ahead(self) -> Iterator[Ticket]:
        """Yield the tickets before this one."""
        return waiting_tickets(self.path.parent, before=self.path.name)

    def leave(self) -> None:
        """Leave the queue."""
        with suppress(OSError):
            self.path.unlink()
        # close() alone is not enough: a forked child may hold a copy of the descriptor, and with it the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def waiting_tickets(folder: Path, before: str | None = None) -> Iterator[Ticket]:
    """Yield the tickets of waiting processes, the longest wait first.

    Args:
        folder: The folder of the device locks.
        before: File name of the ticket to stop at; None for all tickets.
    """
    for name in sorted(_names(folder)):
        if before is not None and name >= before:
            return
        if (ticket := _read(folder / name)) is not None:
            yield ticket


def is_waited_for(folder: Path, devices: Collection[str]) -> bool:
    """Return whether a process waits for one of *devices*."""
    return any(not set(devices).isdisjoint(ticket.pool) for ticket in waiting_tickets(folder))


def _names(folder: Path) -> Sequence[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(_PREFIX)]  # noqa: PTH208 (called often)
    except OSError:
        return ()


def _read(path: Path) -> Ticket | None:
    """Return a ticket; None if its process has ended or is suspended, or if the file is not a valid ticket.

    The ticket of a process that has ended is removed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # its process has just left the queue
        return None
    try:
        if not _is_locked(descriptor):  # its process was killed
            path.unlink()
            return None
        if time.time() - os.fstat(descriptor).st_mtime > MAX_UNTOUCHED_S:
            return None
        return Ticket.model_validate(json.loads(os.read(descriptor, MAX_NOTE_BYTES)))
    except (OSError, ValueError, RecursionError):  # any user can write to the folder
        return None
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Return whether a process, which may be this one, holds a lock on a file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two readers do not block each other
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
