"""Compute the metrics of a pass, and the records of a result, from a window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pytest_llem.energy.account import Account, Total
from pytest_llem.engines.protocol import CacheMemory
from pytest_llem.measurement.passes import PassWindow
from pytest_llem.measurement.requests import BEFORE_WINDOW, Requests
from pytest_llem.results.experiment import DeviceEnergy, TokenRecord, WindowRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.statistics import total_of
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.times import utc
from pytest_llem.workload.prompts import Workload

J_PER_WH = 3600.0

_NOT_SERVED, _NOTHING_GENERATED = "no request was answered", "nothing was generated"

INPUT_TOKENS_UNKNOWN = "the engine does not report the number of input tokens"
_OUTPUT_TOKENS_UNKNOWN = "the engine does not report the number of output tokens"


def token_record(workload: Workload, requests: Requests, positions: int | None) -> TokenRecord:
    """Return the token counts of a pass.

    Args:
        workload: The prompts.
        requests: Requests of the window.
        positions: Input positions of a pass, padding included; None if unknown.
    """
    input_tokens = requests.input_tokens
    return TokenRecord(
        prompts=len(workload.prompts),
        input_tokens=input_tokens,
        output_tokens=total_of(request.output_tokens for request in requests.passes[0]),
        truncated_prompts=workload.truncated,
        padding_waste=None if positions is None or input_tokens is None else 1 - input_tokens / positions,
        output_digest=requests.output_digest(),
        deterministic=requests.deterministic,
        dataset_hash=workload.digest,
        dataset_revision=workload.revision,
        requests=requests.total,
        failed_requests=requests.failed,
        batches=dict(sorted(Counter(requests.sizes).items())) or None,
    )


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


def not_judged(metrics: Mapping[str, Metric], reason: str | None) -> dict[str, Metric]:
    """Return *metrics*, those of the window marked with the *reason* why no gate may judge them.

    Metrics from before the window are unchanged; all are if *reason* is None. One reason is failed requests: a
    failed request does not take the time and energy of an answer, so no metric describes the requested workload.
    """
    of_window = metrics.keys() - BEFORE_WINDOW if reason is not None else set()
    update = {"not_judged": reason}
    return {name: one.model_copy(update=update) if name in of_window else one for name, one in metrics.items()}


def _share(name: str, total: Total, number: float | None, reason: str) -> Metric:
    """Return *total* ÷ *number* as the metric *name*; unavailable for the *reason* if *number* is 0 or None."""
    if number:
        return energy(name, total, 1 / number)
    return metric(name, None, method="unavailable", reason=reason)


def energy_metrics(window: PassWindow, requests: Requests) -> dict[str, Metric]:
    """Return every energy metric of the window, per pass."""
    account, total = window.account, window.account.total
    passes, output_tokens = window.count, requests.output_tokens
    metrics = {
        "energy_j": energy("energy_j", total, 1 / passes),
        "energy_per_request_j": _share("energy_per_request_j", total, passes * requests.served, _NOT_SERVED),
        "wh_per_1000_requests": _share(
            "wh_per_1000_requests", total, passes * requests.served * J_PER_WH / 1000, _NOT_SERVED
        ),
        "energy_per_output_token_j": _share(
            "energy_per_output_token_j",
            total,
            None if output_tokens is None else passes * output_tokens,
            _no_tokens(requests),
        ),
        "edp_js": energy("edp_js", total, 1 / passes * window.seconds / passes),
        "mean_power_w": energy("mean_power_w", total, 1 / (account.seconds or window.seconds)),
    }
    for name, boundary in (("gpu", "gpu_board"), ("cpu", "cpu_package"), ("dram", "dram")):
        key = f"{name}_energy_j"
        metrics[key] = energy(key, account.over(boundary), 1 / passes)
    metrics["tokens_per_joule"] = _tokens_per_joule(requests, metrics["energy_j"])
    return metrics


def _no_tokens(requests: Requests) -> str:
    """Return why there is no figure per output token, if their number is unknown or 0."""
    return _NOTHING_GENERATED if requests.output_tokens == 0 else requests.no_tokens or _OUTPUT_TOKENS_UNKNOWN


def _tokens_per_joule(requests: Requests, energy_j: Metric) -> Metric:
    update: dict[str, Any] = {"unit": "1/J"}
    output_tokens = requests.output_tokens
    if not output_tokens:
        reason = _no_tokens(requests)
        update |= {"value": None, "uncertainty": None, "method": "unavailable", "reason": reason}
    elif energy_j.value == 0:  # only a third-party meter can report 0 J
        update |= {"value": None, "uncertainty": None, "method": "unavailable", "reason": "energy_j is 0"}
    elif energy_j.value is not None:
        tokens = output_tokens / energy_j.value
        share = None if energy_j.uncertainty is None else energy_j.uncertainty / abs(energy_j.value)
        update |= {"value": tokens, "uncertainty": None if share is None else abs(tokens) * share}
    return energy_j.model_copy(update=update)


def speed_metrics(window: PassWindow, requests: Requests) -> dict[str, Metric]:
    """Return time, tokens and throughput per pass, between device synchronizations."""
    seconds = window.seconds / window.count
    return {
        "seconds": metric("seconds", seconds),
        "output_tokens_per_second": _rate(
            "output_tokens_per_second", requests.output_tokens, seconds, _no_tokens(requests)
        ),
        "input_tokens": _count("input_tokens", requests.input_tokens, INPUT_TOKENS_UNKNOWN),
        "output_tokens": _count("output_tokens", requests.output_tokens, _no_tokens(requests)),
        "requests_per_second": _rate("requests_per_second", requests.served, seconds, _NOT_SERVED),
    }


def _count(name: str, number: float | None, reason: str) -> Metric:
    return metric(name, number, reason=reason if number is None else None)


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
    """Return the size and use of a KV cache that the engine allocated in advance; None if it reports none."""
    if cache is None:
        reason = "the engine reports no cache that it allocates in advance"
        return {name: metric(name, None, reason=reason) for name in ("cache_memory_mb", "used_cache_memory_mb")}
    return {
        "cache_memory_mb": megabytes("cache_memory_mb", cache.allocated_bytes),
        "used_cache_memory_mb": megabytes("used_cache_memory_mb", cache.used_bytes),
    }


def device_energies(account: Account) -> list[DeviceEnergy]:
    """Return each device's energy over the whole window."""
    return [DeviceEnergy.model_validate(asdict(device)) for device in account.devices]


