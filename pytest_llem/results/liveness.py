"""Detection of whether the process that writes a results directory is still running.

The process holds a lock on the directory, which the kernel releases when the process ends for whatever reason. A
process id would not do: another process may have it by now, and a container's id means nothing outside of it. Only
this kernel knows the lock, so the manifest also holds the id of the boot.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """Return the random id of this boot of the machine, the same in its containers; None if it cannot be read."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


class DirectoryLock:
    """A lock on a directory, held until :meth:`release`, or until this object or the process ends.

    Raises:
        OSError: The file system has no locks, or another process holds the lock.
    """

    def __init__(self, directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        self._release = weakref.finalize(self, _unlock, descriptor)

    def release(self) -> None:
        """Release the lock if it is held."""
        self._release()


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile may hold the descriptor open
    os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a process of this machine holds the lock on *directory*; true if that cannot be determined."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
