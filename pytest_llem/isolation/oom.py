"""Whom the kernel killed because memory ran out."""

from __future__ import annotations

from pathlib import Path

from pytest_llem.hardware.cgroups import CGROUPS, PROC, files


def oom_kills(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return how many processes the kernel has killed for memory so far; None where it does not tell.

    Counted is this process's control group, which a container or a batch system limits; the whole machine where
    there is none.

    Args:
        proc: Where procfs is.
        cgroups: Where control groups are.
    """
    for file in (*files("memory", "memory.events", "memory.oom_control", proc, cgroups), proc / "vmstat"):
        try:
            counts = dict(line.split()[:2] for line in file.read_text().splitlines() if line)
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None
