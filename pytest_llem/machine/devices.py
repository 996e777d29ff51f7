"""Lock devices for exclusive use: one lock for each GPU, and one for the CPU as a whole.

The locks are files in a folder that all users of the machine share. It is sticky, so that users cannot remove the
locks of others. Beside each lock are notes, one of each user, about its current or last owner. The kernel releases
a lock when the process that holds it ends.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.hardware.gpus import Gpu, VisibleGpus, gpus_for, is_cpu_build, visible_gpus
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.local_folder import local_folder
from pytest_llem.machine.owner import Owner, read_note
from pytest_llem.machine.shared_lock import SharedLock
from pytest_llem.study.engines import Needs

#: Name of the CPU as a device.
CPU = "cpu"

#: Name of the locks' folder in the folder for temporary files.
FOLDER = "pytest-llem-locks"

#: Time between two attempts to lock a device, in s.
POLL_S = 0.2

#: Longest time for which the first process in the queue is given precedence, in s.
MAX_QUEUE_S = 10.0

#: Maximum number of owners to name.
MAX_NAMED = 5

#: Time that a new owner has to write its note, in s, before it is reported as an unknown process.
MAX_NOTE_DELAY_S = 1.0


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
    _locks: dict[str, _Lock] = field(default_factory=dict)

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
        if not keep and any(lock.is_waited_for() for lock in self._locks.values()):
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


@dataclass(frozen=True)
class Allocation:
    """The devices for an experiment.

    Attributes:
        devices: UUIDs of GPUs, or the CPU. Both for an engine that may use either.
        environment: Environment variables with which CUDA sees exactly these GPUs. Empty if
            ``CUDA_VISIBLE_DEVICES`` selects GPUs that cannot be identified, such as MIG devices: it is then left
            as it is.
        problem: Why the experiment cannot have the GPUs that it needs; None if it can.
    """

    devices: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


def allocate(needs: Needs, python: Path | None) -> Allocation:
    """Return the devices for an experiment: the first visible GPUs of one kind, as many as it needs.

    An engine that states no number gets all visible GPUs. It also gets the CPU if PyTorch has no GPU build here,
    as it may use GPUs by other means.

    Args:
        needs: What its engine states.
        python: The interpreter that it runs in; None for this one.
    """
    torch = package_versions(python).get("torch")
    gpus = gpus_for(torch) if needs.uses_torch else visible_gpus()
    if needs.gpus == 0:
        return Allocation((CPU,), {"CUDA_VISIBLE_DEVICES": ""})
    if needs.gpus is not None and needs.gpus > 1 and (problem := _shortage(needs.gpus, gpus)):
        return Allocation((), problem=problem)
    if not gpus.all:
        return Allocation((CPU,))
    if needs.gpus is None or gpus.is_ambiguous:
        chosen = gpus.all
    else:
        chosen = next(kind for kind in _kinds(gpus) if len(kind) >= needs.gpus)[: needs.gpus]
    cpu = (CPU,) if needs.gpus is None and not needs.uses_torch and is_cpu_build(torch) else ()
    environment = {} if gpus.is_ambiguous else _environment(chosen)
    return Allocation((*cpu, *(gpu.uuid for gpu in chosen)), environment)


def _kinds(gpus: VisibleGpus) -> list[tuple[Gpu, ...]]:
    """Return the GPUs grouped by the name of their model, in the order of the first of each."""
    kinds: dict[str | None, tuple[Gpu, ...]] = {}
    for gpu in gpus.all:
        kinds[gpu.name] = (*kinds.get(gpu.name, ()), gpu)
    return list(kinds.values())


def _shortage(number: int, gpus: VisibleGpus) -> str | None:
    """Return why there are not *number* GPUs of one kind; None if there are."""
    kinds = _kinds(gpus)
    if any(len(kind) >= number for kind in kinds):
        return None
    found = ", ".join(f"{len(kind)} × {kind[0].name or 'GPU'}" for kind in kinds) or "0"
    restricted = "; CUDA_VISIBLE_DEVICES may hide some" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    return f"needs {number} GPUs of one kind, and there are {found}{restricted}"


def _environment(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return the variables with which CUDA sees exactly *gpus*. By number, as some engines refuse UUIDs."""
    entries = [gpu.uuid if gpu.index is None else str(gpu.index) for gpu in gpus]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(entries)}


