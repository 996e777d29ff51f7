"""The idle machine with the model loaded: what inference adds to it is the active energy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.engines.protocol import Engine
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import IdlePowerRecord
from pytest_llem.results.manifest import now
from pytest_llem.results.metrics import Method, Metric, metric, weakest
from pytest_llem.study.config import BASELINE_PARTS, BaselineConfig

#: Methods that see what an idle machine draws. An estimate from CPU time would call it nothing.
REAL: tuple[Method, ...] = ("measured", "sampled")


def measure_idle_power(
    engine: Engine,
    batch: Any,
    meters: Meters,
    loading: Total,
    config: BaselineConfig,
    *,
    known: IdlePowerRecord | None = None,
    on_idle: Callable[[], None] = lambda: None,
) -> IdlePowerRecord:
    """Let *engine* generate *batch* once, so that all it needs is in place, then measure while nothing runs.

    To be called before warm-up: after it the machine would be hot, and its clocks still up. What an earlier cycle
    has found is taken in its place where the same meter read the same devices.

    Args:
        engine: Loaded.
        batch: One of its batches.
        meters: Open; no window has begun.
        loading: What they saw of loading the model, which tells how they measure.
        config: Whether, and for how long.
        known: What an earlier cycle of the same configuration has found; not taken where it is invalid.
        on_idle: Called as the machine is left alone.

    Returns:
        What was found, or why nothing was.
    """
    if reason := _obstacle(meters, loading, config):
        return IdlePowerRecord(reason=reason)
    if known is not None and _fits(known, loading):
        return _reused(known)
    engine.generate(batch)
    engine.synchronize()
    on_idle()
    measured_at = now()
    parts = [_part(meters, config.part_seconds) for _ in range(BASELINE_PARTS)]
    return _record(parts, measured_at)


def measure_idle_power_after(
    idle_power: IdlePowerRecord,
    meters: Meters,
    config: BaselineConfig,
    window: Window,
    *,
    on_idle: Callable[[], None] = lambda: None,
) -> IdlePowerRecord:
    """Measure idle power once more, shortly, and return *idle_power* with it and with how far idle power drifts.

    Idle power changes by itself, by 0.2 % within half a minute on an H200, and more while a machine cools down.
    Two figures tell how far what it was during the window may be from idle power: their difference itself, and
    for the time from within the window to now, the differences d of one part of idle power and the next, taken
    to be those of a random walk. Means over times T and τ that are g apart then differ by a variance of
    d²·(T + 3g + τ)/(2·part): u² = (after − idle_power)² + mean d² · (T + 3g + τ)/(2·part).

    To be called once the experiment's windows are over, and nothing runs.

    Args:
        idle_power: What was found before, or why nothing was.
        meters: Open; no window has begun.
        config: For how long.
        window: The one whose active energy is asked for.
        on_idle: Called as the machine is left alone.
    """
    if idle_power.idle_power_w is None or idle_power.seconds is None:
        return idle_power
    gap = time.monotonic() - (window.began + window.seconds)
    on_idle()
    account = _part(meters, config.part_seconds)
    total, seconds = account.total, account.seconds
    if total.energy_j is None or not seconds or not _fits(idle_power, total):
        return idle_power
    after_w, part = total.energy_j / seconds, idle_power.seconds / len(idle_power.parts_w)
    steps = statistics.fmean((after - before) ** 2 for before, after in pairwise(idle_power.parts_w))
    walked = steps * (window.seconds + 3 * gap + seconds) / (2 * part)
    return idle_power.model_copy(
        update={
            "after_w": after_w,
            "after_seconds": seconds,
            "drift_w": math.hypot(after_w - idle_power.idle_power_w, math.sqrt(walked)),
            "invalid": idle_power.invalid or total.invalid,
        }
    )


def _part(meters: Meters, seconds: float) -> Account:
    meters.begin()
    time.sleep(seconds)
    return meters.end()


def _fits(known: IdlePowerRecord, loading: Total) -> bool:
    theirs = (known.source, known.boundary, tuple(known.devices))
    usable = known.idle_power_w is not None and known.invalid is None and len(known.parts_w) == BASELINE_PARTS
    return usable and theirs == (loading.source, loading.boundary, loading.devices)


def _reused(known: IdlePowerRecord) -> IdlePowerRecord:
    age = datetime.now(UTC) - datetime.fromisoformat(known.measured_at) if known.measured_at else None
    own = {"after_w": None, "after_seconds": None, "drift_w": None}  # of the experiment that it is from
    return known.model_copy(update={**own, "age_seconds": age.total_seconds() if age is not None else None})


def _obstacle(meters: Meters, loading: Total, config: BaselineConfig) -> str | None:
    if not config.enabled:
        return "switched off by baseline.enabled"
    if not meters.meters:
        return loading.reason or "there is no meter"
    return None if loading.energy_j is None else _blind(loading)  # a counter that failed then may do now


def _blind(total: Total) -> str | None:
    if total.method in REAL:
        return None
    return f"energy is {total.method} ({total.source}), which tells nothing of an idle machine"


def _record(parts: Sequence[Account], measured_at: str) -> IdlePowerRecord:
    totals = [part.total for part in parts]
    last = totals[-1]
    seconds = [part.seconds for part in parts if part.seconds]
    energies = [total.energy_j for total in totals if total.energy_j is not None]
    if len(energies) < len(parts) or len(seconds) < len(parts):
        reason = next((total.reason for total in totals if total.reason), "no time was metered")
        return IdlePowerRecord(source=last.source, boundary=last.boundary, reason=reason)
    if blind := next(filter(None, map(_blind, totals)), None):
        return IdlePowerRecord(source=last.source, boundary=last.boundary, reason=blind)
    parts_w = [energy_j / s for energy_j, s in zip(energies, seconds, strict=True)]
    scatter = statistics.stdev(parts_w)
    # What reading the meter adds shows in the scatter already: one that does not tell leaves nothing out.
    edges = math.hypot(*(total.uncertainty_j or 0.0 for total in totals))
    return IdlePowerRecord(
        idle_power_w=sum(energies) / sum(seconds),
        uncertainty_w=math.hypot(scatter / math.sqrt(len(parts)), edges / sum(seconds)),
        seconds=sum(seconds),
        method=weakest(total.method for total in totals) or "unavailable",
        source=last.source,
        boundary=last.boundary,
        devices=list(last.devices),
        measured_at=measured_at,
        age_seconds=0.0,
        parts_w=parts_w,
        invalid=next((total.invalid for total in totals if total.invalid), None),
    )


def idle_power_metrics(idle_power: IdlePowerRecord, window: Window) -> dict[str, Metric]:
    """Return the idle power, and what a pass took beyond it: of one boundary, and over the metered seconds.

    The active energy of a window is ``E - P·t``, and its standard uncertainty ``u² = u_E² + t²·(u_P² + drift²)``:
    of reading the meter, of idle power, and of idle power's own changes until the window; not known where one of
    these is not. It is below 0 where the idle machine took more, and stays so.
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
    found: dict[str, Any] = {
        "value": whole.value - idle.value * seconds,
        "uncertainty": uncertainty,
        "method": weakest((whole.method, idle.method)),
        "invalid": whole.invalid or idle.invalid,
    }
    return whole.model_copy(update=found)
