"""List the GPUs of this host, their properties, and which of them CUDA may use. No CUDA context is created."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import PurePath
from typing import Any

from pytest_llem.hardware.nvml import Nvml

#: Pairs of GPUs that NVLink connects, by their UUIDs.
Links = frozenset[frozenset[str]]

#: ``nvmlGpuP2PCapsIndex_t`` and ``nvmlGpuP2PStatus_t``.
_NVLINK, _OK = "NVML_P2P_CAPS_INDEX_NVLINK", "NVML_P2P_STATUS_OK"

#: Maximum number of combinations of GPUs that are compared. The best of them is chosen.
_MAX_COMBINATIONS = 20_000


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU from NVML. Values that NVML does not report are None.

    Attributes:
        uuid: UUID of the GPU.
        name: Product name, such as ``NVIDIA H100 PCIe``.
        memory_bytes: Total memory, in bytes.
        capability: CUDA compute capability.
        driver: Version of the driver.
        power_limit_w: Enforced power limit, in W.
        persistence_mode: Whether the driver stays loaded while no process uses the GPU.
        index: CUDA's number of the GPU in the order of the PCI bus; None if unknown.
    """

    uuid: str
    name: str | None = None
    memory_bytes: int | None = None
    capability: tuple[int, int] | None = None
    driver: str | None = None
    power_limit_w: float | None = None
    persistence_mode: bool | None = None
    index: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that CUDA may use.

    Attributes:
        all: The GPUs.
        first: Device 0 of an experiment that may use all of them; None if it is not known.
        is_ambiguous: Whether CUDA_VISIBLE_DEVICES selects GPUs that cannot be identified.
    """

    all: tuple[Gpu, ...] = ()
    first: Gpu | None = None
    is_ambiguous: bool = False


def visible_gpus() -> VisibleGpus:
    """Return the GPUs that CUDA may use, in CUDA's order if that is known. Without NVML there are none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return VisibleGpus()
    with Nvml() as nvml:
        handles = visible_handles(nvml)
        gpus = tuple(
            replace(read_gpu(nvml, uuid, handle), index=handles.indices.get(uuid))
            for uuid, handle in handles.by_uuid.items()
        )
    first = next((one for one in gpus if one.uuid == handles.first), None)
    return VisibleGpus(gpus, first, handles.is_ambiguous)


def kinds_of(uuids: Collection[str]) -> list[str]:
    """Return the product names of some GPUs, each once; GPUs that NVML does not name are left out."""
    with Nvml() as nvml:
        handles = [nvml.ask("nvmlDeviceGetHandleByUUID", uuid) for uuid in uuids]
        names = [nvml.ask("nvmlDeviceGetName", handle) for handle in handles if handle is not None]
    return sorted({name for name in names if name is not None})


def gpus_for(torch: str | None) -> VisibleGpus:
    """Return the GPUs that a PyTorch installation would use, without importing it; none for a CPU build.

    Args:
        torch: Version of PyTorch; None if it is not installed.
    """
    return VisibleGpus() if is_cpu_build(torch) else visible_gpus()


def is_cpu_build(torch: str | None) -> bool:
    """Return whether the PyTorch version *torch* is a CPU build, or PyTorch is not installed."""
    return torch is None or torch.partition("+")[2].startswith("cpu")


@dataclass(frozen=True)
class Handles:
    """NVML's handles of the GPUs that CUDA may use.

    Attributes:
        by_uuid: Handles of the GPUs that respond, by UUID.
        first: UUID of CUDA's device 0; None if it is not known.
        lost: Names, as in :func:`all_handles`, of the GPUs that do not respond.
        is_ambiguous: Whether CUDA_VISIBLE_DEVICES selects GPUs that cannot be identified.
        indices: CUDA's number of each GPU in the order of the PCI bus; empty if a GPU does not respond, as CUDA
            may or may not count it.
    """

    by_uuid: dict[str, Any]
    first: str | None
    lost: frozenset[str] = frozenset()
    is_ambiguous: bool = False
    indices: Mapping[str, int] = field(default_factory=dict)


def all_handles(nvml: Nvml) -> dict[str, Any]:
    """Return NVML's handles of all GPUs by UUID, in NVML's order.

    A GPU that does not respond keeps its place: the handle is None, and the key is ``lost`` and its index.
    """
    handles: dict[str, Any] = {}
    for index in range(nvml.ask("nvmlDeviceGetCount") or 0):
        handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
        uuid = nvml.ask("nvmlDeviceGetUUID", handle) if handle is not None else None
        handles[uuid or f"lost {index}"] = handle if uuid else None
    return handles