@contextmanager
def owned(devices: Collection[str], owner: Owner, report: Callable[[str], None]) -> Iterator[Ownership]:
    """Wait until *devices* are free, and own them exclusively on this machine within the context.

    Args:
        devices: Names of the devices. All processes lock them in the same order, which prevents deadlocks.
        owner: This process.
        report: Called once, if it has to wait, with a text about the device and its owner.

    Raises:
        DeviceError: Devices cannot be locked.
    """
    waiting = _Waiting(report)
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
    """Return the current owner of a device, by its note; None if there is none or it is unknown."""
    try:
        note = _last_owner(Path(local_folder(), FOLDER), name)
    except OSError:  # no folder for temporary files
        return None
    return note if note and note.is_running() else None


def note_file(folder: Path, name: str) -> Path:
    """Return the path of this user's note about a device.

    Each user has its own, because in a sticky folder users cannot replace the files of others.
    """
    return folder / f"{name}.{os.geteuid()}.json"


def _last_owner(folder: Path, name: str) -> Owner | None:
    """Return the current or last owner of a device, by its notes; None if there are none."""
    notes = [note for file in folder.glob(f"{name}.*.json") if (note := read_note(file)) is not None]
    return max(notes, key=lambda note: note.since, default=None)


def try_locks() -> Path:
    """Check that locks work, and return their folder.

    Raises:
        DeviceError: Devices cannot be locked.
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
    """Records which owners a process waits for, and reports the first one."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._is_reported = False
        self._holders: dict[str, None] = {}
        self.began: float | None = None

    def wait(self, name: str, holder: Owner | None) -> None:
        """Record that the device *name* is still locked, and sleep."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
        if holder is not None:
            self._holders.setdefault(f"{name}: {holder}")
        elif now - self.began >= MAX_NOTE_DELAY_S and not self._holders:
            self._holders.setdefault(f"{name}: another process has it")
        if self._holders and not self._is_reported:
            self._is_reported = True
            self._report(f"waiting for {next(iter(self._holders))}")
        time.sleep(POLL_S)

    def seconds(self) -> float:
        """Return how long the process has waited, in s."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def text(self) -> str:
        """Return the owners that the process waited for."""
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
            os.utime(self._lock.path)  # or a cleaner of temporary files would remove it as unused
        last = _last_owner(self._folder, self._name)
        self._owner = self._owner.model_copy(update={"since": datetime.now(UTC)})
        self.used_before = last.used_before(self._owner) if last else None
        self.note(used_bytes=self.used_before)

    def _try(self, waited: float) -> bool:
        """Try to lock the device, and return whether this process owns it.

        A process that does not get the lock at once holds the queue's lock, so that it is the next owner. After
        ``MAX_QUEUE_S`` others ignore the queue: the process that holds it may have been stopped.
        """
        try:
            if not self._queue.is_held and waited < MAX_QUEUE_S and not self._queue.acquire():
                return False
            if not self._lock.acquire():
                return False
        except OSError as error:
            raise _refusal(error) from None
        self._queue.release()
        return True

    def is_waited_for(self) -> bool:
        """Return whether another process waits for this device."""
        try:
            is_free = self._queue.acquire()
        except OSError:
            return True
        self._queue.release()
        return not is_free

    def hand_over(self, owner: Owner) -> None:
        """Make another experiment of this process the owner."""
        self._owner = owner.model_copy(update={"used_bytes": self._owner.used_bytes})
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
        """Release the device, and the place in the queue."""
        try:
            if self._lock.is_held:
                self.note(ended=datetime.now(UTC))
        finally:
            self._lock.release()
            self._queue.release()


def _folder() -> Path:
    """Return the folder of the locks, created if it is missing.

    Raises:
        DeviceError: The folder cannot be created, or its path is not a folder.
    """
    try:
        path = Path(local_folder(), FOLDER)
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
