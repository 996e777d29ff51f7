"""Lock devices for exclusive use: one lock for each GPU, and one for the CPU as a whole.

The locks are files in a folder that all users of the machine share. It is sticky, so that users cannot remove the
locks of others. Beside each lock are notes, one of each user, about its current and last owners. The kernel
releases a lock when the process that holds it ends. Processes that wait are in a queue
(:mod:`~pytest_llem.machine.lock_files`).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.machine.lock_files import (
    DeviceLock,
    FileLock,
    QueuePosition,
    Ticket,
    is_waited_for,
    waiting_tickets,
)
from pytest_llem.machine.owner import Owner, last_owner, locks_folder, shown

#: Name of the CPU as a device.
CPU = "cpu"

#: Time between two attempts to lock devices, in s.
POLL_S = 0.2

#: Maximum number of owners to name.
MAX_NAMED = 5

#: Time that a new owner has to write its note, in s, before it is reported as an unknown process.
MAX_NOTE_DELAY_S = 1.0

#: Returns the devices to take of those that are free; none if they are not enough.
Choose = Callable[[Collection[str]], Sequence[str]]


class DeviceError(Exception):
    """Devices cannot be locked on this machine. The message says why, in one line."""


@dataclass
class Ownership:
    """Devices that this process owns.

    Attributes:
        waited_seconds: Time that it waited for them, in s; 0 if they were free.
        waited_for: The owners that it waited for; None if they were free.
        used_before: GPU memory in use before the previous experiments, in bytes by UUID, if known.
    """

    waited_seconds: float = 0.0
    waited_for: str | None = None
    used_before: dict[str, int] = field(default_factory=dict)
    _locks: dict[str, DeviceLock] = field(default_factory=dict)

    @property
    def devices(self) -> set[str]:
        """Their names."""
        return set(self._locks)

    def hand_over(self, owner: Owner, *, keep: bool = False) -> bool:
        """Make the next experiment of this process the owner, unless another process waits for one of the devices.

        Args:
            owner: The next experiment.
            keep: Hand over even if another process waits: the next experiment uses what this one has started.

        Returns:
            Whether it is the owner now. If not, nothing has changed.
        """
        if not keep and is_waited_for(locks_folder(), self.devices):
            return False
        for lock in self._locks.values():
            lock.hand_over(owner)
        self.waited_seconds, self.waited_for = 0.0, None
        return True

    def note_used(self, used: Mapping[str, int]) -> None:
        """Record the GPU memory in use before an experiment, in bytes by UUID."""
        self.used_before = dict(used)
        for name, amount in used.items():
            if name in self._locks:
                self._locks[name].note(used_bytes=amount)


@contextmanager
def owned(
    devices: Collection[str],
    owner: Owner,
    report: Callable[[str], None],
    *,
    count: int | None = None,
    choose: Choose | None = None,
) -> Iterator[Ownership]:
    """Wait until *devices* are free, or *count* of them, and own these exclusively on this machine.

    Devices are taken all at once, which prevents deadlocks. Processes are served in the order in which they began
    to wait: a device that one of them may take is not free for those behind it. So a process that needs several is
    served, however many need one.

    Args:
        devices: Names of the devices.
        owner: This process.
        report: Called once, if it has to wait, with a text about a device and its owner.
        count: Number of devices to own; None for all.
        choose: Returns the devices to take of those that are free; None for the first ones.

    Raises:
        DeviceError: Devices cannot be locked.

    Example:
        with owned(["GPU-a", "GPU-b"], owner, print, count=1) as ownership:
            assert len(ownership.devices) == 1
    """
    pool = sorted(set(devices))
    number = len(pool) if count is None else count
    folder = _folder()
    with ExitStack() as held:
        waiting = _Waiting(report)
        held.callback(waiting.end)
        while not (taken := _take(folder, pool, number, choose, owner, waiting)):
            waiting.wait(folder, Ticket(owner=owner, pool=pool, count=number))
        waiting.end()
        ownership = Ownership(waiting.seconds(), waiting.text(), _locks=taken)
        for name, lock in taken.items():
            held.callback(lock.release)
            lock.begin()
            if lock.used_before is not None:
                ownership.used_before[name] = lock.used_before
        yield ownership


def _take(
    folder: Path, pool: Sequence[str], number: int, choose: Choose | None, owner: Owner, waiting: _Waiting
) -> dict[str, DeviceLock]:
    """Lock *number* devices of the *pool*, and return their locks; none if they are not free."""
    reserved = {name for ticket in waiting.ahead(folder) for name in ticket.pool}
    usable = [name for name in pool if name not in reserved]
    locks = {name: DeviceLock(folder, name, owner) for name in usable}
    taken: Sequence[str] = ()
    try:
        if len(usable) >= number:
            free = [name for name in usable if locks[name].acquire()]
            if len(free) >= number:
                taken = free[:number] if choose is None else choose(free)
            waiting.busy = [name for name in usable if name not in free]
    except OSError as error:
        raise _refusal(error) from None
    finally:
        for name, lock in locks.items():
            if name not in taken:
                lock.release()
    return {name: locks[name] for name in taken}


def free_devices(devices: Collection[str]) -> set[str]:
    """Return those of *devices* that no process owns now.

    Raises:
        DeviceError: Devices cannot be locked.
    """
    folder = _folder()
    found = set()
    for name in devices:
        lock = FileLock(folder / f"{name}.lock")
        try:
            if lock.acquire():
                found.add(name)
        except OSError as error:
            raise _refusal(error) from None
        finally:
            lock.release()
    return found


def try_locks() -> Path:
    """Check that locks work, and return their folder.

    Raises:
        DeviceError: Devices cannot be locked.
    """
    folder = _folder()
    lock = FileLock(folder / f"try-{os.geteuid()}-{os.getpid()}.lock")
    try:
        lock.acquire()
        lock.path.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(error) from None
    finally:
        lock.release()
    return folder


class _Waiting:
    """The wait of a process: its position in the queue, and the owners that it waits for; one is reported.

    Attributes:
        busy: Devices that were locked at the last attempt.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._is_reported = False
        self._holders: dict[str, None] = {}
        self._position: QueuePosition | None = None
        self._began: float | None = None
        self._ended: float | None = None
        self.busy: Sequence[str] = ()

    def ahead(self, folder: Path) -> list[Ticket]:
        """Return the tickets of the processes that are served before this one."""
        return [*(waiting_tickets(folder) if self._position is None else self._position.ahead())]

    def wait(self, folder: Path, ticket: Ticket) -> None:
        """Take a position in the queue, record who has the devices, and sleep."""
        now = time.monotonic()
        try:
            if self._position is None:
                self._began, self._position = now, QueuePosition.take(folder, ticket)
        except OSError as error:
            raise _refusal(error) from None
        self._position.touch()
        for name in self.busy:
            if (owner := last_owner(folder, name)) is not None and owner.is_running():
                self._holders.setdefault(f"{name}: {owner}")
        for other in self._position.ahead():
            if not self._holders and (wanted := [name for name in other.pool if name in ticket.pool]):
                text = f"pid {other.owner.pid}, which runs study {shown(other.owner.study)}, is next"
                self._holders.setdefault(f"{wanted[0]}: {text}")
        if now - (self._began or now) >= MAX_NOTE_DELAY_S and not self._holders:
            self._holders.setdefault(f"{next(iter(self.busy), ticket.pool[0])}: another process has it")
        if self._holders and not self._is_reported:
            self._is_reported = True
            self._report(f"waiting for {next(iter(self._holders))}")
        time.sleep(POLL_S)

    def end(self) -> None:
        """Leave the queue. May be called again."""
        position, self._position = self._position, None
        if position is not None:
            self._ended = time.monotonic()
            position.leave()

    def seconds(self) -> float:
        """Return how long the process has waited, in s."""
        return 0.0 if self._began is None else (self._ended or time.monotonic()) - self._began

    def text(self) -> str | None:
        """Return the owners that the process waited for; None if it did not wait."""
        if self._began is None:
            return None
        named = list(self._holders) or ["another process"]
        more = [f"{len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
        return "; ".join([*named[:MAX_NAMED], *more])


def _folder() -> Path:
    """Return the folder of the locks, created if it is missing.

    Raises:
        DeviceError: The folder cannot be created, or its path is not a folder.
    """
    try:
        path = locks_folder()
        with suppress(FileExistsError):
            path.mkdir()
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise DeviceError(f"devices cannot be locked: {path} is not a folder; remove it") from None
    except OSError as error:
        raise _refusal(error) from None
    try:
        found = os.fstat(folder)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o1777:
            os.fchmod(folder, 0o1777)
    finally:
        os.close(folder)
    return path


def _refusal(error: OSError) -> DeviceError:
    where = f"{error.filename}: " if error.filename else ""
    return DeviceError(
        f"devices cannot be locked: {where}{error.strerror or error} (set TMPDIR to lock in another folder)"
    )
