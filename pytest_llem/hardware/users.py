"""Who uses a GPU at the moment, as far as NVML tells: in a container it may not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pytest_llem.hardware.nvml import Nvml

_CALLS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


@dataclass(frozen=True)
class User:
    """A process that uses a GPU.

    Attributes:
        pid: Its id.
        name: Of its program; None where nobody tells.
        used_bytes: GPU memory that it has; None where that is not known.
    """

    pid: int
    name: str | None
    used_bytes: int | None


def users(nvml: Nvml, handle: Any) -> list[User] | None:
    """Return the processes that use a board; None where it does not tell."""
    found: dict[int, int | None] = {}
    asked = [nvml.ask(call, handle) for call in _CALLS]
    for one in (one for processes in asked for one in processes or ()):
        found[one.pid] = found.get(one.pid) or one.usedGpuMemory
    if all(processes is None for processes in asked):
        return None
    return [User(pid, _name(nvml, pid), used) for pid, used in sorted(found.items())]


def _name(nvml: Nvml, pid: int) -> str | None:
    # NVML's first: here another process may bear the id that one outside of this container has.
    if name := nvml.ask("nvmlSystemGetProcessName", pid):
        return PurePath(name).name
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    return None
