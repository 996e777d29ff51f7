"""Find the quality warnings of an experiment: what its reader has to know beside the metrics."""

from __future__ import annotations

import math
import statistics
import sys
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pytest_llem.energy.account import INVALID_DISAGREEMENT, SWITCHED_OFF, Account, disagreement
from pytest_llem.energy.estimate import CPU_TIME_MODEL
from pytest_llem.measurement.contention import contention_warnings
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.experiment import ExperimentResult, IdlePowerRecord
from pytest_llem.results.facts import MIN_TICKS
from pytest_llem.results.metrics import resolution
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import percentile

#: Largest relative change of the pass duration from the window's first half to its second without a warning.
MAX_DRIFT = 0.05

#: Largest relative change of idle power from before the window to after it without a warning.
MAX_IDLE_CHANGE = 0.1

#: Largest temperature change of a device over the window without a warning, in °C.
MAX_WARMING_C = 5.0


def find_warnings(result: ExperimentResult, others: Iterable[QualityWarning]) -> list[QualityWarning]:
    """Return the quality warnings of a result, the most severe first.

    Args:
        result: The result, without its warnings.
        others: Warnings that do not follow from its records.
    """
    return sorted((*_record_warnings(result), *others), key=lambda one: one.rank)


def _record_warnings(result: ExperimentResult) -> Iterator[QualityWarning]:
    for setting in result.adjusted:
        yield QualityWarning.of("setting_adjusted", str(setting))
    for window in (result.window, result.prefill_window):
        if window is not None and window.compiled is not None:
            text = f"{window.compiled}; no gate judges it: use batches of fewer different lengths"
            yield QualityWarning.of("compiled", text)
    energy, roofline = result.metrics["energy_j"], result.metrics["roofline_slowdown"].value
    if energy.covers_engine is False:
        text = f"the engine ran on {result.engine.device}, and the energy covers {energy.boundary} only"
        yield QualityWarning.of("engine_not_covered", text)
    if result.contention is not None:
        yield from contention_warnings(result.contention)
    if result.idle_power is not None:
        yield from _idle_change(result.idle_power)
    if roofline is not None and roofline < 1:
        yield QualityWarning.of(
            "faster_than_roofline",
            f"roofline_slowdown is {roofline:.2f}, and less than 1 is impossible: "
            "a bug of pytest-llem, or wrong peaks of this device; please report it",
        )
    if result.warmup is not None and result.warmup.converged is False:
        text = f"warm-up stopped after {result.warmup.runs} runs before latencies settled"
        yield QualityWarning.of("warmup_not_converged", text)
    if result.engine.random_weights:
        text = "random weights: speed is real, power depends on the values and may differ"
        yield QualityWarning.of("random_weights", text)


def energy_warnings(
    account: Account,
    refusals: Mapping[str, str],
    *,
    allow_estimated: bool = False,
    prefill: Account | None = None,
) -> Iterator[QualityWarning]:
    """Yield the quality warnings about the energy of a window.

    Args:
        account: The meters' readings.
        refusals: Reasons why meters could not be used, by name.
        allow_estimated: Whether the study accepts estimated energy.
        prefill: Readings of the window of prefill alone; None if there was none.
    """
    total, reason = account.total, account.total.reason or ""
    refused = (f"{name}: {why}" for name, why in refusals.items())
    yield from (QualityWarning.of("meter_refused", f"meter {one}") for one in refused if one not in reason)
    if total.energy_j is None and reason != SWITCHED_OFF:
        yield QualityWarning.of("no_energy", f"no energy: {reason}")
    if total.method == "estimated" and not allow_estimated:
        how = "from CPU time" if total.source == CPU_TIME_MODEL else f"by {total.source}"
        yield QualityWarning.of("energy_estimated", f"energy is estimated {how}, not measured")
    if total.method == "measured" and account.tick_seconds is None:
        yield QualityWarning.of(
            "tick_unknown",
            f"meter does not report the tick of {total.source}: it was not checked that the window is long enough",
        )
    yield from _few_ticks("window", account)
    if prefill is not None:
        yield from _few_ticks("prefill window", prefill)
    yield from _device_warnings(account)


