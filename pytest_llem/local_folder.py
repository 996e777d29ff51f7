"""Find a folder for locks of this machine alone: the one for temporary files may be shared by a cluster."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: File systems that several machines share. On some of them locks fail, on others they hold for all machines.
NETWORK = (
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "panfs",
    "pvfs2",
    "smb",
    "sshfs",
    "wekafs",
)

#: Folders to use if the one for temporary files has no locks of this machine alone.
_OTHERS = ("/tmp", "/var/tmp", "/dev/shm")

_MOUNTS = Path("/proc/self/mounts")


def local_folder() -> Path:
    """Return the folder for temporary files, or another one if only that has locks of this machine alone."""
    given = Path(tempfile.gettempdir())
    return next((path for path in (given, *map(Path, _OTHERS)) if lock_problem(path) is None), given)


def lock_problem(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """Return why a folder has no locks of this machine alone; None if it has.

    Args:
        folder: A folder. If it does not exist, that is the reason.
        mounts: File that lists the mounted file systems.
    """
    kind = file_system(folder, mounts)
    if kind is not None and kind.removeprefix("fuse.").startswith(NETWORK):
        return f"is on a network file system ({kind})"
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in (errno.EAGAIN, errno.EACCES) else f"has no locks: {error.strerror}"
    finally:
        os.close(descriptor)
    return None


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the file system that holds *folder*, such as ``nfs4``; None if it is unknown."""
    path = Path(os.path.realpath(folder))
    found = [(mount_point, kind) for mount_point, kind in _mounted(mounts) if path.is_relative_to(mount_point)]
    return max(reversed(found), key=lambda one: len(one[0].parts))[1] if found else None


def _mounted(mounts: Path) -> Iterator[tuple[Path, str]]:
    """Yield mount point and type of each file system; of several at one mount point, the visible one last."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if len(fields) > 2:
            yield Path(fields[1].replace("\\040", " ")), fields[2]
