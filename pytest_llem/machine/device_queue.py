"""The queue of the processes of a machine that wait for devices.

Each process that waits has a ticket: a file in the folder of the locks, whose name begins with the monotonic time.
The process holds a lock on its ticket and touches it, so that others notice if it ends or is suspended.
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

#: Time after which a ticket that was not touched is ignored, in s: the process that holds it may be suspended.
MAX_UNTOUCHED_S = 10.0

#: Age from which a ticket of a dead process is removed, in s. Younger ones may be about to be locked.
_MIN_REMOVED_S = 60.0

_PREFIX = "ticket-"


class Ticket(Record):
    """What a process waits for."""

    owner: Owner
    """The process."""
    pool: list[str] = Field(max_length=1000)
    """Devices of which it needs some."""
    count: int = 1
    """Number of devices that it needs."""


@dataclass
class QueuePosition:
    """This process's position in the queue: its ticket's file, which the kernel unlocks when the process ends.

    Example:
        position = QueuePosition.take(folder, Ticket(owner=owner, pool=["GPU-a", "GPU-b"], count=1))
        while any("GPU-a" in ticket.pool for ticket in position.ahead()):  # which may take it
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
        # CLOCK_MONOTONIC is the same in all processes of a machine.
        name = f"{_PREFIX}{time.monotonic_ns():020}-{uuid.uuid4().hex[:8]}"
        temporary = folder / f".{name}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o644)
        os.fchmod(descriptor, 0o644)  # independent of the umask
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, ticket.model_dump_json().encode())
        temporary.rename(folder / name)  # it appears in the queue when it is complete
        return cls(folder / name, descriptor)

    def touch(self) -> None:
        """Show that this process is not suspended."""
        with suppress(OSError):  # a cleaner of temporary files may have removed it
            os.utime(self.path)

    def ahead(self) -> Iterator[Ticket]:
        """Yield the tickets before this one."""
        return waiting_tickets(self.path.parent, before=self.path.name)

    def leave(self) -> None:
        """Leave the queue."""
        with suppress(OSError):
            self.path.unlink()
        # close() alone would not unlock it: a forked process may share the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def waiting_tickets(folder: Path, before: str = "~") -> Iterator[Ticket]:
    """Yield the tickets of processes that wait, in their order.

    Args:
        folder: The folder of the locks.
        before: Name of a ticket; only those before it.
    """
    for name in sorted(_names(folder)):
        if name >= before:
            return
        if (ticket := _read(folder / name)) is not None:
            yield ticket


def is_waited_for(folder: Path, devices: Collection[str]) -> bool:
    """Return whether a process waits for one of *devices*."""
    return any(not set(devices).isdisjoint(ticket.pool) for ticket in waiting_tickets(folder))


def _names(folder: Path) -> Sequence[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(_PREFIX)]  # noqa: PTH208 (often, so fast)
    except OSError:
        return ()


def _read(path: Path) -> Ticket | None:
    """Return a ticket; None if its process has ended or is suspended, or if it is not a valid ticket.

    The ticket of a process that has ended is removed after a minute.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it has just left the queue
        return None
    try:
        age = time.time() - os.fstat(descriptor).st_mtime
        if not _is_locked(descriptor):
            if age > _MIN_REMOVED_S:
                path.unlink()  # its process was killed
            return None
        if age > MAX_UNTOUCHED_S:
            return None
        return Ticket.model_validate(json.loads(os.read(descriptor, MAX_NOTE_BYTES)))
    except (OSError, ValueError, RecursionError):  # any user can write there
        return None
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Return whether a process, which may be this one, holds a lock on a file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that readers do not disturb each other
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
