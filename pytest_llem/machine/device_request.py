"""Determine which devices an experiment may use, and restrict its process to those that it gets."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pytest_llem.hardware.gpus import (
    Gpu,
    Links,
    VisibleGpus,
    best_connected,
    gpus_for,
    is_cpu_build,
    nvlinks,
    visible_gpus,
)
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.machine.device_locks import CPU
from pytest_llem.study.engine_options import Needs


@dataclass(frozen=True)
class Allocation:
    """The devices of an experiment.

    Attributes:
        devices: UUIDs of GPUs, or the CPU. Both for an engine that may use either.
        environment: Environment variables that make CUDA see exactly these GPUs. Empty if ``CUDA_VISIBLE_DEVICES``
            of this process is to stay as it is: the server is attached, no GPU is visible, or it selects GPUs that
            cannot be identified, such as MIG devices.
    """

    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceRequest:
    """The devices that an experiment asks for: any *count* of a *pool*.

    Attributes:
        pool: Names of the devices that it can use. GPUs are of one model unless all are needed.
        count: Number of them that it needs.
        cuda_names: Name of each GPU of the pool in ``CUDA_VISIBLE_DEVICES``: CUDA's number, or the UUID if that is
            unknown. None to leave ``CUDA_VISIBLE_DEVICES`` as it is.
        links: Pairs of the pool that NVLink connects.
        problem: Why the experiment cannot have the GPUs that it needs; None if it can.

    Example:
        >>> DeviceRequest(("GPU-a", "GPU-b", "GPU-c"), 1).among(["GPU-b"]).pool
        ('GPU-b',)
    """

    pool: tuple[str, ...] = ()
    count: int = 0
    cuda_names: Mapping[str, str] | None = field(default=None, hash=False)
    links: Links = frozenset()
    problem: str | None = None

    def among(self, devices: Collection[str]) -> DeviceRequest:
        """Return the request restricted to *devices*; the same request if these are fewer than *count*."""
        pool = tuple(device for device in self.pool if device in devices)
        return replace(self, pool=pool) if len(pool) >= self.count else self

    def choose(self, free: Collection[str], preferred: Collection[str] = ()) -> tuple[str, ...]:
        """Return the devices to take of those that are *free*; empty if too few are free.

        Args:
            free: Names of free devices.
            preferred: Devices to take if all of them are free.
        """
        usable = [device for device in self.pool if device in free]
        if len(usable) < self.count:
            return ()
        if len(preferred) == self.count and set(preferred) <= set(usable):
            return tuple(preferred)
        return best_connected(usable, self.count, self.links)

    @cached_property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The pool divided into sets of *count* devices, best connected first. A smaller rest is left out."""
        found, left = [], list(self.pool)
        while self.count and len(left) >= self.count:
            found.append(self.choose(left))
            left = [device for device in left if device not in found[-1]]
        return tuple(found)

    def allocation(self, devices: Collection[str]) -> Allocation:
        """Return the allocation of *devices*, which are in the pool."""
        chosen = tuple(device for device in self.pool if device in devices)
        if self.cuda_names is None:
            return Allocation(chosen)
        names = ",".join(self.cuda_names[device] for device in chosen if device in self.cuda_names)
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if names else {}
        return Allocation(chosen, {**order, "CUDA_VISIBLE_DEVICES": names})


def request_all(*devices: str) -> DeviceRequest:
    """Return a request for all of *devices* that leaves ``CUDA_VISIBLE_DEVICES`` as it is."""
    return DeviceRequest(devices, len(devices))


def request_devices(needs: Needs, python: Path | None) -> DeviceRequest:
    """Return the request of an experiment: as many GPUs as it needs, all of one model, out of the visible ones.

    The first model of which there are enough GPUs is taken, so that experiments with equal needs use the same
    model. An engine that states no number gets all visible GPUs. If it does not use PyTorch, and no CUDA build of
    PyTorch is installed, it also gets the CPU, as it may run on either.

    Args:
        needs: What the engine needs.
        python: The interpreter that the experiment runs in; None for this one.
    """
    torch = package_versions(python).get("torch")
    gpus = gpus_for(torch) if needs.uses_torch else visible_gpus()
    if needs.gpus == 0:
        return DeviceRequest((CPU,), 1, {})
    if needs.gpus is not None and needs.gpus > 1 and (problem := _shortage(needs.gpus, gpus)):
        return DeviceRequest(problem=problem)
    if not gpus.all:
        return request_all(CPU)
    if needs.gpus is None or gpus.is_ambiguous:
        cpu = (CPU,) if needs.gpus is None and not needs.uses_torch and is_cpu_build(torch) else ()
        everything = request_all(*cpu, *(gpu.uuid for gpu in gpus.all))
        return everything if gpus.is_ambiguous else replace(everything, cuda_names=_cuda_names(gpus.all))
    count = needs.gpus
    kind = next(kind for kind in _kinds(gpus) if len(kind) >= count)
    pool = tuple(gpu.uuid for gpu in kind)
    links = nvlinks(pool) if count < len(pool) else frozenset()
    return DeviceRequest(pool, count, _cuda_names(kind), links)


def _kinds(gpus: VisibleGpus) -> list[tuple[Gpu, ...]]:
    """Return the GPUs grouped by model, in the order of each model's first GPU."""
    kinds: dict[str | None, tuple[Gpu, ...]] = {}
    for gpu in gpus.all:
        kinds[gpu.name] = (*kinds.get(gpu.name, ()), gpu)
    return list(kinds.values())


def _shortage(number: int, gpus: VisibleGpus) -> str | None:
    """Return why there are not *number* GPUs of one model; None if there are."""
    kinds = _kinds(gpus)
    if any(len(kind) >= number for kind in kinds):
        return None
    found = ", ".join(f"{len(kind)} × {kind[0].name or 'GPU'}" for kind in kinds) or "0"
    restricted = "; CUDA_VISIBLE_DEVICES may hide some" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    return f"needs {number} GPUs of one kind, and there are {found}{restricted}"


def _cuda_names(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return each GPU's name in CUDA_VISIBLE_DEVICES: its number if known, because some engines refuse UUIDs."""
    return {gpu.uuid: gpu.uuid if gpu.index is None else str(gpu.index) for gpu in gpus}
