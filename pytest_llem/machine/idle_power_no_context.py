"""Measure idle power without a CUDA context, before a session's first experiment on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pytest_llem import registry
from pytest_llem.energy.account import Account, Meters
from pytest_llem.energy.protocol import Meter
from pytest_llem.results.metrics import weakest
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.times import now

#: Duration of the measurement, in s.
SECONDS = 5.0

#: Meters that work without an engine, and that pytest's process may open: they create no CUDA context.
METERS = ("nvml", "rapl")


def no_context_meter(config: ExperimentConfig, gpus: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the name of the meter for idle power without a context, or None and the reason why there is none.

    Args:
        config: The experiment.
        gpus: UUIDs of the GPUs that it runs on.
    """
    backend = config.energy.backend
    if not config.baseline.enabled:
        return None, "switched off by baseline.enabled"
    if backend is None:
        return None, "switched off by energy.backend"
    if backend == AUTO:
        return ("nvml" if gpus else "rapl"), None
    return (backend, None) if backend in METERS else (None, f"meter {backend!r} is used only in experiments")


def measure_without_context(
    name: str,
    gpus: Sequence[str],
    *,
    on_idle: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Measure the idle power of devices, and return it as fields of an IdlePowerRecord.

    No CUDA context is created. If the meter cannot be opened, this does not wait.

    Args:
        name: Name of the meter.
        gpus: UUIDs of GPUs; empty for the CPU.
        on_idle: Called when the idle time begins.
        sleep: Sleeps for the given seconds.

    Returns:
        ``idle_power_no_context_w``, ``no_context_method``, ``no_context_source``, ``no_context_reason`` and
        ``measured_at``; only the last two if the meter cannot be opened.
    """
    try:
        meter = _meter(name)
        meter.open(gpus)
    except Exception as error:  # a broken NVML library may raise anything
        return {"no_context_reason": f"{name}: {error}", "measured_at": now()}
    meters = Meters({name: meter})
    try:
        meters.begin()
        on_idle()
        sleep(SECONDS)
        return _fields(meters.end())
    finally:
        meters.close()


def _meter(name: str) -> Meter:
    kind = registry.load(registry.METER_GROUP, name)
    meter: Meter = kind(sampler=False) if name == "nvml" else kind()
    return meter


def _fields(account: Account) -> dict[str, Any]:
    read = [one for one in account.devices if one.energy_j is not None]
    watts = {}
    for one in read:
        if one.energy_j is not None and (seconds := one.seconds or account.seconds):
            watts[one.device] = one.energy_j / seconds
    missing = [f"{one.device}: {one.reason}" for one in account.devices if one.device not in watts]
    if not account.devices:
        missing = [account.total.reason or "no device was read"]
    return {
        "idle_power_no_context_w": watts or None,
        "no_context_method": weakest(one.method for one in read),
        "no_context_source": "+".join(dict.fromkeys(one.source for one in read)) or None,
        "no_context_reason": "; ".join(missing) or None,
        "measured_at": now(),
    }