def window_record(window: PassWindow) -> WindowRecord:
    """Return the window's record: its length, energy, drift and resolution."""
    account = window.account
    return WindowRecord(
        passes=window.count,
        recorded_passes=len(window.passes),
        window_seconds=window.seconds,
        window_energy_j=account.total.energy_j,
        energy_seconds=account.seconds,
        tick_seconds=account.tick_seconds,
        quantisation_error=1 / account.ticks if account.ticks else None,
        tail_seconds=account.seconds - window.seconds if account.seconds else None,
        read_skew_seconds=account.read_skew_seconds,
        pass_seconds_cv=window.cv,
        drift=window.drift,
        began_at=utc(window.began_at, "microseconds"),
        ended_at=utc(window.began_at + window.ended - window.began, "microseconds"),
        restarts=window.restarts,
        compiled=window.compiled,
    )


def effective_config(config: ExperimentConfig, unused: Iterable[str]) -> dict[str, Any]:
    """Return *config* as it ran, as plain data.

    Args:
        config: The experiment.
        unused: Fields that did not reach the engine. They are null, and without a fixed length it is natural.
    """
    data = config.model_dump(mode="json")
    for name in unused:
        section, _, key = name.rpartition(".")
        place = data[section] if section else data
        place[key] = "natural" if name == "measurement.length_mode" else None
    return data
