"""Compute the metrics of a pass from a window, and prefill's share of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.catalogue import PREFILL_METRICS
from pytest_llem.energy.account import Account, Total
from pytest_llem.engines.protocol import CacheMemory
from pytest_llem.measurement.requests import BEFORE_WINDOW, Requests
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import Metric, metric, weakest
from pytest_llem.results.statistics import total_of

J_PER_WH = 3600.0

_NOT_SERVED, _NOTHING_GENERATED = "no request was answered", "nothing was generated"

#: Boundaries that cover exactly known devices. The coverage of others, such as a wall socket's, is not known.
_KNOWN_BOUNDARIES = {"cpu_package", "dram", "gpu_board", "module"}

INPUT_TOKENS_UNKNOWN = "the engine does not report the number of input tokens"
_OUTPUT_TOKENS_UNKNOWN = "the engine does not report the number of output tokens"


def energy(name: str, total: Total, scale: float = 1.0) -> Metric:
    """Return *total* × *scale* as the metric *name*, with method, source, boundary and uncertainty."""
    return metric(
        name,
        None if total.energy_j is None else total.energy_j * scale,
        method=total.method,
        source=total.source,
        boundary=total.boundary,
        devices=list(total.devices) or None,
        invalid=total.invalid,
        reason=total.reason,
        uncertainty=None if total.uncertainty_j is None else total.uncertainty_j * scale,
    )


def mark_not_judged(metrics: Mapping[str, Metric], reason: str | None) -> dict[str, Metric]:
    """Return *metrics*, those of the window marked with the *reason* why no gate may judge them.

    Metrics from before the window are unchanged; all are if *reason* is None. One reason is failed requests: a
    failed request does not take the time and energy of an answer, so no metric describes the requested workload.
    """
    of_window = metrics.keys() - BEFORE_WINDOW if reason is not None else set()
    update = {"not_judged": reason}
    return {name: one.model_copy(update=update) if name in of_window else one for name, one in metrics.items()}


def with_covers_engine(
    metrics: Mapping[str, Metric], engine: EngineRecord, gpus: Sequence[str]
) -> dict[str, Metric]:
    """Return *metrics* with ``covers_engine`` on every energy metric: whether it covers the engine's devices.

    A counter that is invalid in the measured window is invalid for its other readings too: each energy over the
    same boundary gets the ``invalid`` code of ``energy_j``.

    Args:
        metrics: Metrics by name; ``energy_j`` is among them.
        engine: The engine's record, with the kind of its device.
        gpus: UUIDs of the GPUs that the engine may have run on.
    """
    window = metrics["energy_j"]
    return {
        name: one
        if one.method is None or one.value is None
        else one.model_copy(
            update={
                "covers_engine": _covers(one, engine, gpus),
                "invalid": one.invalid or (window.invalid if one.boundary == window.boundary else None),
            }
        )
        for name, one in metrics.items()
    }


def _covers(energy: Metric, engine: EngineRecord, gpus: Sequence[str]) -> bool | None:
    boundaries = {*(energy.boundary or "unknown").split("+")}
    if engine.device == "cpu":
        covered = "cpu_package" in boundaries
    elif gpus:
        covered = {*gpus} <= {*(energy.devices or ())}
    else:
        return None
    return True if covered else False if boundaries <= _KNOWN_BOUNDARIES else None


def _share(name: str, total: Total, number: float | None, reason: str) -> Metric:
    """Return *total* ÷ *number* as the metric *name*; unavailable for the *reason* if *number* is 0 or None."""
    if number:
        return energy(name, total, 1 / number)
    return metric(name, None, method="unavailable", reason=reason)


@dataclass(frozen=True)
class Served:
    """The work that an engine did in some time.

    Attributes:
        passes: Number of passes over the prompts; of a server, requests ÷ ``n``.
        requests: Number of answered requests.
        input_tokens: Their input tokens; None if unknown.
        output_tokens: Their output tokens; None if unknown.
        tokens_unknown_reason: Why ``output_tokens`` is None, if the engine gives a reason; else None.
    """

    passes: float
    requests: float
    input_tokens: float | None
    output_tokens: float | None
    tokens_unknown_reason: str | None = None

    @classmethod
    def in_passes(cls, passes: int, requests: Requests) -> Served:
        """Return what was done in a number of passes, of which *requests* are recorded."""
        inputs, outputs = requests.input_tokens, requests.output_tokens
        return cls(
            passes,
            passes * requests.served,
            None if inputs is None else passes * inputs,
            None if outputs is None else passes * outputs,
            requests.tokens_unknown_reason,
        )

    @property
    def total_tokens(self) -> float | None:
        """Input and output tokens; None if one of them is unknown."""
        return total_of((self.input_tokens, self.output_tokens))

    @property
    def no_output_reason(self) -> str:
        """Why a value per output token is missing, if their number is unknown or 0."""
        return (
            _NOTHING_GENERATED if self.output_tokens == 0 else self.tokens_unknown_reason or _OUTPUT_TOKENS_UNKNOWN
        )


def energy_metrics(account: Account, seconds: float, served: Served) -> dict[str, Metric]:
    """Return the energy metrics that every engine has, per pass of a window.

    Args:
        account: The meters' readings.
        seconds: Length of the window, in s.
        served: What was done while they metered.
    """
    total, passes = account.total, served.passes
    no_total = INPUT_TOKENS_UNKNOWN if served.input_tokens is None else served.no_output_reason
    metrics = {
        "energy_j": _share("energy_j", total, passes, _NOT_SERVED),
        "energy_per_request_j": _share("energy_per_request_j", total, served.requests, _NOT_SERVED),
        "wh_per_1000_requests": _share(
            "wh_per_1000_requests", total, served.requests * J_PER_WH / 1000, _NOT_SERVED
        ),
        "energy_per_output_token_j": _share(
            "energy_per_output_token_j", total, served.output_tokens, served.no_output_reason
        ),
        "energy_per_total_token_j": _share("energy_per_total_token_j", total, served.total_tokens, no_total),
        "edp_js": _share("edp_js", total, passes**2 / seconds if passes else 0.0, _NOT_SERVED),
        "mean_power_w": energy("mean_power_w", total, 1 / (account.seconds or seconds)),
    }
    for name, boundary in (("gpu", "gpu_board"), ("cpu", "cpu_package"), ("dram", "dram")):
        key = f"{name}_energy_j"
        metrics[key] = _share(key, account.of_boundary(boundary), passes, _NOT_SERVED)
    metrics["tokens_per_joule"] = _tokens_per_joule(served, metrics["energy_j"])
    return metrics


def _tokens_per_joule(served: Served, energy_j: Metric) -> Metric:
    update: dict[str, Any] = {"unit": "1/J"}
    if not served.output_tokens:
        update |= {"value": None, "uncertainty": None, "method": "unavailable", "reason": served.no_output_reason}
    elif energy_j.value == 0:  # only a third-party meter can report 0 J
        update |= {"value": None, "uncertainty": None, "method": "unavailable", "reason": "energy_j is 0"}
    elif energy_j.value is not None:
        tokens = served.output_tokens / served.passes / energy_j.value
        share = None if energy_j.uncertainty is None else energy_j.uncertainty / abs(energy_j.value)
        update |= {"value": tokens, "uncertainty": None if share is None else abs(tokens) * share}
    return energy_j.model_copy(update=update)


def speed_metrics(seconds: float, served: Served) -> dict[str, Metric]:
    """Return time and tokens per pass, and throughput.

    Args:
        seconds: Length of the window, in s.
        served: What was done in it.
    """
    inputs, outputs, passes = served.input_tokens, served.output_tokens, served.passes
    return {
        "seconds": metric("seconds", seconds / passes if passes else None, reason=None if passes else _NOT_SERVED),
        "output_tokens_per_second": _rate("output_tokens_per_second", outputs, seconds, served.no_output_reason),
        "input_tokens": _count("input_tokens", inputs, passes, INPUT_TOKENS_UNKNOWN),
        "output_tokens": _count("output_tokens", outputs, passes, served.no_output_reason),
        "requests_per_second": _rate("requests_per_second", served.requests, seconds, _NOT_SERVED),
    }


def _count(name: str, number: float | None, passes: float, reason: str) -> Metric:
    if number is None or not passes:
        return metric(name, None, reason=reason)
    return metric(name, number / passes)


def _rate(name: str, number: float | None, seconds: float, reason: str) -> Metric:
    return metric(name, number / seconds) if number else metric(name, None, reason=reason)


def condition_metrics(account: Account) -> dict[str, Metric]:
    """Return the highest temperature of any device, and the longest time that one reason throttled one device.

    Throttle reasons overlap in time, and so do devices: their sum would not be a time.
    """
    known = [device.conditions for device in account.devices if device.conditions is not None]
    temperatures = [one.peak_temperature_c for one in known if one.peak_temperature_c is not None]
    throttled = [max(one.throttled_seconds.values()) for one in known if one.throttled_seconds]
    return {
        "peak_temperature_c": metric("peak_temperature_c", max(temperatures))
        if temperatures
        else metric("peak_temperature_c", None, reason="no meter reports a temperature"),
        "throttled_seconds": metric("throttled_seconds", max(throttled))
        if throttled
        else metric("throttled_seconds", None, reason="no meter reports throttled time"),
    }


def megabytes(name: str, size: int | None) -> Metric:
    """Return *size*, in bytes, as the metric *name*, in MB; unavailable if None."""
    if size is None:
        return metric(name, None, reason="the engine does not report it")
    return metric(name, size / 1e6)


def cache_metrics(cache: CacheMemory | None) -> dict[str, Metric]:
    """Return the size and use of a KV cache that the engine allocated in advance; no values if *cache* is None."""
    if cache is None:
        reason = "the engine reports no cache that it allocates in advance"
        return {name: metric(name, None, reason=reason) for name in ("cache_memory_mb", "used_cache_memory_mb")}
    return {
        "cache_memory_mb": megabytes("cache_memory_mb", cache.allocated_bytes),
        "used_cache_memory_mb": megabytes("used_cache_memory_mb", cache.used_bytes),
    }


NOT_REQUESTED = "not measured: set measurement.prefill_split: true"


def prefill_metrics(
    window: Window, prefill: Window | None, input_tokens: int | None, drift_w: float | None
) -> dict[str, Metric]:
    """Return energy and time of prefill and of decoding, per pass.

    Prefill is a pass with one new token for each prompt. Decoding is the rest: a difference of two windows, which
    noise may make negative: then no gate judges it. Its uncertainty is
    u² = u_pass² + u_prefill² + (t_prefill · drift)², because the machine's idle power drifts between the windows.

    Args:
        window: Window of whole passes.
        prefill: Window of passes with one new token for each prompt; None if it was not requested.
        input_tokens: Input tokens of a pass; None if unknown.
        drift_w: Standard uncertainty from the drift of idle power, in W; None if unknown: the uncertainty of
            decoding is then unknown too.
    """
    if prefill is None:
        return {name: metric(name, None, reason=NOT_REQUESTED) for name in PREFILL_METRICS}
    # This is the whole pass. It has the name of the difference, from which the unit follows.
    whole = energy("decode_energy_j", window.account.total, 1 / window.count)
    prefill_energy = _attributed(energy("prefill_energy_j", prefill.account.total, 1 / prefill.count))
    seconds, whole_seconds = prefill.seconds / prefill.count, window.seconds / window.count
    return {
        "prefill_energy_j": prefill_energy,
        "decode_energy_j": _difference(whole, prefill_energy, None if drift_w is None else seconds * drift_w),
        "energy_per_input_token_j": _per_token(prefill_energy, input_tokens),
        "prefill_seconds": metric("prefill_seconds", seconds),
        "decode_seconds": metric(
            "decode_seconds", whole_seconds - seconds, not_judged=_not_judged(whole_seconds, seconds, "s")
        ),
    }


def _attributed(energy: Metric) -> Metric:
    """Mark *energy* as a share of a measured total, at best."""
    return energy.model_copy(update={"method": weakest(("attributed", energy.method))})


def _difference(whole: Metric, prefill: Metric, drift_j: float | None) -> Metric:
    if whole.value is None or prefill.value is None or whole.boundary != prefill.boundary:
        boundaries_differ = (
            f"energy of the whole pass covers {whole.boundary}, but that of prefill covers {prefill.boundary}"
        )
        reason = whole.reason or prefill.reason or boundaries_differ
        return whole.model_copy(
            update={"value": None, "method": "unavailable", "reason": reason, "uncertainty": None}
        )
    uncertainties = (whole.uncertainty, prefill.uncertainty, drift_j)
    return whole.model_copy(
        update={
            "value": whole.value - prefill.value,
            "method": weakest((whole.method, prefill.method)),
            "invalid": whole.invalid or prefill.invalid,
            "not_judged": _not_judged(whole.value, prefill.value, "J"),
            "uncertainty": None
            if None in uncertainties
            else math.hypot(*(one for one in uncertainties if one is not None)),
        }
    )


def _not_judged(whole: float, prefill: float, unit: str) -> str | None:
    """Return why no gate may judge the difference of *whole* and *prefill*; None if it is above 0."""
    if whole > prefill:
        return None
    return f"prefill alone took {prefill:.4g} {unit}, but a whole pass took {whole:.4g} {unit}"


def _per_token(prefill: Metric, input_tokens: int | None) -> Metric:
    if input_tokens is None:
        return metric("energy_per_input_token_j", None, method="unavailable", reason=INPUT_TOKENS_UNKNOWN)
    per_token = {
        name: None if value is None else value / input_tokens
        for name, value in (("value", prefill.value), ("uncertainty", prefill.uncertainty))
    }
    return prefill.model_copy(update=per_token)
