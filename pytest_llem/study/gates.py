"""Read ``gates``, the settings of comparisons, and define the budget of a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.study.document import Document
from pytest_llem.study.problems import Problem, did_you_mean
from pytest_llem.study.section import NullableSection
from pytest_llem.study.section_errors import section_problems

#: Metrics that are compared by default: a family in the sense of Holm's procedure.
DEFAULT_FAMILY = ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms")

#: Metrics that are compared by default for an open loop: there, throughput is the given request rate, and the
#: slowest requests matter.
OPEN_LOOP_FAMILY = ("energy_per_good_token_j", "ttft_p99_ms", "itl_p99_ms")

#: Default of the relative change that is tolerated; ``llem aa`` measures a better one.
DEFAULT_DELTA = 0.02

Delta = Annotated[float, Field(ge=0, lt=1)]

#: What alternates in an interleaved comparison: passes of two processes that are alive together, or whole cycles.
Interleave = Literal["pass", "cycle"]

#: A name in the catalogue. The enumeration is for editors only; the loader reports unknown names with a
#: suggestion.
MetricName = Annotated[str, Field(json_schema_extra={"enum": [*CATALOGUE]})]

_GateMetricName = Annotated[
    str, Field(json_schema_extra={"enum": [name for name, one in CATALOGUE.items() if one.better is not None]})
]
_Family = Annotated[list[_GateMetricName], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
_Deltas = Annotated[dict[str, Delta], Field(json_schema_extra={"propertyNames": {"enum": [*CATALOGUE]}})]


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on one metric of one point.

    Attributes:
        id: Id in the test item's brackets, such as ``energy_per_output_token_j-precision=bf16-batch_size=8``.
        metric: Name of the metric in the catalogue.
        point: Id of the point.
        maximum: Maximum in the metric's unit, or None.
        minimum: Minimum in the metric's unit, or None.
        line: Line of the study file, from 1.
    """

    id: str
    metric: str
    point: str
    maximum: float | None
    minimum: float | None
    line: int


class GatesConfig(NullableSection):
    """Settings of comparisons."""

    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    """Probability of a false alarm, of each gate and, by Holm's procedure, of all of a study's gates together.
    Default 0.01.
    """
    delta: Delta | _Deltas = DEFAULT_DELTA
    """Relative change that is tolerated (0.02 is 2 %): one for all metrics, or by metric. Default 0.02."""
    metrics: _Family | None = None
    """Names of the metrics to compare. Default null: ``energy_per_output_token_j``, ``output_tokens_per_second``
    and ``ttft_p50_ms``; without a load, the first two per request if answers differ in length, or if their tokens
    are not known. For an open loop, ``energy_per_good_token_j`` (``energy_per_output_token_j`` without an SLO),
    ``ttft_p99_ms`` and ``itl_p99_ms`` (``tpot_p99_ms`` if several tokens arrive together).
    """
    interleave: Interleave = "pass"
    """What alternates with ``--llem-against``: ``pass`` loads both sides and lets them measure some passes at a
    time; ``cycle`` measures whole cycles one after the other, as ``pass`` also does for points of which two do not
    fit into memory. Default ``pass``.
    """
    min_turn_seconds: float = Field(default=1.0, gt=0)
    """Minimum length of a turn, in seconds, or a quarter of ``measurement.min_window_seconds`` if that is less. A
    turn is at least one pass. Default 1.
    """

    def family_of(self, load: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the metrics to compare of a point.

        Args:
            load: The section ``load`` of its configuration, as plain data; None without one.
        """
        if self.metrics is not None:
            return tuple(self.metrics)
        if load is None or load.get("concurrency") is not None:
            return DEFAULT_FAMILY
        energy, *latencies = OPEN_LOOP_FAMILY
        return (energy if load.get("slo") else DEFAULT_FAMILY[0], *latencies)

    def delta_of(self, metric: str) -> float:
        """Return the relative change of *metric* that is tolerated."""
        return self.delta.get(metric, DEFAULT_DELTA) if isinstance(self.delta, dict) else self.delta


def read_gates(document: Document) -> tuple[GatesConfig, list[Problem], list[Problem]]:
    """Return the section ``gates`` of a study file, its problems, and notes on settings without effect."""
    given = document.data.get("gates")
    try:
        gates = GatesConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        return GatesConfig(), section_problems(document, ("gates",), GatesConfig, error), []
    problems = _metrics_problems(document, gates.metrics or ())
    notes: list[Problem] = []
    for name in gates.delta if isinstance(gates.delta, dict) else ():
        if message := metric_problem(name):
            problems.append(document.problem(("gates", "delta", name), message))
        elif name not in {*(gates.metrics or (*DEFAULT_FAMILY, *OPEN_LOOP_FAMILY))}:
            message = "has no effect: this metric is not compared; add it to gates.metrics"
            notes.append(document.problem(("gates", "delta", name), message))
    return gates, problems, notes


def metric_problem(name: str) -> str | None:
    """Return an error message if *name* is not a metric, else None."""
    return None if name in CATALOGUE else f"no metric of that name{did_you_mean(name, tuple(CATALOGUE))}"


def _metrics_problems(document: Document, names: Sequence[str]) -> list[Problem]:
    problems = []
    for index, name in enumerate(names):
        message = metric_problem(name)
        if message is None and CATALOGUE[name].better is None:
            message = f"{name} cannot be a gate: neither more nor less of it is better"
        elif message is None and name in names[:index]:
            message = f"{name} is given twice"
        if message:
            problems.append(document.problem(("gates", "metrics", index), message))
    return problems
