"""Who owns which device: a lock for each GPU, and one for the CPU as a whole, that one process holds at a time.

The locks are files in a folder that all users of the machine share: a sticky one, so that nobody can remove the
lock that another holds. Beside each lies a note of each user who has it, or had it. The kernel releases a lock
with the process that held it, however that ended.
"""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.hardware.gpus import VisibleGpus, gpus_for, visible_gpus
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.machine.owner import Owner, read_note
from pytest_llem.machine.shared_lock import SharedLock
from pytest_llem.study.config import ExperimentConfig

#: The CPU as a whole.
CPU = "cpu"

#: Name of the folder, in that for temporary files.
FOLDER = "pytest-llem-locks"

#: Seconds between two tries.
POLL_S = 0.2

#: So many seconds one waits for whoever is the next one.
PATIENCE_S = 10.0

#: Holders that are named.
MAX_NAMED = 5

#: So many seconds whoever has got a device may take to say who he is.
SETTLING_S = 1.0


class DeviceError(Exception):
    """Devices cannot be owned here; the message says why, in a line."""


@dataclass
class Ownership:
    """Devices that this process owns.

    Attributes:
        waited_seconds: How long it took to get them; 0 where they were free.
        waited_for: Who had them meanwhile, or None.
        used_before: GPU memory in use before the experiments before, in bytes by UUID, where it is known.
    """

    waited_seconds: float = 0.0
    waited_for: str | None = None
    used_before: dict[str, int] = field(default_factory=dict)
    _locks: dict[str, _Lock] = field(default_factory=dict)

    @property
    def devices(self) -> set[str]:
        """Their names."""
        return set(self._locks)

    def pass_on(self, owner: Owner) -> bool:
        """Have the next experiment of this process own the devices at once, unless another process waits for one.

        Returns:
            Whether it owns them: where it does not, all is as before.
        """
        if any(lock.is_waited_for() for lock in self._locks.values()):
            return False
        for lock in self._locks.values():
            lock.pass_on(owner)
        self.waited_seconds, self.waited_for = 0.0, None
        return True

    def note_used(self, used: Mapping[str, int]) -> None:
        """Note the memory that GPUs have in use now, before an experiment, in bytes by UUID."""
        self.used_before = dict(used)
        for name, amount in used.items():
            if name in self._locks:
                self._locks[name].note(used_bytes=amount)


def devices_of(config: ExperimentConfig, boards: VisibleGpus) -> tuple[str, ...]:
    """Return the devices that an experiment runs on: UUIDs, or the CPU where there are no *boards* to use."""
    if not boards.all:
        return (CPU,)
    spread = config.pytorch is not None and config.pytorch.device_map is not None
    if config.backend == "pytorch" and boards.first and not spread:
        return (boards.first.uuid,)
    return tuple(board.uuid for board in boards.all)


def possible_devices(config: ExperimentConfig, python: Path | None) -> tuple[str, ...]:
    """Return the devices that an experiment may run on: its engine names them only once it runs.

    Args:
        config: The experiment.
        python: The interpreter that it runs in; None for this one.

    Returns:
        UUIDs of GPUs, or the CPU. Both where the engine is not ours and has no PyTorch for GPUs, which does not
        keep it from using them.
    """
    boards = gpus_for(package_versions(python).get("torch"))
    if config.backend == "pytorch" or boards.all:
        return devices_of(config, boards)
    return (CPU, *(board.uuid for board in visible_gpus().all))


@contextmanager
def owned(devices: Collection[str], owner: Owner, tell: Callable[[str], None]) -> Iterator[Ownership]:
    """Own *devices*, alone on this machine, for as long as the context lasts. Waits until they are free.

    Args:
        devices: Names. All processes take them in the same order, so that none waits for another in a ring.
        owner: This process.
        tell: Called once with for what and for whom it waits, if it does.

    Raises:
        DeviceError: There cannot be locks.
    """
    waiting = _Waiting(tell)
    ownership = Ownership()
    with ExitStack() as held:
        folder = _folder()
        for name in sorted(set(devices)):
            lock = ownership._locks[name] = _Lock(folder, name, owner)
            held.callback(lock.release)
            lock.acquire(waiting)
            if lock.used_before is not None:
                ownership.used_before[name] = lock.used_before
        if waiting.began is not None:
            ownership.waited_seconds = time.monotonic() - waiting.began
            ownership.waited_for = waiting.text()
        yield ownership


def holder(name: str) -> Owner | None:
    """Return who has a device at the moment, as his note says; None where nobody has, or it cannot be told."""
    try:
        note = _last_owner(Path(tempfile.gettempdir(), FOLDER), name)
    except OSError:  # no folder for temporary files
        return None
    return note if note and note.is_running() else None


