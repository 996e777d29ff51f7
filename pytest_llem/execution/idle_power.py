"""Share measured idle power between the experiments of a session, in all its processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.machine.device_locks import CPU
from pytest_llem.machine.idle_power_no_context import measure_without_context, no_context_meter
from pytest_llem.results.metrics import weakest
from pytest_llem.study.config import ExperimentConfig

#: Topics of the shared state: idle power with and without a CUDA context.
_CONTEXT, _NO_CONTEXT = "idle-context", "idle-no-context"


def _shared_key(key: str, python: Path | None) -> str:
    return f"{key} {python or ''}"


def known_idle_power(shared_state: SharedState, key: str, python: Path | None) -> dict[str, Any] | None:
    """Return the idle power that an earlier experiment with the same *key* measured.

    Args:
        shared_state: The session's shared state.
        key: Identifies what was idle: the point or its server, and the devices.
        python: The interpreter that loads the model; None for this one.

    Returns:
        An IdlePowerRecord as plain data; None if none measured it.
    """
    found: dict[str, Any] | None = shared_state.read(_shared_key(key, python), _CONTEXT)
    return found


def keep_idle_power(shared_state: SharedState, key: str, python: Path | None, result: Mapping[str, Any]) -> None:
    """Keep the idle power that an experiment measured itself, for later ones with the same *key*.

    Args:
        shared_state: The session's shared state.
        key: Identifies what was idle: the point or its server, and the devices.
        python: The interpreter that loads the model; None for this one.
        result: The experiment's result as plain data.
    """
    idle_power = result.get("idle_power")
    if idle_power and idle_power.get("idle_power_w") is not None and idle_power.get("age_seconds") == 0:
        with suppress(OSError):  # the next experiment then measures it again
            shared_state.put(_shared_key(key, python), _CONTEXT, idle_power)


def no_context_is_due(shared_state: SharedState, config: ExperimentConfig, devices: Collection[str]) -> bool:
    """Return whether :func:`measure_no_context_once` would measure."""
    name, _, parts = _meter(config, devices)
    return name is not None and None in _known(shared_state, name, parts).values()


def measure_no_context_once(
    shared_state: SharedState, config: ExperimentConfig, devices: Collection[str], on_idle: Callable[[], None]
) -> None:
    """Measure idle power without a CUDA context, once in a session, if the experiment asks for it.

    Call it before the experiment, while this process owns *devices*.

    Args:
        shared_state: The session's shared state.
        config: The experiment.
        devices: Names of the owned devices.
        on_idle: Called as the measurement begins.
    """
    name, _, parts = _meter(config, devices)
    if name is None:
        return
    new = [part for part, known in _known(shared_state, name, parts).items() if known is None]
    if not new:
        return
    found = measure_without_context(name, [part for part in new if part != CPU], on_idle=on_idle)
    watts = found.get("idle_power_no_context_w") or {}
    for part in new:
        own = {device: w for device, w in watts.items() if part in (CPU, device)}
        with suppress(OSError):  # the next experiment then measures it again
            shared_state.put(f"{name} {part}", _NO_CONTEXT, {**found, "idle_power_no_context_w": own})


def no_context_fields(
    shared_state: SharedState, config: ExperimentConfig, devices: Collection[str]
) -> dict[str, Any]:
    """Return the fields of an IdlePowerRecord that describe idle power without a context.

    Args:
        shared_state: The session's shared state.
        config: The experiment, which is about to start.
        devices: Names of the owned devices.
    """
    name, reason, parts = _meter(config, devices)
    if name is None:
        return {"no_context_reason": reason}
    found = [one for one in _known(shared_state, name, parts).values() if one is not None]
    watts = {device: w for one in found for device, w in one["idle_power_no_context_w"].items()}
    fields: dict[str, Any] = {
        "idle_power_no_context_w": watts or None,
        "no_context_method": weakest(one.get("no_context_method") for one in found),
        "no_context_source": _joined(found, "no_context_source"),
        "no_context_reason": _joined(found, "no_context_reason"),
    }
    if watts:
        since = min(datetime.fromisoformat(one["measured_at"]) for one in found)
        fields["no_context_age_seconds"] = (datetime.now(UTC) - since).total_seconds()
    elif fields["no_context_reason"] is None:
        fields["no_context_reason"] = "it was not measured before this experiment"
    return fields


def _meter(config: ExperimentConfig, devices: Collection[str]) -> tuple[str | None, str | None, list[str]]:
    """Return the name of a meter, or why there is none, and what it measures separately: GPUs, or the CPU."""
    gpus = sorted(set(devices) - {CPU})
    name, reason = no_context_meter(config, gpus)
    return name, reason, (gpus if name == "nvml" else []) or [CPU]


def _known(shared_state: SharedState, name: str, parts: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """Return what this session has measured with a meter, for each of *parts*; None for what it has not."""
    return {part: shared_state.read(f"{name} {part}", _NO_CONTEXT) for part in parts}


def _joined(found: Iterable[dict[str, Any]], field: str) -> str | None:
    return "; ".join(dict.fromkeys(one[field] for one in found if one.get(field))) or None
