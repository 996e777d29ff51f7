"""Compute the metrics of a server under load from its window."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_llem.catalogue import PREFILL_METRICS
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement.accounting import Served, energy, energy_metrics, speed_metrics
from pytest_llem.measurement.load_window import LoadWindow, Work
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.statistics import percentile

#: Metrics that only a server under load has.
SERVING_METRICS = (
    *("energy_per_good_token_j", "goodput_rps", "slo_attainment", "offered_rate", "error_rate"),
    *("concurrency_mean", "batch_mean", "queue_mean_ms", "prefix_hit_rate"),
    *("send_lag_p50_ms", "send_lag_p99_ms", "client_cpu_seconds"),
)

_NO_SLO = "no SLO: give load.slo in the study"
_NO_PREFILL = "a server under load reads prompts and generates at the same time"
_NONE_DUE = "no request was due in the window"


def not_serving_metrics() -> dict[str, Metric]:
    """Return the metrics of a server under load, without values, for an engine that is not a server."""
    return {name: metric(name, None, reason="no server was measured") for name in SERVING_METRICS}


def requests_of(window: LoadWindow) -> Requests:
    """Return the requests that were due in *window*, as one pass."""
    return Requests([window.due])


def load_metrics(window: LoadWindow, requests: Requests) -> dict[str, Metric]:
    """Return every metric that follows from a server's window, per pass of ``n`` requests.

    Args:
        window: The window.
        requests: The requests that were due in it.
    """
    metered = window.metered_work
    return {
        **energy_metrics(window.account, window.seconds, _served(metered, window.prompts)),
        **speed_metrics(window.seconds, _served(window.work, window.prompts)),
        **requests.latency_metrics(),
        **_serving_metrics(window, metered),
        **{name: metric(name, None, reason=_NO_PREFILL) for name in PREFILL_METRICS},
    }


def _served(work: Work, prompts: int) -> Served:
    return Served(work.requests / prompts, work.requests, work.input_tokens, work.output_tokens)


def _serving_metrics(window: LoadWindow, metered: Work) -> dict[str, Metric]:
    due = window.due
    good = [window.is_good(record) for record in due]
    unknown = _unknown_good(window, good)
    hits, inputs = _prefix_hits(window, due)
    lags = window.send_lags
    return {
        "energy_per_good_token_j": _per_good_token(window, metered, unknown),
        "goodput_rps": _given("goodput_rps", sum(map(bool, good)) / window.seconds, unknown),
        "slo_attainment": _given("slo_attainment", sum(map(bool, good)) / max(1, len(due)), unknown),
        "offered_rate": metric("offered_rate", len(due) / window.seconds),
        "error_rate": _given(
            "error_rate", sum(not one.is_served for one in due) / max(1, len(due)), None if due else _NONE_DUE
        ),
        "concurrency_mean": metric("concurrency_mean", window.concurrency),
        "batch_mean": metric(
            "batch_mean",
            window.batch,
            reason="the server does not report how many requests it runs" if window.batch is None else None,
        ),
        "queue_mean_ms": _queue_mean(window),
        "prefix_hit_rate": _given(
            "prefix_hit_rate",
            hits / inputs if inputs else math.nan,
            None if inputs else "the server does not report cached input tokens",
        ),
        **{
            f"send_lag_p{p}_ms": _given(
                f"send_lag_p{p}_ms", percentile(lags, p) * 1000 if lags else math.nan, None if lags else _NONE_DUE
            )
            for p in (50, 99)
        },
        "client_cpu_seconds": metric("client_cpu_seconds", window.client_cpu_seconds),
    }


def _given(name: str, value: float, missing: str | None) -> Metric:
    """Return *value* as the metric *name*. If there is a reason *missing*, the metric has this and no value."""
    return metric(name, value) if missing is None else metric(name, None, reason=missing)


def _unknown_good(window: LoadWindow, good: list[bool | None]) -> str | None:
    """Return why it is not known which requests were good; None if it is known."""
    if window.slo is None:
        return _NO_SLO
    if not good:
        return _NONE_DUE
    if None in good:
        return (
            f"a latency that load.slo limits is not known for {good.count(None)} of {len(good)} requests: several "
            "tokens arrived together; limit tpot_ms, not itl_ms"
        )
    return None


def _per_good_token(window: LoadWindow, metered: Work, missing: str | None) -> Metric:
    name, tokens = "energy_per_good_token_j", metered.good_tokens
    if missing is None and not tokens:
        missing = "no output token of a request within the SLO arrived"
    if missing is not None or tokens is None:
        return metric(name, None, method="unavailable", reason=missing)
    return energy(name, window.account.total, 1 / tokens)


def _queue_mean(window: LoadWindow) -> Metric:
    """Return the mean time in the server's queue by its counters, which have no percentiles."""
    seconds, requests = window.queue_seconds, window.queued_requests
    if seconds is None or requests is None:
        return metric("queue_mean_ms", None, reason="the server's counters do not report the time in its queue")
    if requests <= 0:
        return metric("queue_mean_ms", None, reason="the server's counters counted no request in the window")
    return metric("queue_mean_ms", seconds / requests * 1000)


def _prefix_hits(window: LoadWindow, due: Sequence[RequestRecord]) -> tuple[float, float]:
    """Return the number of cached input tokens, and of all: from the answers, else from the server's counters."""
    known = [one for one in due if one.cached_tokens is not None and one.input_tokens]
    if not known:
        return window.cache_hits or 0.0, window.cache_queries or 0.0
    return sum(one.cached_tokens or 0 for one in known), sum(one.input_tokens or 0 for one in known)