def note_file(folder: Path, name: str) -> Path:
    """Return where this user notes having a device: in a sticky folder nobody replaces another user's file."""
    return folder / f"{name}.{os.geteuid()}.json"


def _last_owner(folder: Path, name: str) -> Owner | None:
    """Return who has a device, or had it last, as far as notes say."""
    notes = [note for file in folder.glob(f"{name}.*.json") if (note := read_note(file)) is not None]
    return max(notes, key=lambda note: note.since, default=None)


def try_locks() -> Path:
    """Return the folder of the locks, once a lock could be had in it.

    Raises:
        DeviceError: There cannot be locks.
    """
    folder = _folder()
    lock = SharedLock(folder / f"try-{os.geteuid()}-{os.getpid()}.lock")
    try:
        lock.acquire()
        lock.path.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(error) from None
    finally:
        lock.release()
    return folder


class _Waiting:
    """For whom a process waits: told once, and remembered."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told = False
        self._holders: dict[str, None] = {}
        self.began: float | None = None

    def wait(self, name: str, holder: Owner | None) -> None:
        """Note that *name* is still held, and sleep."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
        if holder is not None:
            self._holders.setdefault(f"{name}: {holder}")
        elif now - self.began >= SETTLING_S and not self._holders:
            self._holders.setdefault(f"{name}: another process has it")
        if self._holders and not self._told:
            self._told = True
            self._tell(f"waiting for {next(iter(self._holders))}")
        time.sleep(POLL_S)

    def seconds(self) -> float:
        """Return for how long it has waited."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def text(self) -> str:
        """Return for whom it waited."""
        named = list(self._holders) or ["another process"]
        more = [f"{len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
        return "; ".join([*named[:MAX_NAMED], *more])


class _Lock:
    """The lock of one device."""

    def __init__(self, folder: Path, name: str, owner: Owner) -> None:
        self._lock, self._queue = (SharedLock(folder / f"{name}.{kind}") for kind in ("lock", "queue"))
        self._name = name
        self._folder = folder
        self._note = note_file(folder, name)
        self._owner = owner
        self.used_before: int | None = None

    def acquire(self, waiting: _Waiting) -> None:
        """Wait until the device is free, and own it."""
        while not self._try(waiting.seconds()):
            holder = _last_owner(self._folder, self._name)
            waiting.wait(self._name, holder if holder and holder.is_running() else None)
        with suppress(OSError):
            os.utime(self._lock.path)  # or who cleans up temporary files would take it for a forgotten one
        last = _last_owner(self._folder, self._name)
        self._owner = self._owner.model_copy(update={"since": datetime.now(UTC)})
        self.used_before = last.used_before(self._owner) if last else None
        self.note(used_bytes=self.used_before)

    def _try(self, waited: float) -> bool:
        """Try to own the device. Who does not get it at once is the next one: nobody else comes in between.

        Unless that one takes his time, as a process does that somebody has stopped.
        """
        try:
            if not self._queue.is_held and waited < PATIENCE_S and not self._queue.acquire():
                return False
            if not self._lock.acquire():
                return False
        except OSError as error:
            raise _refusal(error) from None
        self._queue.release()
        return True

    def is_waited_for(self) -> bool:
        """Whether a process is the next one for this device."""
        try:
            is_free = self._queue.acquire()
        except OSError:
            return True
        self._queue.release()
        return not is_free

    def pass_on(self, owner: Owner) -> None:
        """Have another experiment of this process own the device from now on."""
        self._owner = owner.model_copy(update={"used_bytes": self._owner.used_bytes})
        self.note()

    def note(self, **changes: object) -> None:
        """Write down who has the device."""
        self._owner = self._owner.model_copy(update=changes)
        fresh = self._note.with_suffix(".new")
        with suppress(OSError):  # the lock holds all the same
            fresh.unlink(missing_ok=True)
            # What lies there by now is not written through, whoever put it there.
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), "w") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(self._owner.model_dump_json())
            fresh.replace(self._note)

    def release(self) -> None:
        """Give the device back, and the place in the queue."""
        try:
            if self._lock.is_held:
                self.note(ended=datetime.now(UTC))
        finally:
            self._lock.release()
            self._queue.release()


def _folder() -> Path:
    """Return the folder of the locks.

    Raises:
        DeviceError: It cannot be made, or what bears its name is none.
    """
    try:
        path = Path(tempfile.gettempdir(), FOLDER)
        with suppress(FileExistsError):
            path.mkdir()
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise DeviceError(f"devices cannot be locked: {path} is no folder; remove it") from None
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
        f"devices cannot be locked: {where}{error.strerror or error} (TMPDIR says in which folder the locks are)"
    )
