"""The idle machine with the model loaded: what inference adds to it is the active energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pytest_llem.backends.protocol import Engine
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import BaselineRecord
from pytest_llem.results.metrics import Method, Metric, metric, weakest
from pytest_llem.study.config import BaselineConfig

#: Methods that see what an idle machine draws. An estimate from CPU time would call it nothing.
REAL: tuple[Method, ...] = ("measured", "sampled")


def measure_baseline(
    engine: Engine,
    batch: Any,
    meters: Meters,
    loading: Total,
    config: BaselineConfig,
    *,
    on_idle: Callable[[], None] = lambda: None,
) -> BaselineRecord:
    """Let *engine* generate *batch* once, so that all it needs is in place, then measure while nothing runs.

    To be called before warm-up: after it the machine would be hot, and its clocks still up.

    Args:
        engine: Loaded.
        batch: One of its batches.
        meters: Open; no window has begun.
        loading: What they saw of loading the model, which tells how they measure.
        config: Whether, and for how long.
        on_idle: Called as the machine is left alone.

    Returns:
        What was found, or why nothing was.
    """
    if reason := _obstacle(meters, loading, config):
        return BaselineRecord(reason=reason)
    engine.generate(batch)
    engine.synchronize()
    on_idle()
    meters.begin()
    time.sleep(config.duration_seconds)
    return _record(meters.end())


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


def _record(account: Account) -> BaselineRecord:
    total = account.total
    if total.energy_j is None or not account.seconds:
        reason = total.reason or "no time was metered"
        return BaselineRecord(source=total.source, boundary=total.boundary, reason=reason)
    if blind := _blind(total):
        return BaselineRecord(source=total.source, boundary=total.boundary, reason=blind)
    return BaselineRecord(
        idle_context_w=total.energy_j / account.seconds,
        seconds=account.seconds,
        method=total.method,
        source=total.source,
        boundary=total.boundary,
    )


def baseline_metrics(baseline: BaselineRecord, window: Window) -> dict[str, Metric]:
    """Return the idle power, and what a pass took beyond it: of one boundary, and over the metered seconds."""
    idle = metric(
        "idle_context_w",
        baseline.idle_context_w,
        method=baseline.method,
        source=baseline.source,
        boundary=baseline.boundary,
        reason=baseline.reason,
    )
    return {"idle_context_w": idle, "active_energy_j": _active(idle, window)}


def _active(idle: Metric, window: Window) -> Metric:
    account, passes = window.account, len(window.passes)
    whole = energy("active_energy_j", account.total, 1 / passes)
    if whole.value is None:
        return whole
    reason = f"no baseline: {idle.reason}" if idle.value is None else None
    if idle.value is not None and idle.boundary != whole.boundary:
        reason = f"the baseline covers {idle.boundary}, and the window {whole.boundary}"
    if idle.value is None or reason:
        return whole.model_copy(update={"value": None, "method": "unavailable", "reason": reason})
    idle_j = idle.value * (account.seconds or window.seconds) / passes
    method = weakest((whole.method, idle.method))
    return whole.model_copy(update={"value": whole.value - idle_j, "method": method})
