"""Read from the driver, after a window, which processes used the GPUs during it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

from pytest_llem.hardware.gpus import GpuProcess, gpu_processes
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import busy_share
from pytest_llem.results.contention import GpuContention
from pytest_llem.results.statistics import total_of


def gpu_activity(
    nvml: Nvml, gpus: Sequence[str], own: Collection[int], span: tuple[float, float]
) -> list[GpuContention]:
    """Return the use of each GPU during a window.

    Other processes are known only if the driver lists one of the experiment's: in a container it may list pids of
    the host, or none.

    Args:
        nvml: An open NVML.
        gpus: UUIDs of the GPUs.
        own: Pids of the experiment's processes.
        span: Start and end of the window on the system's clock, in s since 1970.
    """
    return [_activity_of(nvml, uuid, own, span) for uuid in gpus]


def join_gpu_activity(parts: Sequence[GpuContention]) -> GpuContention:
    """Return the use of one GPU over several windows, as of one window; shares are means."""
    memory = [one.others_memory_mb for one in parts if one.others_memory_mb is not None]

    def mean(shares: Sequence[float | None]) -> float | None:
        total = total_of(shares)
        return None if total is None else total / len(shares)

    return GpuContention(
        device=parts[0].device,
        busy_share=mean([one.busy_share for one in parts]),
        others_share=mean([one.others_share for one in parts]),
        others_memory_mb=max(memory, default=None),
        others=list(dict.fromkeys(chain.from_iterable(one.others for one in parts))),
    )


def _activity_of(nvml: Nvml, uuid: str, own: Collection[int], span: tuple[float, float]) -> GpuContention:
    handle = nvml.ask("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return GpuContention(device=uuid)
    since = int(span[0] * 1e6)
    used = {one.pid: one.smUtil / 100 for one in nvml.ask("nvmlDeviceGetProcessUtilization", handle, since) or ()}
    with_memory = {one.pid: one for one in gpu_processes(nvml, handle) or ()}
    others = {pid: share for pid, share in used.items() if pid not in own}
    others_share = sum(others.values()) if len(others) < len(used) else None
    others_with_memory = [one for pid, one in with_memory.items() if pid not in own]
    if others_with_memory and not others_share:
        others_share = None  # the driver's samples do not show a process that rarely computes
    known = bool((used.keys() | with_memory.keys()) & set(own))
    return GpuContention(
        device=uuid,
        busy_share=busy_share(nvml, handle, *span),
        others_share=others_share,
        others_memory_mb=_memory_mb(others_with_memory) if len(others_with_memory) < len(with_memory) else None,
        others=[
            _label(with_memory.get(pid), pid)
            for pid in sorted({*others, *(one.pid for one in others_with_memory)})
        ]
        if known
        else [],
    )


def _memory_mb(others: Sequence[GpuProcess]) -> float | None:
    amounts = [one.used_bytes for one in others]
    return None if None in amounts else sum(amount for amount in amounts if amount is not None) / 1e6


def _label(process: GpuProcess | None, pid: int) -> str:
    return f"{process.name if process and process.name else 'unknown'} ({pid})"
