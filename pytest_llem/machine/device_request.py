"""Determine which devices an experiment may be given, and how its process is restricted to them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pytest_llem.hardware.gpus import Gpu, VisibleGpus, gpus_for, is_cpu_build, visible_gpus
from pytest_llem.hardware.topology import Links, best_connected, nvlinks
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.machine.device_locks import CPU
from pytest_llem.study.engines import Needs


@dataclass(frozen=True)
class Allocation:
    """The devices of an experiment.

    Attributes:
        devices: UUIDs of GPUs, or the CPU. Both for an engine that may use either.
        environment: Environment variables with which CUDA sees exactly these GPUs. Empty if
            ``CUDA_VISIBLE_DEVICES`` selects GPUs that cannot be identified, such as MIG devices: it is then left
            as it is.
    """

    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceRequest:
    """The devices that an experiment asks for: any *count* of a *pool*.

    Attributes:
        pool: Names of devices, GPUs of one kind unless all are needed.
        count: Number of them that are needed.
        numbers: CUDA's number of each GPU of the pool, or its UUID if that is unknown; None if CUDA must not be
            restricted.
        links: Pairs of the pool that NVLink connects.
        problem: Why the experiment cannot have the GPUs that it needs; None if it can.

    Example:
        >>> DeviceRequest(("GPU-a", "GPU-b", "GPU-c"), 1).among(["GPU-b"]).pool
        ('GPU-b',)
    """

    pool: tuple[str, ...] = ()
    count: int = 0
    numbers: Mapping[str, str] | None = field(default=None, hash=False)
    links: Links = frozenset()
    problem: str | None = None

    def among(self, devices: Collection[str]) -> DeviceRequest:
        """Return the request restricted to *devices*; itself if they are not enough."""
        pool = tuple(one for one in self.pool if one in devices)
        return replace(self, pool=pool) if len(pool) >= self.count else self

    def choose(self, free: Collection[str], preferred: Collection[str] = ()) -> tuple[str, ...]:
        """Return the devices to take of those that are *free*; empty if too few are free.

        Args:
            free: Names of free devices.
            preferred: Devices to take if they are free.
        """
        usable = [one for one in self.pool if one in free]
        if len(usable) < self.count:
            return ()
        if len(preferred) == self.count and set(preferred) <= set(usable):
            return tuple(preferred)
        return best_connected(usable, self.count, self.links)

    @cached_property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The pool divided into sets of *count* devices; what is left over is in none."""
        found, left = [], list(self.pool)
        while self.count and len(left) >= self.count:
            found.append(self.choose(left))
            left = [one for one in left if one not in found[-1]]
        return tuple(found)

    def allocation(self, devices: Collection[str]) -> Allocation:
        """Return the allocation of *devices*, which are of the pool."""
        chosen = tuple(one for one in self.pool if one in devices)
        if self.numbers is None:
            return Allocation(chosen)
        numbers = ",".join(self.numbers[one] for one in chosen if one in self.numbers)
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if numbers else {}
        return Allocation(chosen, {**order, "CUDA_VISIBLE_DEVICES": numbers})


def exactly(*devices: str) -> DeviceRequest:
    """Return the request for all of *devices*, which leaves CUDA as it is."""
    return DeviceRequest(devices, len(devices))


def request_devices(needs: Needs, python: Path | None) -> DeviceRequest:
    """Return the devices for an experiment: as many GPUs of one kind as it needs, any of those that are visible.

    The kind is that of the first visible GPU of which there are enough, so that all experiments with equal needs
    are on one kind. An engine that states no number gets all visible GPUs. It also gets the CPU if PyTorch has no
    GPU build here, as it may use GPUs by other means.

    Args:
        needs: What its engine states.
        python: The interpreter that it runs in; None for this one.
    """
    torch = package_versions(python).get("torch")
    gpus = gpus_for(torch) if needs.uses_torch else visible_gpus()
    if needs.gpus == 0:
        return DeviceRequest((CPU,), 1, {})
    if needs.gpus is not None and needs.gpus > 1 and (problem := _shortage(needs.gpus, gpus)):
        return DeviceRequest(problem=problem)
    if not gpus.all:
        return exactly(CPU)
    if needs.gpus is None or gpus.is_ambiguous:
        cpu = (CPU,) if needs.gpus is None and not needs.uses_torch and is_cpu_build(torch) else ()
        everything = exactly(*cpu, *(gpu.uuid for gpu in gpus.all))
        return everything if gpus.is_ambiguous else replace(everything, numbers=_numbers(gpus.all))
    count = needs.gpus
    kind = next(kind for kind in _kinds(gpus) if len(kind) >= count)
    pool = tuple(gpu.uuid for gpu in kind)
    links = nvlinks(pool) if count < len(pool) else frozenset()
    return DeviceRequest(pool, count, _numbers(kind), links)


def _kinds(gpus: VisibleGpus) -> list[tuple[Gpu, ...]]:
    """Return the GPUs grouped by the name of their model, in the order of the first of each."""
    kinds: dict[str | None, tuple[Gpu, ...]] = {}
    for gpu in gpus.all:
        kinds[gpu.name] = (*kinds.get(gpu.name, ()), gpu)
    return list(kinds.values())


def _shortage(number: int, gpus: VisibleGpus) -> str | None:
    """Return why there are not *number* GPUs of one kind; None if there are."""
    kinds = _kinds(gpus)
    if any(len(kind) >= number for kind in kinds):
        return None
    found = ", ".join(f"{len(kind)} × {kind[0].name or 'GPU'}" for kind in kinds) or "0"
    restricted = "; CUDA_VISIBLE_DEVICES may hide some" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    return f"needs {number} GPUs of one kind, and there are {found}{restricted}"


def _numbers(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return how CUDA_VISIBLE_DEVICES names each GPU. By number, as some engines refuse UUIDs."""
    return {gpu.uuid: gpu.uuid if gpu.index is None else str(gpu.index) for gpu in gpus}
