"""The GPUs of this host: what they are, and which of them CUDA may use. No CUDA context is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pytest_llem.hardware.nvml import Nvml


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML knows it. What it does not tell is None.

    Attributes:
        uuid: Its identity.
        name: Its model.
        memory_bytes: All of its memory.
        capability: CUDA compute capability.
        driver: Version of the driver.
        power_limit_w: In W, as it is enforced.
        persistence_mode: The driver stays loaded while nobody uses it.
    """

    uuid: str
    name: str | None = None
    memory_bytes: int | None = None
    capability: tuple[int, int] | None = None
    driver: str | None = None
    power_limit_w: float | None = None
    persistence_mode: bool | None = None


@dataclass(frozen=True)
class VisibleGpus:
    """GPUs of this host.

    Attributes:
        all: The boards.
        first: The one that CUDA counts as its first; None where that is not known.
        is_ambiguous: CUDA_VISIBLE_DEVICES leaves some of them, and it is not known which.
    """

    all: tuple[Gpu, ...] = ()
    first: Gpu | None = None
    is_ambiguous: bool = False


def visible_gpus() -> VisibleGpus:
    """Return the boards that CUDA may use, in its order where that is known; none where there is no NVML."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return VisibleGpus()
    with Nvml() as nvml:
        handles = visible_handles(nvml)
        boards = tuple(read_gpu(nvml, uuid, handle) for uuid, handle in handles.by_uuid.items())
    first = next((one for one in boards if one.uuid == handles.first), None)
    return VisibleGpus(boards, first, handles.is_ambiguous)


def gpus_for(torch: str | None) -> VisibleGpus:
    """Return the boards that a PyTorch would use: none where it runs on the CPU. It is not imported for that.

    Args:
        torch: Its version, which tells a build for CPUs alone; None for no torch.
    """
    return VisibleGpus() if is_cpu_build(torch) else visible_gpus()


def is_cpu_build(torch: str | None) -> bool:
    """Return whether a PyTorch of that version is built for CPUs alone, or there is none."""
    return torch is None or torch.partition("+")[2].startswith("cpu")


@dataclass(frozen=True)
class Handles:
    """NVML's handles of the boards that CUDA may use.

    Attributes:
        by_uuid: Those that answer, by UUID.
        first: The UUID of CUDA's first, where it is known.
        lost: Names of those that do not answer, as :func:`all_handles` has them.
        is_ambiguous: CUDA_VISIBLE_DEVICES leaves some of them, and it is not known which.
    """

    by_uuid: dict[str, Any]
    first: str | None
    lost: frozenset[str] = frozenset()
    is_ambiguous: bool = False


def all_handles(nvml: Nvml) -> dict[str, Any]:
    """Return all boards as *nvml* hands them out, by UUID and in its order.

    One that does not answer keeps its place all the same, as None under a name that is none.
    """
    handles: dict[str, Any] = {}
    for index in range(nvml.ask("nvmlDeviceGetCount") or 0):
        handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
        uuid = nvml.ask("nvmlDeviceGetUUID", handle) if handle is not None else None
        handles[uuid or f"lost {index}"] = handle if uuid else None
    return handles


def visible_handles(nvml: Nvml) -> Handles:
    """Return the boards that CUDA may use as *nvml* hands them out."""
    handles = all_handles(nvml)
    names = {nvml.ask("nvmlDeviceGetName", one) if one is not None else None for one in handles.values()}
    counted = len(names) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids, ordered = cuda_order(list(handles), visible, counted=counted)
    by_uuid = {uuid: handles[uuid] for uuid in uuids if handles[uuid] is not None}
    first = uuids[0] if ordered and uuids and uuids[0] in by_uuid else None
    is_ambiguous = visible is not None and not ordered
    return Handles(by_uuid, first, frozenset(uuids) - by_uuid.keys(), is_ambiguous)


def cuda_order(uuids: Sequence[str], visible: str | None, *, counted: bool = True) -> tuple[list[str], bool]:
    """Return which of the boards CUDA may use, and whether they are in its order.

    Args:
        uuids: All boards in NVML's order, which is that of the bus.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
        counted: CUDA counts them in that order too. It may put the fastest first, and on a host of different
            boards an index then tells nothing: all are meant.
    """
    if visible is None:
        return list(uuids), counted
    found: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        if entry.startswith("MIG-") or (entry.isdecimal() and int(entry) < len(uuids) and not counted):
            return list(uuids), False
        if len(named := _named(entry, uuids)) != 1:
            break  # CUDA, too, takes only those before the first entry that names none
        found += [uuid for uuid in named if uuid not in found]
    return found, True


def unknown_entry(uuids: Sequence[str], visible: str) -> str | None:
    """Return the first entry of *visible*, a CUDA_VISIBLE_DEVICES, that names no board; None where all do.

    An empty one, or ``-1``, hides all boards and is meant to.
    """
    entries = [entry.strip() for entry in visible.split(",")]
    hidden = next((place for place, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    known = (entry for entry in entries[:hidden] if not entry.startswith("MIG-"))
    return next((entry for entry in known if len(_named(entry, uuids)) != 1), None)


def _named(entry: str, uuids: Sequence[str]) -> list[str]:
    """Return the boards that an entry of CUDA_VISIBLE_DEVICES may mean: by number, or by how UUIDs begin."""
    if entry.isdecimal():
        return list(uuids[int(entry) : int(entry) + 1])
    return [uuid for uuid in uuids if entry and uuid.startswith(entry)]


def read_gpu(nvml: Nvml, uuid: str, handle: Any) -> Gpu:
    """Return what *nvml* tells of a board."""
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    milliwatts = nvml.ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    persistence = nvml.ask("nvmlDeviceGetPersistenceMode", handle)
    return Gpu(
        uuid,
        name=nvml.ask("nvmlDeviceGetName", handle),
        memory_bytes=int(memory.total) if memory is not None else None,
        capability=(capability[0], capability[1]) if capability is not None else None,
        driver=nvml.ask("nvmlSystemGetDriverVersion"),
        power_limit_w=milliwatts / 1000 if milliwatts is not None else None,
        persistence_mode=bool(persistence) if persistence is not None else None,
    )


_CALLS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU.

    Attributes:
        pid: Its id.
        name: Of its program; None where nobody tells.
        used_bytes: GPU memory that it has; None where that is not known.
    """

    pid: int
    name: str | None
    used_bytes: int | None


