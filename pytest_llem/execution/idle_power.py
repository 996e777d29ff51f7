"""What is known of the idle machine from one experiment to the next, in all processes of a session."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.machine.devices import CPU
from pytest_llem.machine.idle_power import measure_without_context, no_context_meter
from pytest_llem.results.metrics import weakest
from pytest_llem.study.config import ExperimentConfig

#: Topics on the board.
_CONTEXT, _BARE = "idle-context", "idle-bare"


def _point(config_hash: str, python: Path | None) -> str:
    return f"{config_hash} {python or ''}"


def known_idle_power(board: SharedState, config_hash: str, python: Path | None) -> dict[str, Any] | None:
    """Return what an earlier cycle of the session has found, a BaselineRecord as plain data; None for nothing.

    Args:
        board: The session's.
        config_hash: Of the point.
        python: The interpreter that it runs in; None for this one.
    """
    found: dict[str, Any] | None = board.read(_point(config_hash, python), _CONTEXT)
    return found


def keep_idle_power(board: SharedState, config_hash: str, python: Path | None, result: str) -> None:
    """Keep what an experiment has found for the later cycles of its point, if it was found there.

    Args:
        board: The session's.
        config_hash: Of the point.
        python: The interpreter that it ran in; None for this one.
        result: The experiment's, as JSON text.
    """
    idle_power = json.loads(result).get("idle_power")
    if idle_power and idle_power.get("idle_power_w") is not None and idle_power.get("age_seconds") == 0:
        with suppress(OSError):  # then the next one measures it again
            board.put(_point(config_hash, python), _CONTEXT, idle_power)


def no_context_is_due(board: SharedState, config: ExperimentConfig, devices: Collection[str]) -> bool:
    """Whether :func:`measure_bare_once` would measure."""
    name, gpus = _meter(config, devices)
    return name is not None and any(board.read(one, _BARE) is None for one in _places(name, gpus))


def measure_no_context_once(
    board: SharedState, config: ExperimentConfig, devices: Collection[str], on_idle: Callable[[], None]
) -> None:
    """Measure what the bare machine draws, where an experiment wants that and nobody has yet in this session.

    To be called by who owns *devices*, before the experiment.

    Args:
        board: The session's.
        config: The experiment.
        devices: What it runs on, as it is owned.
        on_idle: Called as the waiting begins.
    """
    name, gpus = _meter(config, devices)
    new = [one for one in _places(name, gpus) if board.read(one, _BARE) is None] if name else []
    if not name or not new:
        return
    found = measure_without_context(name, [gpu for gpu in gpus if _places(name, [gpu])[0] in new], on_idle=on_idle)
    watts = found.get("idle_power_no_context_w") or {}
    for place in new:
        own = {device: w for device, w in watts.items() if not gpus or place == f"{name} {device}"}
        with suppress(OSError):  # then it is measured again
            board.put(place, _BARE, {**found, "idle_power_no_context_w": own})


def no_context_fields(board: SharedState, config: ExperimentConfig, devices: Collection[str]) -> dict[str, Any]:
    """Return the fields of a BaselineRecord that tell of the bare machine.

    Args:
        board: The session's.
        config: The experiment, which is about to start.
        devices: What it runs on, as it is owned.
    """
    name, gpus = _meter(config, devices)
    if name is None:
        return {"no_context_reason": no_context_meter(config, gpus)[1]}
    found = [notice for place in _places(name, gpus) if (notice := board.read(place, _BARE)) is not None]
    watts = {device: w for one in found for device, w in one["idle_power_no_context_w"].items()}
    fields: dict[str, Any] = {
        "idle_power_no_context_w": watts or None,
        "no_context_method": weakest(one.get("no_context_method") for one in found),
        "no_context_source": _one_of(found, "no_context_source"),
        "no_context_reason": _one_of(found, "no_context_reason"),
    }
    if watts:
        since = min(datetime.fromisoformat(one["measured_at"]) for one in found)
        fields["no_context_age_seconds"] = (datetime.now(UTC) - since).total_seconds()
    elif fields["no_context_reason"] is None:
        fields["no_context_reason"] = "it was not measured before this experiment"
    return fields


def _meter(config: ExperimentConfig, devices: Collection[str]) -> tuple[str | None, list[str]]:
    gpus = sorted(set(devices) - {CPU})
    name, _ = no_context_meter(config, gpus)
    return name, gpus if name == "nvml" else []


def _places(name: str | None, gpus: Iterable[str]) -> list[str]:
    """Return where on the board what a meter has found is."""
    return [f"{name} {one}" for one in list(gpus) or [CPU]]


def _one_of(found: Iterable[dict[str, Any]], field: str) -> str | None:
    return "; ".join(dict.fromkeys(one[field] for one in found if one.get(field))) or None
