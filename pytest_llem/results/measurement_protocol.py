"""The settings that all points of a study share, as a result records them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pytest_llem.study.design import StudyConfig

_ISOLATION = {
    "spawn": "a fresh spawned process for every experiment",
    "forkserver": "a process for every experiment, forked from one that has imported and opened no device",
}

_SERVERS = {
    "attached": "a server that ran before serves all cycles",
    "load": "a fresh server for each cycle and configuration, which its loads share",
    "never": "a fresh server for every experiment",
}

_LOAD_WINDOW = "the steady state of the load; totals are per n requests"


def measurement_protocol(study: StudyConfig) -> dict[str, Any]:
    """Return the settings that all points of *study* share, as its result records them."""
    execution = study.execution
    servers = [point.config.server for point in study.points if point.config.server is not None]
    reuse = "attached" if any(server.url for server in servers) else execution.server_reuse
    # ``llem merge`` judges these budgets without pytest, which would apply the marks of skipped and xfail points.
    marked = {point.id for point in study.points if point.skip is not None or point.xfail is not None}
    budgets = [asdict(budget) for budget in study.budgets if budget.point not in marked]
    return {
        "isolation": _ISOLATION[execution.start_method],
        **({"servers": _SERVERS[reuse]} if servers else {}),
        "start_method": execution.start_method,
        "n_cycles": execution.n_cycles,
        **(execution.model_dump(include={"min_cycles", "max_cycles"}) if execution.until_decided else {}),
        "cycle_order": execution.cycle_order,
        "shuffle_seed": study.design_hash if execution.shuffle_seed is None else execution.shuffle_seed,
        "experiment_gap_seconds": execution.experiment_gap_seconds,
        "cycle_gap_seconds": execution.cycle_gap_seconds,
        "window": _LOAD_WINDOW if servers else "whole passes over all prompts; totals are per pass",
        "unit_of_repetition": "cycle",
        "interval": "Student t, 95 %" + (" after stopping, 98 % nominal" if execution.until_decided else ""),
        "gates": study.gates.model_dump(mode="json"),
        **({"budgets": budgets} if budgets else {}),
        **({"reference": study.reference} if study.reference is not None else {}),
    }
