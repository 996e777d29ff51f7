"""The result of one point of a study."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.contention import PointContention
from pytest_llem.results.document import Record
from pytest_llem.results.open_mappings import Config, Testbed
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
    config: Config
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
    testbed: Testbed = Field(default_factory=dict)
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