def disturbance_warnings(repeats_faster: str | None, tracer: str | None) -> Iterator[QualityWarning]:
    """Yield the quality warnings about conditions under which no gate judges a result.

    Args:
        repeats_faster: Message of :func:`faster_repeats_warning`.
        tracer: Message of :func:`tracer_warning`.
    """
    if repeats_faster is not None:
        text = f"{repeats_faster}; no gate judges it: disable the engine's caches of prompts and answers"
        yield QualityWarning.of("repeats_faster", text)
    if tracer is not None:
        text = (
            f"{tracer} and slows Python down; no gate judges it: measure without coverage, debugger and profiler"
        )
        yield QualityWarning.of("traced", text)


def pass_warnings(window: PassWindow, truncated: tuple[int, int] = (0, 0)) -> Iterator[QualityWarning]:
    """Yield the quality warnings about the passes of *window*.

    Args:
        window: The measured window.
        truncated: Number of prompts that were truncated to ``max_input_tokens``, and of all prompts.
    """
    if truncated[0]:
        number, prompts = truncated
        yield QualityWarning.of("prompts_cut", f"{number} of {prompts} prompts were cut to max_input_tokens")
    if any(map(on_device, window.passes[0])):
        yield QualityWarning.of(
            "outputs_on_gpu",
            f"peak_memory_mb includes the outputs of {len(window.passes):,} passes: what the engine's generate "
            "returns is on the GPU",
        )
    if window.not_kept:
        yield QualityWarning.of(
            "passes_not_recorded",
            f"records of {len(window.passes):,} of {window.count:,} passes were kept: latencies, output tokens "
            "and failed requests include only these",
        )
    if window.drift is not None and abs(window.drift) > MAX_DRIFT:
        yield QualityWarning.of(
            "drift",
            f"drift: passes took {abs(window.drift):.0%} {'longer' if window.drift > 0 else 'less'} "
            "in the second half of the window",
        )


def _idle_change(idle_power: IdlePowerRecord) -> Iterator[QualityWarning]:
    """Yield a warning if idle power changed: something else drew power, or the machine was not idle."""
    before, after = idle_power.idle_power_w, idle_power.after_w
    if before is not None and after is not None and abs(after - before) > MAX_IDLE_CHANGE * before:
        yield QualityWarning.of(
            "idle_power_changed",
            f"idle power changed from {_figure(before)} W to {_figure(after)} W: active_energy_j may be off by "
            "the difference × its time",
        )


def _few_ticks(what: str, account: Account) -> Iterator[QualityWarning]:
    if account.ticks is not None and account.ticks < MIN_TICKS:
        yield QualityWarning.of(
            "few_ticks",
            f"the {what} holds {math.floor(account.ticks)} {resolution(account.total.method)}, "
            f"fewer than {MIN_TICKS}: raise measurement.min_window_seconds",
        )


def _device_warnings(account: Account) -> Iterator[QualityWarning]:
    for device in account.devices:
        off = disagreement(device, account.ticks)
        if off is not None and device.energy_j is not None and device.integral_j is not None:
            yield QualityWarning.of(
                "counter_disagrees",
                f"energy counter and sampled power disagree on {device.device}: "
                f"{_figure(device.energy_j, 4)} J and {_figure(device.integral_j, 4)} J"
                + (f" ({off:+.1%})" if math.isfinite(off) else "")
                + (": invalid, no gate judges it" if abs(off) > INVALID_DISAGREEMENT else ""),
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
                    "throttled",
                    f"throttled: {device.device} for {_figure(seconds, 2)} s of the window by {reason}",
                )
        start, end = conditions.start_temperature_c, conditions.end_temperature_c
        if start is not None and end is not None and abs(end - start) > MAX_WARMING_C:
            yield QualityWarning.of(
                "temperature",
                f"temperature of {device.device} went from {start:.0f} to {end:.0f} °C within the window",
            )


