"""``budgets`` and ``gates``: what a study's results are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pytest_llem.study.section import NullableSection

#: What a regression gate looks at where the study does not say.
DEFAULT_FAMILY = ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms")

#: Relative change that does not count, where neither the study nor ``llem aa`` says better.
DEFAULT_DELTA = 0.02

Delta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on one metric of one point.

    Attributes:
        id: As in the item's id: ``energy_per_output_token_j-precision=bf16-batch_size=8``.
        metric: By its name in the catalogue.
        point: Id of the point.
        maximum: In the metric's unit; None for no such limit.
        minimum: Likewise.
        line: Of the study file, from 1.
    """

    id: str
    metric: str
    point: str
    maximum: float | None
    minimum: float | None
    line: int


class GatesConfig(NullableSection):
    """How regressions are told from noise.

    Attributes:
        alpha: Share of false alarms, of each gate and, by Holm's procedure, of all of a study's gates together.
        delta: Relative change that does not count (0.02 is 2 %): one for all metrics, or by metric.
        metrics: Names of the metrics to compare. Default: ``energy_per_output_token_j``,
            ``output_tokens_per_second`` and ``ttft_p50_ms``.
    """

    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    delta: Delta | dict[str, Delta] = DEFAULT_DELTA
    metrics: list[str] | None = Field(default=None, min_length=1)

    @property
    def family(self) -> tuple[str, ...]:
        """The metrics to compare."""
        return DEFAULT_FAMILY if self.metrics is None else tuple(self.metrics)

    def delta_of(self, metric: str) -> float:
        """Return the relative change of *metric* that does not count."""
        return self.delta.get(metric, DEFAULT_DELTA) if isinstance(self.delta, dict) else self.delta
