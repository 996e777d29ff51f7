"""Whom the kernel killed because memory ran out."""

from __future__ import annotations

from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def oom_kills(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return how many processes the kernel has killed for memory so far; None where it does not tell.

    Counted is this process's control group, which a container or a batch system limits; the whole machine where
    there is none.

    Args:
        proc: Where procfs is.
        cgroups: Where control groups are.
    """
    for file in (*_files(proc, cgroups), proc / "vmstat"):
        try:
            counts = dict(line.split()[:2] for line in file.read_text().splitlines() if line)
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def _files(proc: Path, cgroups: Path) -> list[Path]:
    """Return the files that count for this process's control group, of either version of control groups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            roots, name = [cgroups, cgroups / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            roots, name = [cgroups / "memory"], "memory.oom_control"
        else:
            continue
        # A container may be told its path on the host, and see its own group at the root.
        files += [root / place / name for root in roots for place in (path.lstrip("/"), "")]
    return files