def visible_handles(nvml: Nvml) -> Handles:
    """Return NVML's handles of the GPUs that CUDA may use."""
    handles = all_handles(nvml)
    names = {nvml.ask("nvmlDeviceGetName", one) if one is not None else None for one in handles.values()}
    is_bus_order = len(names) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids, ordered = cuda_order(list(handles), visible, is_bus_order=is_bus_order)
    by_uuid = {uuid: handles[uuid] for uuid in uuids if handles[uuid] is not None}
    first = uuids[0] if ordered and uuids and uuids[0] in by_uuid else None
    is_ambiguous = visible is not None and not ordered
    respond = all(handle is not None for handle in handles.values())
    indices = {uuid: index for index, uuid in enumerate(handles)} if respond else {}
    return Handles(by_uuid, first, frozenset(uuids) - by_uuid.keys(), is_ambiguous, indices)


def cuda_order(uuids: Sequence[str], visible: str | None, *, is_bus_order: bool = True) -> tuple[list[str], bool]:
    """Return the GPUs that CUDA may use, and whether they are in CUDA's order.

    Args:
        uuids: UUIDs of all GPUs in NVML's order, which is that of the PCI bus.
        visible: Value of CUDA_VISIBLE_DEVICES; None if it is not set.
        is_bus_order: Whether CUDA uses that order too. By default CUDA puts the fastest GPU first: on a host with
            different GPUs an index is then ambiguous, as a MIG instance always is, and all GPUs are returned.
            Without CUDA_VISIBLE_DEVICES the order is known: experiments run with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if visible is None:
        return list(uuids), True
    found: list[str] = []
    entries = [entry.strip() for entry in visible.split(",")]
    for entry in entries:
        if _differs_in_kind(entry, entries[0]):
            break  # CUDA takes indices or UUIDs, whichever comes first
        if entry.startswith("MIG-") or (entry.isdecimal() and int(entry) < len(uuids) and not is_bus_order):
            return list(uuids), False
        if len(matching := _matching(entry, uuids)) != 1:
            break  # CUDA also ignores all entries from the first invalid one on
        if matching[0] in found:
            return [], True  # CUDA uses no GPU at all if one is repeated
        found += matching
    return found, True


def invalid_entry(uuids: Sequence[str], visible: str) -> str | None:
    """Return the first entry of CUDA_VISIBLE_DEVICES that CUDA does not accept; None if it accepts all.

    CUDA accepts no entry that matches no GPU or several, and no index among UUIDs or the reverse. An empty entry
    or ``-1`` is valid: it hides the GPUs of all entries after it.

    Args:
        uuids: UUIDs of all GPUs in NVML's order.
        visible: Value of CUDA_VISIBLE_DEVICES.
    """
    entries = [entry.strip() for entry in visible.split(",")]
    hidden = next((place for place, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    known = (entry for entry in entries[:hidden] if not entry.startswith("MIG-"))
    invalid = (one for one in known if _differs_in_kind(one, entries[0]) or len(_matching(one, uuids)) != 1)
    return next(invalid, None)


def _differs_in_kind(entry: str, first: str) -> bool:
    """Return whether one of two entries of CUDA_VISIBLE_DEVICES is an index and the other is not."""
    return entry.isdecimal() != first.isdecimal()


def _matching(entry: str, uuids: Sequence[str]) -> list[str]:
    """Return the GPUs that match an entry of CUDA_VISIBLE_DEVICES, an index or the beginning of a UUID."""
    if entry.isdecimal():
        return list(uuids[int(entry) : int(entry) + 1])
    return [uuid for uuid in uuids if entry and uuid.startswith(entry)]


def read_gpu(nvml: Nvml, uuid: str, handle: Any) -> Gpu:
    """Return the properties of a GPU."""
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


#: NVML's calls that list the processes of a GPU.
_PROCESS_LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU.

    Attributes:
        pid: Pid of the process.
        name: Name of its program; None if unknown.
        used_bytes: GPU memory that it uses, in bytes; None if unknown.
    """

    pid: int
    name: str | None
    used_bytes: int | None


