"""What a reader of the figures has to know beside them."""

from __future__ import annotations

import statistics
import sys
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_llem.energy.account import SWITCHED_OFF, Account
from pytest_llem.energy.estimate import CPU_TIME_MODEL
from pytest_llem.energy.gpu_source import MAX_VALID_DISAGREEMENT, disagreement
from pytest_llem.measurement.contention import contention_warnings
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.window import Window
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import AdjustedSetting, EngineRecord, IdlePowerRecord, WarmupRecord
from pytest_llem.results.facts import MIN_TICKS
from pytest_llem.results.metrics import Metric, resolution
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import percentile

#: By what share a pass may grow or shrink from the window's first half to its second.
MAX_DRIFT = 0.05

#: By what share idle power may change from before the window to after it.
MAX_IDLE_CHANGE = 0.1

#: By how many °C a device may warm up or cool down over the window.
MAX_WARMING_C = 5.0


def find_warnings(
    window: Window,
    warmup: WarmupRecord | None,
    engine: EngineRecord,
    refusals: Mapping[str, str],
    *,
    allow_estimated: bool = False,
    cut: tuple[int, int] = (0, 0),
    prefill: Window | None = None,
    covers_engine: bool | None = None,
    roofline_slowdown: Metric | None = None,
    contention: Contention | None = None,
    idle_power: IdlePowerRecord | None = None,
    requests: Requests | None = None,
    repeats: str | None = None,
    tracer: str | None = None,
    library: Sequence[str] = (),
    adjusted: Sequence[AdjustedSetting] = (),
) -> list[QualityWarning]:
    """Return what a reader of the figures has to know, the worst first.

    Args:
        window: What was measured.
        warmup: What went before, if anything.
        engine: What ran.
        refusals: Why a meter could not be used, by its name.
        allow_estimated: An estimate of the energy is what was asked for.
        cut: How many prompts were cut to ``max_input_tokens``, and of how many.
        prefill: The window of prefill alone, if there was one.
        covers_engine: Whether the energy is that of the devices the engine ran on; None where that is not known.
        roofline_slowdown: How far above the least time a pass was.
        requests: Those of the window.
        contention: What else used the devices.
        idle_power: Idle power before and after the window, if it was measured.
        adjusted: Settings that did not run as they were given.
        repeats: How much faster passes were that repeat the first one's prompts; None where they were not.
        tracer: What slowed Python down; None where nothing did.
        library: What libraries warned of, a line each.
    """
    account, total = window.account, window.account.total
    reason = total.reason or ""
    refused = (f"{name}: {why}" for name, why in refusals.items())
    found = [QualityWarning.of("meter_refused", f"meter {one}") for one in refused if one not in reason]

    def warn(code: str, text: str) -> None:
        found.append(QualityWarning.of(code, text))

    found += requests.warnings() if requests is not None else ()
    for setting in adjusted:
        warn("setting_adjusted", str(setting))
    for one in (window, prefill):
        if one is not None and one.compiled is not None:
            warn("compiled", f"{one.compiled}; no gate judges it: let the batches have fewer different lengths")
    if repeats is not None:
        warn("repeats_faster", f"{repeats}; no gate judges it: switch its caches of prompts and answers off")
    if tracer is not None:
        warn(
            "traced",
            f"{tracer} and slows Python down; no gate judges it: measure without coverage, debugger and profiler",
        )
    if any(map(on_device, window.passes[0])):
        warn(
            "outputs_on_gpu",
            f"peak_memory_mb includes the outputs of {len(window.passes):,} passes: what the engine's generate "
            "returns is on the GPU",
        )
    if window.not_kept:
        warn(
            "passes_not_recorded",
            f"records of {len(window.passes):,} of {window.count:,} passes were kept: latencies, output tokens "
            "and failed requests are of those",
        )
    if total.energy_j is None and reason != SWITCHED_OFF:
        warn("no_energy", f"no energy: {reason}")
    if total.method == "estimated" and not allow_estimated:
        how = "from CPU time" if total.source == CPU_TIME_MODEL else f"by {total.source}"
        warn("energy_estimated", f"energy is estimated {how}, not measured")
    if cut[0]:
        warn("prompts_cut", f"{cut[0]} of {cut[1]} prompts were cut to max_input_tokens")
    if covers_engine is False:
        warn(
            "engine_not_covered", f"the engine ran on {engine.device}, and the energy covers {total.boundary} only"
        )
    found += _few_ticks("window", account)
    if total.method == "measured" and account.tick_seconds is None:
        warn(
            "tick_unknown",
            f"meter states no tick of {total.source}: whether the window is long enough for it was not checked",
        )
    if prefill is not None:
        found += _few_ticks("prefill window", prefill.account)
    found += _of_devices(account)
    found += contention_warnings(contention) if contention is not None else ()
    found += _idle_change(idle_power) if idle_power is not None else ()
    if window.drift is not None and abs(window.drift) > MAX_DRIFT:
        warn(
            "drift",
            f"drift: passes took {abs(window.drift):.0%} {'longer' if window.drift > 0 else 'less'} "
            "in the second half of the window",
        )
    if roofline_slowdown is not None and roofline_slowdown.value is not None and roofline_slowdown.value < 1:
        warn(
            "faster_than_roofline",
            f"roofline_slowdown is {roofline_slowdown.value:.2f}, and nothing is faster than 1: "
            "a bug of pytest-llem, or of its figures for this device; please report it",
        )
    if warmup is not None and warmup.converged is False:
        warn("warmup_not_converged", f"warm-up stopped after {warmup.runs} runs before latencies settled")
    for text in library:
        warn("library_warning", text)
    if engine.random_weights:
        warn("random_weights", "random weights: speed is real, power depends on the values and may differ")
    return sorted(found, key=lambda one: one.rank)


