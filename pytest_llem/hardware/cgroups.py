"""What this process's control group holds it to, as a container or a batch system sets it."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

#: Version 1 says "no limit" by a number of pages that no machine has.
_NO_LIMIT = 1 << 60


def files(
    controller: str, newer: str, older: str, proc: Path = PROC, cgroups: Path = CGROUPS, *, above: bool = False
) -> list[Path]:
    """Return where a file of this process's control group, of either version, may be, the likeliest first.

    Args:
        controller: In version 1, such as ``memory``.
        newer: The file's name in version 2.
        older: And in version 1.
        proc: Where procfs is.
        cgroups: Where control groups are.
        above: Those of the groups around it, too.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            roots, name = [cgroups, cgroups / "unified"], newer
        elif controller in controllers.split(","):
            roots, name = [cgroups / controller], older
        else:
            continue
        here = Path(path.lstrip("/"))
        # A container may be told its path on the host, and see its own group at the root.
        places = [here, *here.parents] if above else [here, Path()]
        found += [root / place / name for root in roots for place in places]
    return found


def memory_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return how much memory this process's control group may have, in bytes; None for no limit, or none known."""
    limits = []
    for file in files("memory", "memory.max", "memory.limit_in_bytes", proc, cgroups, above=True):
        text = _text(file)
        if text.isdecimal() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits, default=None)


def cpu_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """Return how many CPUs' time this process's control group may take; None for no limit, or none known."""
    limits = []
    for file in files("cpu", "cpu.max", "cpu.cfs_quota_us", proc, cgroups, above=True):
        quota, _, period = _text(file).partition(" ")
        if not period:
            period = _text(file.with_name("cpu.cfs_period_us"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""


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