def gpu_processes(nvml: Nvml, handle: Any) -> list[GpuProcess] | None:
    """Return the processes that use a GPU; None if NVML does not report them."""
    found: dict[int, int | None] = {}
    lists = [nvml.ask(call, handle) for call in _PROCESS_LISTS]
    for one in (one for processes in lists for one in processes or ()):
        found[one.pid] = found.get(one.pid) or one.usedGpuMemory
    if all(processes is None for processes in lists):
        return None
    return [GpuProcess(pid, _name(nvml, pid), used) for pid, used in sorted(found.items())]


def _name(nvml: Nvml, pid: int) -> str | None:
    # NVML's name is preferred: in a container, psutil may find another process with a pid of the host.
    if name := nvml.ask("nvmlSystemGetProcessName", pid):
        return PurePath(name).name
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    return None


def newest_cuda(nvml: Nvml) -> str | None:
    """Return the newest CUDA version that the driver supports, such as ``12.8``; None if it is unknown."""
    newest = nvml.ask("nvmlSystemGetCudaDriverVersion")
    return f"{newest // 1000}.{newest % 1000 // 10}" if newest is not None else None


def gpu_settings(nvml: Nvml, uuid: str) -> dict[str, Any]:
    """Return the settings of a GPU, or only why it is not found. Values that NVML does not report are None."""
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
        # The maximum, because the current generation is lower while the GPU is idle.
        "pcie_generation": nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        "pcie_width": nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
    }


def _clocks(nvml: Nvml, handle: Any) -> dict[str, int | None]:
    """Return the current, maximum and application clocks of the processors and of the memory, in MHz."""
    kinds = (("sm", nvml.constant("NVML_CLOCK_SM")), ("memory", nvml.constant("NVML_CLOCK_MEM")))
    calls = (
        ("{}_clock_mhz", "nvmlDeviceGetClockInfo"),
        ("max_{}_clock_mhz", "nvmlDeviceGetMaxClockInfo"),
        ("application_{}_clock_mhz", "nvmlDeviceGetApplicationsClock"),
    )
    return {key.format(kind): nvml.ask(call, handle, constant) for key, call in calls for kind, constant in kinds}


def _current(modes: Any) -> bool | None:
    """Return whether a mode is on, from NVML's pair of the current and the pending mode; None if unknown."""
    return bool(modes[0]) if modes is not None else None


def nvlinks(uuids: Sequence[str]) -> Links:
    """Return the pairs of GPUs that NVLink connects; none if NVML does not report it. No CUDA context is created.

    Args:
        uuids: UUIDs of the GPUs.
    """
    with Nvml() as nvml:
        kind, connected = nvml.constant(_NVLINK), nvml.constant(_OK)
        if kind is None:
            return frozenset()
        handles = {uuid: nvml.ask("nvmlDeviceGetHandleByUUID", uuid) for uuid in uuids}
        return frozenset(
            frozenset(pair)
            for pair in combinations(uuids, 2)
            if nvml.ask("nvmlDeviceGetP2PStatus", *map(handles.get, pair), kind) == connected
        )


def best_connected(free: Sequence[str], count: int, links: Links) -> tuple[str, ...]:
    """Return *count* of the *free* GPUs, with as many of their pairs connected by NVLink as possible.

    Among equals, those whose choice separates the fewest connected pairs of free GPUs, and then the first.

    Args:
        free: UUIDs of free GPUs, at least *count*.
        count: Number of GPUs.
        links: Pairs that NVLink connects.

    Example:
        >>> best_connected(["a", "b", "c"], 2, frozenset({frozenset("bc")}))
        ('b', 'c')
        >>> best_connected(["a", "b", "c"], 1, frozenset({frozenset("ab")}))
        ('c',)
    """
    free_links = [pair for pair in links if pair <= set(free)]
    if len(free_links) in (0, len(free) * (len(free) - 1) // 2):  # all choices are alike
        return tuple(free[:count])
    best, best_score = tuple(free[:count]), (-1, 0)
    for number, chosen in enumerate(combinations(free, count)):
        if number == _MAX_COMBINATIONS:
            break
        score = _score(set(chosen), free_links)
        if score > best_score:
            best, best_score = chosen, score
    return best


def _score(chosen: Collection[str], links: Sequence[frozenset[str]]) -> tuple[int, int]:
    """Return how many connected pairs are among *chosen*, and minus how many *chosen* separates."""
    members_chosen = [len(pair.intersection(chosen)) for pair in links]
    return members_chosen.count(2), -members_chosen.count(1)
