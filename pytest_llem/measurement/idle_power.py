"""Measure idle power with the model loaded, and compute the active energy: what inference adds to it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pytest_llem.energy.account import Account, Meters, Total, join_accounts
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import IdlePowerRecord
from pytest_llem.results.metrics import Method, Metric, metric, weakest
from pytest_llem.study.config import BASELINE_PARTS, BaselineConfig
from pytest_llem.times import now

#: Methods that can measure idle power. An estimate from CPU time would be 0.
IDLE_METHODS: tuple[Method, ...] = ("measured", "sampled")


def measure_idle_power(
    run_once: Callable[[], None],
    meters: Meters,
    loading: Total,
    config: BaselineConfig,
    *,
    known: IdlePowerRecord | None = None,
    on_idle: Callable[[], None] = lambda: None,
) -> IdlePowerRecord:
    """Return the idle power, measured after the engine has worked once to allocate all that it needs.

    Call it before warm-up: afterwards the machine is hot and its clocks are still high. The result of an earlier
    cycle is reused if the same meter read the same devices.

    Args:
        run_once: Makes the engine work once, and waits for it.
        meters: Open meters that have no window in progress.
        loading: Energy of loading the model, which shows the meters' method and devices.
        config: Whether and for how long to measure.
        known: Result of an earlier cycle of the same configuration; not reused if invalid.
        on_idle: Called when the idle time begins.

    Returns:
        The idle power, or the reason why there is none.
    """
    if reason := _reason_not_measured(meters, loading, config):
        return IdlePowerRecord(reason=reason)
    if known is not None and _matches(known, loading):
        return _reused(known)
    run_once()
    on_idle()
    measured_at = now()
    parts = [_measure_part(meters, config.part_seconds) for _ in range(BASELINE_PARTS)]
    return _record(parts, measured_at)


def measure_idle_power_after(
    idle_power: IdlePowerRecord,
    meters: Meters,
    config: BaselineConfig,
    window: Window,
    *,
    on_idle: Callable[[], None] = lambda: None,
) -> IdlePowerRecord:
    """Measure idle power briefly once more, and return *idle_power* with that value and the drift of idle power.

    Idle power drifts: by 0.2 % within half a minute on an H200, and more while a machine cools down. Two values
    estimate by how much it may have differed during the window. One is the difference between both measurements.
    The other covers the time between the window and the second measurement: the differences d between successive
    parts of the first measurement are taken for steps of a random walk. The means over two times T and τ with a
    gap g between them then differ with a variance of d²·(T + 3g + τ)/(2·part):
    u² = (after − idle_power)² + mean d² · (T + 3g + τ)/(2·part).

    Call it once the experiment's windows are over and nothing runs.

    Args:
        idle_power: Result of the first measurement.
        meters: Open meters that have no window in progress.
        config: How long to measure.
        window: The window whose active energy is computed.
        on_idle: Called when the idle time begins.
    """
    if idle_power.idle_power_w is None or idle_power.seconds is None:
        return idle_power
    gap = time.monotonic() - window.ended
    on_idle()
    account = _measure_part(meters, config.part_seconds)
    total, seconds = account.total, account.seconds
    if total.energy_j is None or not seconds or not _matches(idle_power, total):
        return idle_power
    after_w, part = total.energy_j / seconds, idle_power.seconds / len(idle_power.parts_w)
    squared_step = statistics.fmean((after - before) ** 2 for before, after in pairwise(idle_power.parts_w))
    walk_variance = squared_step * (window.seconds + 3 * gap + seconds) / (2 * part)
    return idle_power.model_copy(
        update={
            "after_w": after_w,
            "after_seconds": seconds,
            "drift_w": math.hypot(after_w - idle_power.idle_power_w, math.sqrt(walk_variance)),
            "invalid": idle_power.invalid or total.invalid,
        }
    )


def _measure_part(meters: Meters, seconds: float) -> Account:
    meters.begin()
    time.sleep(seconds)
    return meters.end()


def _matches(known: IdlePowerRecord, total: Total) -> bool:
    """Return whether *known* is valid, and from the same meter and devices as *total*."""
    metered = (known.source, known.boundary, tuple(known.devices))
    usable = known.idle_power_w is not None and known.invalid is None and len(known.parts_w) == BASELINE_PARTS
    return usable and metered == (total.source, total.boundary, total.devices)


def _reused(known: IdlePowerRecord) -> IdlePowerRecord:
    age = datetime.now(UTC) - datetime.fromisoformat(known.measured_at) if known.measured_at else None
    not_reused = {"after_w": None, "after_seconds": None, "drift_w": None}  # they belong to the earlier window
    return known.model_copy(update={**not_reused, "age_seconds": age.total_seconds() if age is not None else None})


def _reason_not_measured(meters: Meters, loading: Total, config: BaselineConfig) -> str | None:
    if not config.enabled:
        return "switched off by baseline.enabled"
    if not meters.meters:
        return loading.reason or "there is no meter"
    # A counter that failed while the model was loaded may work now.
    return None if loading.energy_j is None else _reason_by_method(loading)


def _reason_by_method(total: Total) -> str | None:
    """Return why the method of *total* cannot measure idle power; None if it can."""
    if total.method in IDLE_METHODS:
        return None
    return f"energy is {total.method} ({total.source}), which cannot measure idle power"


def _record(parts: Sequence[Account], measured_at: str) -> IdlePowerRecord:
    joined = join_accounts(parts)
    total, seconds = joined.total, joined.seconds
    if total.energy_j is None or not seconds:
        reason = total.reason or "no time was metered"
        return IdlePowerRecord(source=total.source, boundary=total.boundary, reason=reason)
    if reason_by_method := _reason_by_method(total):
        return IdlePowerRecord(source=total.source, boundary=total.boundary, reason=reason_by_method)
    parts_w = [
        part.total.energy_j / part.seconds for part in parts if part.total.energy_j is not None and part.seconds
    ]
    scatter = statistics.stdev(parts_w)
    # The scatter already contains the error of reading the meter: a meter without an uncertainty omits nothing.
    return IdlePowerRecord(
        idle_power_w=total.energy_j / seconds,
        uncertainty_w=math.hypot(scatter / math.sqrt(len(parts)), (total.uncertainty_j or 0.0) / seconds),
        seconds=seconds,
        method=total.method,
        source=total.source,
        boundary=total.boundary,
        devices=list(total.devices),
        measured_at=measured_at,
        age_seconds=0.0,
        parts_w=parts_w,
        invalid=next((part.total.invalid for part in parts if part.total.invalid), None),
    )


def idle_power_metrics(idle_power: IdlePowerRecord, window: Window) -> dict[str, Metric]:
    """Return idle power, and the active energy of a pass: its energy beyond idle power over the same boundary.

    The active energy of a window is ``E - P·t``, t being the metered time. Its standard uncertainty is
    ``u² = u_E² + t²·(u_P² + drift²)``: of reading the meter, of idle power, and of the drift of idle power until
    the window; None if one of these is unknown. A negative active energy is reported as it is.
    """
    idle = metric(
        "idle_power_w",
        idle_power.idle_power_w,
        uncertainty=idle_power.uncertainty_w,
        method=idle_power.method,
        source=idle_power.source,
        boundary=idle_power.boundary,
        devices=idle_power.devices or None,
        invalid=idle_power.invalid,
        reason=idle_power.reason,
    )
    return {"idle_power_w": idle, "active_energy_j": _active(idle, idle_power.drift_w, window)}


def _active(idle: Metric, drift_w: float | None, window: Window) -> Metric:
    account, passes = window.account, window.count
    whole = energy("active_energy_j", account.total, 1 / passes)
    if whole.value is None:
        return whole
    reason = f"no idle power: {idle.reason}" if idle.value is None else None
    if idle.value is not None and idle.boundary != whole.boundary:
        reason = f"idle power covers {idle.boundary}, and the window {whole.boundary}"
    if idle.value is None or reason:
        update = {"value": None, "uncertainty": None, "method": "unavailable", "reason": reason}
        return whole.model_copy(update=update)
    seconds = (account.seconds or window.seconds) / passes
    uncertainty = None
    if whole.uncertainty is not None and idle.uncertainty is not None and drift_w is not None:
        uncertainty = math.hypot(whole.uncertainty, seconds * idle.uncertainty, seconds * drift_w)
    active: dict[str, Any] = {
        "value": whole.value - idle.value * seconds,
        "uncertainty": uncertainty,
        "method": weakest((whole.method, idle.method)),
        "invalid": whole.invalid or idle.invalid,
    }
    return whole.model_copy(update=active)