def _idle_change(idle_power: IdlePowerRecord) -> Iterator[QualityWarning]:
    """Yield that something else drew power while the idle machine was measured, or that it was not at rest."""
    before, after = idle_power.idle_power_w, idle_power.after_w
    if before is not None and after is not None and abs(after - before) > MAX_IDLE_CHANGE * before:
        text = f"idle power changed from {before:.3g} W to {after:.3g} W: active_energy_j may be off by as much"
        yield QualityWarning.of("idle_power_changed", text)


def _few_ticks(what: str, account: Account) -> Iterator[QualityWarning]:
    if account.tick_seconds and account.seconds and account.seconds < MIN_TICKS * account.tick_seconds:
        yield QualityWarning.of(
            "few_ticks",
            f"the {what} holds {account.seconds / account.tick_seconds:.0f} {resolution(account.total.method)}, "
            f"fewer than {MIN_TICKS}: raise measurement.min_window_seconds",
        )


def _of_devices(account: Account) -> Iterator[QualityWarning]:
    for device in account.devices:
        off = disagreement(device, account.seconds, account.tick_seconds)
        if off is not None:
            yield QualityWarning.of(
                "counter_disagrees",
                f"energy counter and sampled power disagree on {device.device}: "
                f"{device.energy_j:.4g} J and {device.integral_j:.4g} J ({off:+.1%})"
                + (": invalid, no gate judges it" if abs(off) > MAX_VALID_DISAGREEMENT else ""),
            )
        if device.counter_reason:
            yield QualityWarning.of(
                "counter_unused",
                f"energy counter of {device.device} was not used, its power was sampled: {device.counter_reason}",
            )
        if device.integral_reason:
            yield QualityWarning.of(
                "counter_unchecked",
                f"energy counter of {device.device} could not be checked: {device.integral_reason}",
            )
        conditions = device.conditions
        if conditions is None:
            continue
        for reason, seconds in (conditions.throttled_seconds or {}).items():
            if seconds > 0:
                yield QualityWarning.of(
                    "throttled", f"throttled: {device.device} for {seconds:.2g} s of the window by {reason}"
                )
        start, end = conditions.start_temperature_c, conditions.end_temperature_c
        if start is not None and end is not None and abs(end - start) > MAX_WARMING_C:
            yield QualityWarning.of(
                "temperature",
                f"temperature of {device.device} went from {start:.0f} to {end:.0f} °C within the window",
            )


