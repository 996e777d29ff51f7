"""Record what else ran on the machine beside an experiment, and mark the energies that they shared."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import Any

from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.notes import neighbours

#: Why no gate judges a shared energy.
SHARED = "it includes what other experiments drew at the same time"

#: How energy is obtained that is the experiment's own wherever it is measured.
_OWN_METHODS = ("attributed", "estimated")


def with_neighbours(outcome: Outcome, devices: Collection[str], session: str | None) -> Outcome:
    """Return *outcome* with the experiments that had other devices of the machine at the same time.

    Energies of devices that are not the experiment's own, such as a CPU package, are marked as shared if there are
    any.

    Args:
        outcome: The outcome of the experiment, which still has its devices.
        devices: Its devices.
        session: Unique name of its session of several processes; None for a session of one process.
    """
    if outcome.result is None:
        return outcome
    data = dict(outcome.data)
    began, ended = (datetime.fromisoformat(data[key]) for key in ("started_at", "completed_at"))
    found = neighbours(devices, session, began, ended)
    data["concurrent"] = [one.model_dump(mode="json") for one in found]
    if found:
        data["metrics"] = {name: _marked(one, devices) for name, one in data["metrics"].items()}
    return replace(outcome, result=json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _marked(metric: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    read = metric.get("devices") or ()
    if metric["value"] is None or metric["method"] in _OWN_METHODS or set(read) <= set(own):
        return metric
    return metric | {"shared": True, "not_judged": metric["not_judged"] or SHARED}
