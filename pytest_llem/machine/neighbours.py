"""Record which experiments had other devices of the machine meanwhile, and mark energies that include theirs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.owner import Owner, locks_folder, read_note
from pytest_llem.results.experiment import Neighbour

#: Why no gate judges a shared energy.
SHARED = "it includes what other experiments drew at the same time"

#: Methods that give the experiment's own energy, also on devices that others use.
_OWN_METHODS = ("attributed", "estimated")


def with_neighbours(outcome: Outcome, devices: Collection[str], session: str | None) -> Outcome:
    """Return *outcome* with the experiments that had other devices of the machine at the same time.

    Energies of devices that are not the experiment's own, such as a CPU package, are marked as shared if there are
    such experiments.

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


def neighbours(devices: Collection[str], session: str | None, began: datetime, ended: datetime) -> list[Neighbour]:
    """Return the experiments that had leases of other devices of this machine at the same time, sorted by name.

    Args:
        devices: Devices of the experiment, which are left out.
        session: Unique name of its session of several processes; None for a session of one process.
        began: Its start.
        ended: Its end.
    """
    now = datetime.now(UTC)
    found: dict[tuple[str, str, str | None], tuple[list[str], float]] = {}
    for name, owner in _owners():
        if name in devices:
            continue
        for lease in owner.leases():
            seconds = (min(lease.ended or now, ended) - max(lease.since, began)).total_seconds()
            if seconds <= 0:
                continue
            key = lease.study, lease.experiment, lease.session
            names, longest = found.get(key, ([], 0.0))
            found[key] = [*dict.fromkeys([*names, name])], max(longest, seconds)
    return [
        Neighbour(
            study=study,
            experiment=experiment,
            devices=sorted(names),
            same_run=session is not None and other_session == session,
            seconds=round(seconds, 3),
        )
        for (study, experiment, other_session), (names, seconds) in sorted(
            found.items(), key=lambda one: str(one[0])
        )
    ]


def _owners() -> Iterator[tuple[str, Owner]]:
    """Yield the device and the owner of each note beside the locks."""
    try:
        files = [*locks_folder().glob("*.*.json")]
    except OSError:
        return
    for file in files:
        if (owner := read_note(file)) is not None:
            yield file.name.rsplit(".", 2)[0], owner