def gpu_processes(nvml: Nvml, handle: Any) -> list[GpuProcess] | None:
    """Return the processes that use a board; None where it does not tell."""
    found: dict[int, int | None] = {}
    asked = [nvml.ask(call, handle) for call in _CALLS]
    for one in (one for processes in asked for one in processes or ()):
        found[one.pid] = found.get(one.pid) or one.usedGpuMemory
    if all(processes is None for processes in asked):
        return None
    return [GpuProcess(pid, _name(nvml, pid), used) for pid, used in sorted(found.items())]


def _name(nvml: Nvml, pid: int) -> str | None:
    # NVML's first: here another process may bear the id that one outside of this container has.
    if name := nvml.ask("nvmlSystemGetProcessName", pid):
        return PurePath(name).name
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    return None


def newest_cuda(nvml: Nvml) -> str | None:
    """Return the newest CUDA that the driver runs, such as ``12.8``; None where it does not tell."""
    newest = nvml.ask("nvmlSystemGetCudaDriverVersion")
    return f"{newest // 1000}.{newest % 1000 // 10}" if newest is not None else None


def gpu_settings(nvml: Nvml, uuid: str) -> dict[str, Any]:
    """Return how a GPU is set: power in W, clocks in MHz. What NVML does not tell is None."""
    handle = nvml.ask("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return {"uuid": uuid, "nvml": nvml.error}
    known = read_gpu(nvml, uuid, handle)
    default_limit = nvml.ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
    return {
        "uuid": uuid,
        "name": known.name,
        "driver": known.driver,
        "power_limit_w": known.power_limit_w,
        "default_power_limit_w": default_limit / 1000 if default_limit is not None else None,
        "memory_mb": round(known.memory_bytes / 1e6) if known.memory_bytes is not None else None,
        "persistence_mode": known.persistence_mode,
        "ecc_mode": _current(nvml.ask("nvmlDeviceGetEccMode", handle)),
        "mig_mode": _current(nvml.ask("nvmlDeviceGetMigMode", handle)),
        **_clocks(nvml, handle),
        "pcie_generation": nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),  # an idle link is slower
        "pcie_width": nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
    }


def _clocks(nvml: Nvml, handle: Any) -> dict[str, int | None]:
    """Return the clocks of processors and memory: as they are, at most, and as applications are to have them."""
    kinds = (("sm", nvml.constant("NVML_CLOCK_SM")), ("memory", nvml.constant("NVML_CLOCK_MEM")))
    calls = (
        ("{}_clock_mhz", "nvmlDeviceGetClockInfo"),
        ("max_{}_clock_mhz", "nvmlDeviceGetMaxClockInfo"),
        ("application_{}_clock_mhz", "nvmlDeviceGetApplicationsClock"),
    )
    return {key.format(kind): nvml.ask(call, handle, constant) for key, call in calls for kind, constant in kinds}


def _current(modes: Any) -> bool | None:
    """Return whether a mode is on, of what NVML gives: the current and the pending one."""
    return bool(modes[0]) if modes is not None else None
