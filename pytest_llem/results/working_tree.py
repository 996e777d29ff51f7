"""The git commit that somebody works on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

#: A working tree on a slow drive takes long to look at, and nobody waits longer for it.
SECONDS = 10.0

#: What is told of each: nothing of branches, remotes or files.
_STATUS = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty", "--no-renames")


def working_tree(directory: Path, seconds: float = SECONDS) -> dict[str, Any] | None:
    """Return the commit that the git working tree around *directory* is at, and whether it differs from that.

    ``GIT_DIR`` and the like hold as for any git command. Nothing is written there.

    Args:
        directory: Somewhere in it.
        seconds: How long git may take.

    Returns:
        ``commit``, null before the first one, and ``dirty``: files that git tracks are not as they were committed.
        None where there is no git, or no working tree.
    """
    # A lock, or a daemon of file system events, would be left in somebody's repository.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "status", *_STATUS]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    lines = done.stdout.decode("ascii", "replace").splitlines()
    found = next((line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")), "")
    commit = found if found and set(found) <= set("0123456789abcdef") else None
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}
