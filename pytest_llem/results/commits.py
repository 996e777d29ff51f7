"""Time and subject of commits, from the git repository around a folder."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pytest_llem.times import utc

#: Time limit for git, in s.
_SECONDS = 30


def known_commits(folder: Path, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return time, in ISO 8601 in UTC, and subject of those commits that the repository has.

    Empty if there is no git or no repository.

    Args:
        folder: A folder in the repository.
        ids: Full ids of commits. Others are left out.
    """
    wanted = sorted({one for one in ids if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", one)})
    if not wanted:
        return {}
    try:
        done = subprocess.run(
            ["git", "log", "--no-walk=unsorted", "--ignore-missing", "--format=%H%x00%ct%x00%s", "--stdin"],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            input="\n".join(wanted).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = [line.split("\0") for line in done.stdout.decode("utf-8", "replace").splitlines()]
    return {line[0]: (utc(float(line[1])), line[2]) for line in lines if len(line) == 3}
