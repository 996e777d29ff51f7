"""Read the limits of this process's control group, as set by a container or a batch system."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

#: In version 1 "no limit" is a number of bytes that no machine has.
_NO_LIMIT = 1 << 60


def group_files(
    controller: str, v2_name: str, v1_name: str, proc: Path = PROC, cgroups: Path = CGROUPS, *, above: bool = False
) -> list[Path]:
    """Return the possible paths of a file of this process's control group, the most likely first.

    Args:
        controller: Controller in version 1, such as ``memory``.
        v2_name: Name of the file in version 2.
        v1_name: Name of the file in version 1.
        proc: Mount point of procfs.
        cgroups: Mount point of the control groups.
        above: Whether to include the groups above this one.
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
            mounts, name = [cgroups, cgroups / "unified"], v2_name
        elif controller in controllers.split(","):
            mounts, name = [cgroups / controller], v1_name
        else:
            continue
        group = Path(path.lstrip("/"))
        # In a container the path may be that on the host, while its own group is mounted at the root.
        groups = [group, *group.parents] if above else [group, Path()]
        found += [mount / one / name for mount in mounts for one in groups]
    return found


def memory_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the memory limit of this process's control group, in bytes; None if there is none, or unknown."""
    limits = []
    for file in group_files("memory", "memory.max", "memory.limit_in_bytes", proc, cgroups, above=True):
        text = _text(file)
        if text.isdecimal() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits, default=None)


def cpu_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """Return the CPU limit of this process's control group, in CPUs; None if there is none, or unknown."""
    limits = []
    for file in group_files("cpu", "cpu.max", "cpu.cfs_quota_us", proc, cgroups, above=True):
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
    """Return how many processes the kernel's OOM killer has killed so far; None if it is not reported.

    The count is that of this process's control group, or of the whole machine if there is no group.

    Args:
        proc: Mount point of procfs.
        cgroups: Mount point of the control groups.
    """
    for file in (*group_files("memory", "memory.events", "memory.oom_control", proc, cgroups), proc / "vmstat"):
        try:
            counts = dict(line.split()[:2] for line in file.read_text().splitlines() if line)
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None
