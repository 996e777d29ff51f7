"""Kinds of testbeds: results of different kinds are kept apart, in baselines and in histories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.points import PointResult


@dataclass(frozen=True)
class Testbed:
    """A kind of testbed: devices, their power limit and the host.

    Attributes:
        gpus: Names of the GPU models, without the number of GPUs; empty if engines ran on the CPU.
        power_limits: Power limits of the GPUs, such as ``700 W``; empty if unknown.
        cpu: CPU model of the host; None if unknown.
        cpus: Number of CPUs that a process may use; None if unknown. It only counts without GPUs.

    Example:
        >>> Testbed(("NVIDIA H100 80GB HBM3",), ("700 W",), "AMD EPYC 9654", 96).key
        'nvidia-h100-80gb-hbm3_700-w_amd-epyc-9654'
    """

    gpus: tuple[str, ...]
    power_limits: tuple[str, ...]
    cpu: str | None
    cpus: int | None

    @property
    def key(self) -> str:
        """The kind as the name of a folder."""
        host = self.cpu or "unknown CPU"
        if not self.gpus:
            return "_".join(map(_slug, (host, f"{self.cpus or 'unknown'} CPUs")))
        limits = ["+".join(map(_slug, self.power_limits))] if self.power_limits else []
        return "_".join(["+".join(map(_slug, self.gpus)), *limits, _slug(host)])


def testbed_of(points: Iterable[PointResult]) -> Testbed | None:
    """Return the kind of testbed that some points are from; None if they have no results, or did not record it."""
    facts = [point.testbed for point in points]
    if not any(one.get("gpu") or one.get("cpu") for one in facts):
        return None
    gpus = {name for text in _values(facts, "gpu") for name in gpu_models(str(text)).split(", ")}
    limits = {limit for text in _values(facts, "power_limit") for limit in str(text).split(", ")}
    hosts = [*_values(facts, "host_cpu"), *_values(facts, "cpu")]
    return Testbed(
        gpus=tuple(sorted(gpus)),
        power_limits=tuple(sorted(limits)),
        cpu=next(map(str, hosts), None),
        cpus=next(map(int, _values(facts, "cpus")), None),
    )


def gpu_models(fact: str) -> str:
    """Return the fact ``gpu`` without the numbers of GPUs.

    Example:
        >>> gpu_models("2 × NVIDIA H100 80GB HBM3")
        'NVIDIA H100 80GB HBM3'
    """
    return re.sub(r"\d+ × ", "", fact)


def _values(facts: Sequence[Mapping[str, Any]], name: str) -> Iterator[Any]:
    """Yield the known values of a fact; it is a list if cycles disagree."""
    for one in facts:
        value = one.get(name)
        yield from value if isinstance(value, list) else [] if value is None else [value]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
