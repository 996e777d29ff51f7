"""Lock one device for processes of all users of the machine, and write who owns it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pytest_llem.machine.owner import Owner, last_owner, note_file, read_note


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
