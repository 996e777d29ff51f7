"""Queue the processes of a machine that wait for devices, in the order in which they began to wait.

Each waiting process has a ticket: a file in the folder of the device locks, with the monotonic time in its name.
The process holds a lock on the file and touches it regularly, so that others notice if it ends or is suspended.
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
from pathlib import Path

from pydantic import Field

from pytest_llem.machine.owner import MAX_NOTE_BYTES, Owner
from pytest_llem.results.document import Record

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