def on_device(value: Any, depth: int = 3) -> bool:
    """Return whether *value* is or contains a tensor on a GPU.

    Args:
        value: Return value of an engine's ``generate``.
        depth: Maximum nesting of containers and objects to search.
    """
    if getattr(value, "is_cuda", False) is True:
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        contents = list(value.values())
    elif isinstance(value, list | tuple):
        contents = list(value)
    else:
        contents = list(getattr(value, "__dict__", {}).values())
    return any(on_device(one, depth - 1) for one in contents)


def tracer_warning() -> str | None:
    """Return a message about what traces Python; None if nothing does.

    Coverage tools, debuggers and profilers that follow subprocesses also trace an experiment's process.
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


#: The first pass is slower than later ones if most of its durations are this many times as long, and this many
#: seconds longer. With fewer than ``MIN_DURATIONS`` one chance delay may decide, so the limits are higher.
SLOWER_FACTOR, SLOWER_SECONDS = 1.5, 0.001
MIN_DURATIONS, SLOWER_FACTOR_OF_FEW, SLOWER_SECONDS_OF_FEW = 5, 3.0, 0.010

#: Percentile of the later passes' durations to compare with: the slowest tenth may have been delayed.
_LATER_PERCENTILE = 90


def faster_repeats_warning(window: PassWindow, requests: Requests) -> str | None:
    """Return a message if batches, passes or first tokens are slower in the first pass than later; None if not.

    Every later pass repeats the prompts of the first: an engine that caches answers, or the keys and values of
    prompts, would only look them up. A delay in the first pass looks the same.

    Args:
        window: The measured window.
        requests: Its requests.
    """
    pass_seconds = [[seconds] for seconds in window.pass_seconds]
    for what, durations in (
        ("a batch", window.call_seconds),
        ("a pass", pass_seconds),
        ("a first token", _first_token_seconds(requests)),
    ):
        if (medians := _medians_if_slower(durations)) is not None:
            first, later = (_figure(seconds * 1000, 4) for seconds in medians)
            return (
                f"{what} took {first} ms in the first pass and {later} ms in later ones, "
                "which repeat its prompts: the engine may answer them from a cache"
            )
    return None


def _first_token_seconds(requests: Requests) -> list[list[float]]:
    """Return the TTFT of each batch of each pass, in s; nothing if a request, such as a failed one, has none.

    A batch has one value, the median: a delay affects all its requests.
    """
    medians = []
    for batch in requests.batches():
        known = [request.ttft_s for request in batch if request.ttft_s is not None]
        if len(known) < len(batch) or not known:
            return []
        medians.append(statistics.median(known))
    number = max(1, len(medians) // len(requests.passes))
    return [medians[start : start + number] for start in range(0, len(medians), number)]


def _figure(value: float, digits: int = 3) -> str:
    """Return *value* with *digits* significant digits, and with all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _medians_if_slower(durations: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the median duration in the first pass and in later passes, in s; None if the first is not slower.

    Args:
        durations: For each pass, the durations to compare, in s: of its batches, of the pass, or until the
            first token of each batch.
    """
    if len(durations) < 2:
        return None
    first, *others = durations
    is_few = len(first) < MIN_DURATIONS
    factor, seconds = (SLOWER_FACTOR_OF_FEW, SLOWER_SECONDS_OF_FEW) if is_few else (SLOWER_FACTOR, SLOWER_SECONDS)
    later = [percentile([one[place] for one in others], _LATER_PERCENTILE) for place in range(len(first))]
    slower = [one > factor * again and one - again > seconds for one, again in zip(first, later, strict=True)]
    if 2 * sum(slower) <= len(slower):
        return None
    return statistics.median(first), statistics.median(later)
