"""What a reader of the figures has to know beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pytest_llem.energy.account import SWITCHED_OFF, Account
from pytest_llem.energy.estimate import CPU_TIME_MODEL
from pytest_llem.energy.validity import MAX_VALID_DISAGREEMENT, disagreement
from pytest_llem.measurement.contention import contention_warnings
from pytest_llem.measurement.window import Window
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import EngineRecord, WarmupRecord
from pytest_llem.results.facts import FEWEST_TICKS
from pytest_llem.results.metrics import Metric, resolution
from pytest_llem.results.severity import severity

#: By what share a pass may grow or shrink from the window's first half to its second.
MOST_DRIFT = 0.05

#: By how many °C a device may warm up or cool down over the window.
MOST_WARMING_C = 5.0


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
    times_floor: Metric | None = None,
    deterministic: bool | None = None,
    contention: Contention | None = None,
    failed: str | None = None,
    repeats: str | None = None,
    library: Sequence[str] = (),
) -> list[str]:
    """Return what a reader of the figures has to know, a sentence each, the worst first.

    Args:
        window: What was measured.
        warmup: What went before, if anything.
        engine: What ran.
        refusals: Why a meter could not be used, by its name.
        allow_estimated: An estimate of the energy is what was asked for.
        cut: How many prompts were cut to ``max_input_tokens``, and of how many.
        prefill: The window of prefill alone, if there was one.
        covers_engine: Whether the energy is that of the devices the engine ran on; None where that is not known.
        times_floor: How far above the least time a pass was.
        failed: That requests failed, if any did.
        deterministic: Whether every pass, seeded alike, generated the same tokens; None where it was one pass.
        contention: What else used the devices.
        repeats: How much faster passes were that repeat the first one's prompts; None where they were not.
        library: What libraries warned of, a line each.
    """
    account, total = window.account, window.account.total
    reason = total.reason or ""
    refused = (f"{name}: {why}" for name, why in refusals.items())
    found = [f"meter {one}" for one in refused if one not in reason]
    if failed is not None:
        found.append(f"{failed}; no gate judges what was measured over them")
    for one in (window, prefill):
        if one is not None and one.compiled is not None:
            found.append(f"{one.compiled}; no gate judges it: let the batches have fewer different lengths")
    if repeats is not None:
        found.append(f"{repeats}; no gate judges it: switch its caches of prompts and answers off")
    if total.energy_j is None and reason != SWITCHED_OFF:
        found.append(f"no energy: {reason}")
    if total.method == "estimated" and not allow_estimated:
        how = "from CPU time" if total.source == CPU_TIME_MODEL else f"by {total.source}"
        found.append(f"energy is estimated {how}, not measured")
    if cut[0]:
        found.append(f"{cut[0]} of {cut[1]} prompts were cut to max_input_tokens")
    if deterministic is False:
        found.append("outputs differ between passes: this device's kernels are not deterministic")
    if covers_engine is False:
        found.append(f"the engine ran on {engine.device}, and the energy covers {total.boundary} only")
    found += _few_ticks("window", account)
    if total.method == "measured" and account.tick_seconds is None:
        found.append(
            f"meter states no tick of {total.source}: whether the window is long enough for it was not checked"
        )
    if prefill is not None:
        found += _few_ticks("prefill window", prefill.account)
    found += _of_devices(account)
    found += contention_warnings(contention) if contention is not None else ()
    if window.drift is not None and abs(window.drift) > MOST_DRIFT:
        found.append(
            f"drift: passes took {abs(window.drift):.0%} {'longer' if window.drift > 0 else 'less'} "
            "in the second half of the window"
        )
    if times_floor is not None and times_floor.value is not None and times_floor.value < 1:
        found.append(
            f"times_floor is {times_floor.value:.2f}, and nothing is faster than 1: "
            "a bug of pytest-llem, or of its figures for this device; please report it"
        )
    if warmup is not None and warmup.converged is False:
        found.append(f"warm-up stopped after {warmup.runs} runs before latencies settled")
    found += library
    if engine.random_weights:
        found.append("random weights: speed is real, power depends on the values and may differ")
    return sorted(found, key=severity)


def _few_ticks(what: str, account: Account) -> Iterator[str]:
    if account.tick_seconds and account.seconds and account.seconds < FEWEST_TICKS * account.tick_seconds:
        yield (
            f"the {what} holds {account.seconds / account.tick_seconds:.0f} {resolution(account.total.method)}, "
            f"fewer than {FEWEST_TICKS}: raise measurement.min_window_seconds"
        )


def _of_devices(account: Account) -> Iterator[str]:
    for device in account.devices:
        off = disagreement(device, account.seconds, account.tick_seconds)
        if off is not None:
            yield (
                f"energy counter and sampled power disagree on {device.device}: "
                f"{device.energy_j:.4g} J and {device.integral_j:.4g} J ({off:+.1%})"
                + (": invalid, no gate judges it" if abs(off) > MAX_VALID_DISAGREEMENT else "")
            )
        if device.counter_reason:
            yield f"energy counter of {device.device} was not used, its power was sampled: {device.counter_reason}"
        if device.integral_reason:
            yield f"energy counter of {device.device} could not be checked: {device.integral_reason}"
        conditions = device.conditions
        if conditions is None:
            continue
        for reason, seconds in (conditions.throttled_seconds or {}).items():
            if seconds > 0:
                yield f"throttled: {device.device} for {seconds:.2g} s of the window by {reason}"
        start, end = conditions.start_temperature_c, conditions.end_temperature_c
        if start is not None and end is not None and abs(end - start) > MOST_WARMING_C:
            yield f"temperature of {device.device} went from {start:.0f} to {end:.0f} °C within the window"
