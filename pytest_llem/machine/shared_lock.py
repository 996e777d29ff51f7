"""Provide a lock that processes of all users of a machine share."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class SharedLock:
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
