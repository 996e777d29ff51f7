"""Whether the process that writes a results directory is still there.

It holds a lock on the directory, which the kernel releases with the process, however that ends. A process id would
not do: another process may bear it by now, and a container's means nothing outside. The lock is known to this
kernel alone, so beside it goes the id of the boot.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """Return a random id of this boot of this machine, the same in its containers; None where there is none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


class DirectoryLock:
    """A lock on a directory, held until :meth:`release` or the end of the process.

    Raises:
        OSError: The file system has no locks, or somebody else holds it.
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
        """Release it, if it is held."""
        self._release()


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a process forked meanwhile has the descriptor too
    os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a process of this machine holds the lock on *directory*; true where that cannot be found out."""
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
