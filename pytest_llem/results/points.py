"""The result of one point of a study, and the testbed of points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.contention import PointContention
from pytest_llem.results.document import Record
from pytest_llem.results.open_mappings import ConfigMapping, TestbedMapping
from pytest_llem.results.serving import DriftRecord, LoadRecord
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import GateVerdict


class CycleTurns(Record):
    """The turns of a cycle that was interleaved with the other side of a comparison, pass by pass."""

    cycle: int
    """Number of the cycle."""
    pair: str
    """Id of the cycle and its counterpart on the other side."""
    metrics: dict[str, list[float]]
    """Values of a metric over each turn alone, by metric; without metrics that a turn has no value of."""


class PointResult(Record):
    """The result of one point over its cycles."""

    id: str
    """Id of the point, as in the items' ids without the cycle."""
    axes: dict[str, Any]
    """Values of the point's axes, by dotted key."""
    config: ConfigMapping
    """Resolved configuration; once there are results, their ``effective_config``."""
    config_hash: str
    """Hash of the configuration."""
    cycles: list[int] = Field(default_factory=list)
    """Numbers of the completed cycles, in order."""
    metrics: dict[str, Summary]
    """Statistics by metric; their ``values`` are in the order of ``cycles``."""
    result_digests: list[str] = Field(default_factory=list)
    """SHA-256 of the result of each of ``cycles``, in their order, which shows whether two points are the same
    measurement. Empty in results of schema 1.3 and older.
    """
    testbed: TestbedMapping = Field(default_factory=dict)
    """Testbed facts, which must match in a comparison."""
    sut: dict[str, Any] = Field(default_factory=dict)
    """System-under-test facts, which may differ in a comparison."""
    contention: PointContention | None = None
    """Contended cycles; null if no result records contention."""
    turns: list[CycleTurns] = Field(default_factory=list)
    """Turns of those cycles that were measured alternately, in order."""
    not_repeated: str | None = None
    """Why the runs of a load generator are no repetitions, so that no gate compares them; null if they are."""
    loads: list[LoadRecord] = Field(default_factory=list)
    """Load of each of ``cycles`` on a server, in their order; empty if the engine is not ``server``."""
    gpus: list[list[str]] = Field(default_factory=list)
    """UUIDs of the GPUs of each of ``cycles``, in their order; empty without GPUs."""
    drifts: list[DriftRecord] = Field(default_factory=list)
    """Drift of each server on which the point's load was the last one."""
    verdicts: list[GateVerdict] = Field(default_factory=list)
    """Verdicts of the point's gates."""
    replay_mismatch: str | None = None
    """What has changed since a replayed result was measured, so that no gate judges the point. Null if nothing
    has.
    """

    def summary_of(self, metric: str) -> Summary:
        """Return the statistics of *metric*; without a value if the writing version did not know it."""
        return self.metrics.get(metric) or Summary(mean=None, n=0, unit=CATALOGUE[metric].unit)

    @property
    def n_cycles(self) -> int:
        """Number of completed cycles. Results of early versions do not list them, but count values."""
        return len(self.cycles) or self.summary_of("seconds").n

    @property
    def energy_label(self) -> str | None:
        """How the energy was obtained, as :attr:`Summary.label`; None if there is none.

        It is the label of ``energy_j`` if no output tokens were counted.
        """
        labels = (self.summary_of(name).label for name in ("energy_per_output_token_j", "energy_j"))
        return next(filter(None, labels), None)


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
