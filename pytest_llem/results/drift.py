"""How far servers have changed between the first and the last load on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.results.metrics import weakest
from pytest_llem.results.pareto import COST
from pytest_llem.results.points import PointResult
from pytest_llem.results.serving import DriftRecord

#: Metrics that are measured again, and what texts call them.
METRICS = {
    COST: "J/output token",
    "output_tokens_per_second": "output tokens/s",
    "ttft_p50_ms": "TTFT p50",
    "tpot_p50_ms": "TPOT p50",
}

#: Largest relative change, on average over the servers, that is not worth a warning.
MAX_DRIFT = 0.05


def first_load(experiment_id: str, load: Mapping[str, Any], result: Mapping[str, Any]) -> DriftRecord:
    """Return the record of the first load on a server, which is to be measured again.

    Args:
        experiment_id: Id of its experiment.
        load: The experiment's section ``load``.
        result: The experiment's result.
    """
    # A search is not repeated: the load that it found is measured again.
    searched = {name: result["load"][name] for name in ("concurrency", "rate") if load[name] == "auto"}
    values = {name: result["metrics"][name] for name in METRICS}
    return DriftRecord(
        first=experiment_id,
        load={**load, **searched, "search": None} if searched else dict(load),
        before={name: one["value"] for name, one in values.items() if one["value"] is not None},
        method=values[COST]["method"],
    )


@dataclass(frozen=True)
class Drift:
    """The change from the first to the last load on servers, on average over the servers.

    Attributes:
        changes: Relative change by metric; 0.02 is 2 % more at the last load.
        servers: Number of servers.
        method: How their energies were obtained, the weakest method; None if there are none.
    """

    changes: Mapping[str, float]
    servers: int
    method: str | None

    @property
    def largest(self) -> tuple[str, float]:
        """The name of the metric with the largest change, and that change.

        Only metrics that can be judged count, if there are any.
        """
        judged = {name: change for name, change in self.changes.items() if self._is_judged(name)}
        name, change = max((judged or self.changes).items(), key=lambda one: abs(one[1]))
        return self._name(name), change

    @property
    def is_large(self) -> bool:
        """Whether a change that can be judged is large enough for a warning."""
        return any(self._is_judged(name) and abs(change) > MAX_DRIFT for name, change in self.changes.items())

    @property
    def text(self) -> str:
        """What has changed, in a line."""
        changes = ", ".join(f"{self._name(name)} {change:+.1%}" for name, change in self.changes.items())
        servers = "one server" if self.servers == 1 else f"{self.servers} servers"
        return f"drift of {servers}, by the first load measured again as the last one: {changes}"

    def _name(self, metric: str) -> str:
        method = f" ({self.method})" if metric == COST and self.method != "measured" else ""
        return METRICS[metric] + method

    def _is_judged(self, metric: str) -> bool:
        # A TTFT depends on which requests happen to meet, and an estimated energy is made of CPU time.
        return metric != "ttft_p50_ms" and not (metric == COST and self.method == "estimated")


def server_drift(points: Sequence[PointResult]) -> Drift | None:
    """Return the drift of the servers of a study; None if no load was measured again.

    Changes of opposite signs on several servers cancel each other: they favour no load.
    """
    records = [one for point in points for one in point.drifts if one.after]
    logs: dict[str, list[float]] = {}
    for record in records:
        for name in METRICS:
            if (before := record.before.get(name)) and (after := record.after.get(name)):
                logs.setdefault(name, []).append(math.log(after / before))
    if not logs:
        return None
    changes = {name: math.exp(math.fsum(found) / len(found)) - 1 for name, found in logs.items()}
    return Drift(changes, len(records), weakest(record.method for record in records))