def on_device(value: Any, depth: int = 3) -> bool:
    """Whether *value* is a tensor on a GPU, or holds one.

    Args:
        value: What an engine's ``generate`` returned.
        depth: Containers and objects to look into, one within another.
    """
    if getattr(value, "is_cuda", False) is True:
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        held = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    return any(on_device(one, depth - 1) for one in held)


def active_tracer() -> str | None:
    """Return what traces Python in this thread, in words; None where nothing does.

    Coverage, debuggers and profilers reach an experiment's process too, if they follow subprocesses.
    """
    for what, hook in (("trace function", sys.gettrace()), ("profile function", sys.getprofile())):
        if hook is not None:
            kind = hook if hasattr(hook, "__qualname__") else type(hook)
            return f"a {what} is set ({kind.__module__}.{kind.__qualname__})"
    monitoring: Any = getattr(sys, "monitoring", None)  # since Python 3.12
    for tool in range(6) if monitoring is not None else ():
        if (name := monitoring.get_tool(tool)) is not None and monitoring.get_events(tool):
            return f"sys.monitoring is in use ({name})"
    return "tracemalloc is on" if tracemalloc.is_tracing() else None


#: First runs are slower than later ones if most take so many times as long, and so many seconds longer. Of fewer
#: than ``FEW``, one that is held up by chance may decide: then it has to be more.
FACTOR, SECONDS = 1.5, 0.001
FEW, FACTOR_OF_FEW, SECONDS_OF_FEW = 5, 3.0, 0.010

#: The slowest tenth of later runs may have been held up.
_LATER = 90


def repeats_are_faster(window: Window, requests: Requests) -> str | None:
    """Return how much faster batches or first tokens are in later passes than in the first; None if they are not.

    The first pass has prompts that the engine has not seen before, and every later one repeats them: an engine
    that keeps answers, or what it has computed of prompts, is measured at looking them up.

    Args:
        window: What was measured.
        requests: Of it.
    """
    pass_seconds = [[seconds] for seconds in window.pass_seconds]
    # One for each batch: of its requests, all are held up if one is.
    first_tokens = [
        statistics.median([request.ttft_s or 0.0 for request in batch]) for batch in requests.batches()
    ]
    number = len(first_tokens) // len(requests.passes)
    ttft = [first_tokens[start : start + number] for start in range(0, len(first_tokens), number)]
    for what, runs in (("a batch", window.call_seconds), ("a pass", pass_seconds), ("a first token", ttft)):
        if (found := _typical(runs)) is not None:
            first, later = found
            return (
                f"{what} took {first * 1000:.4g} ms in the first pass and {later * 1000:.4g} ms in later ones, "
                "which repeat its prompts: the engine may answer them from a cache"
            )
    return None


def _typical(runs: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return how long the typical run takes in the first pass, and in later ones, in s; None where that is alike.

    Args:
        runs: For each pass, how long each run took, in s.
    """
    if len(runs) < 2:
        return None
    first, *others = runs
    few = len(first) < FEW
    factor, seconds = (FACTOR_OF_FEW, SECONDS_OF_FEW) if few else (FACTOR, SECONDS)
    later = [percentile([one[place] for one in others], _LATER) for place in range(len(first))]
    slower = [one > factor * again and one - again > seconds for one, again in zip(first, later, strict=True)]
    if 2 * sum(slower) <= len(slower):
        return None
    return statistics.median(first), statistics.median(later)
