"""Commits and their times, from the git repository around a folder."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_llem.times import utc

#: Time limit for ``git status``, in s. It is slow for a working tree on a slow drive.
_STATUS_SECONDS = 10.0

#: Time limit for ``git log``, in s.
_LOG_SECONDS = 30.0

#: Options of ``git status`` that leave out what is not reported: untracked files, submodules' files, renames.
_STATUS = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty", "--no-renames")


def working_tree(directory: Path, seconds: float = _STATUS_SECONDS) -> dict[str, Any] | None:
    """Return the commit of the git working tree around *directory*, and whether tracked files differ from it.

    ``GIT_DIR`` and the like apply as for any git command. Nothing is written to the repository.

    Args:
        directory: A folder in the working tree.
        seconds: Time limit for git, in s.

    Returns:
        ``commit``, null before the first commit, and ``dirty``: whether tracked files differ from it. None if
        git or a working tree is missing, or git took too long.
    """
    # Otherwise git may leave a lock file or a file system monitor in the user's repository.
    options = ("--no-optional-locks", "-c", "core.fsmonitor=false")
    output = _git(directory, *options, "status", *_STATUS, seconds=seconds)
    if output is None:
        return None
    lines = output.splitlines()
    found = next((line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")), "")
    commit = found if found and set(found) <= set("0123456789abcdef") else None
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}


def known_commits(folder: Path, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return time (UTC, ISO 8601) and subject of each commit that the repository has, by id.

    The mapping is empty if there is no git or no repository.

    Args:
        folder: A folder in the repository.
        ids: Full ids of commits. Others are left out.
    """
    wanted = sorted({one for one in ids if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", one)})
    if not wanted:
        return {}
    options = ("--no-walk=unsorted", "--ignore-missing", "--format=%H%x00%ct%x00%s", "--stdin")
    output = _git(folder, "log", *options, seconds=_LOG_SECONDS, stdin="\n".join(wanted)) or ""
    lines = [line.split("\0") for line in output.splitlines()]
    return {line[0]: (utc(float(line[1])), line[2]) for line in lines if len(line) == 3}


def _git(directory: Path, *arguments: str, seconds: float, stdin: str = "") -> str | None:
    """Return the output of a git command that reads *stdin*; None if it failed or took too long."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            input=stdin.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
