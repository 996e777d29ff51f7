"""Read a server's own counters: the Prometheus text of vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic

import aiohttp

#: Time limit for one reading, in s.
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Counters:
    """One reading of a server's counters. A counter is None if the server does not export it.

    SGLang and llama.cpp count the tokens of a request when it ends: compare counters after the load has drained.

    Attributes:
        time: When the reading was requested, on the clock of ``time.monotonic``, in s.
        prompt_tokens: Prompt tokens so far. llama.cpp leaves out those from its cache.
        generation_tokens: Output tokens so far.
        running: Requests in the batch now.
        waiting: Requests in the queue now.
        prefix_cache_queries: Prompt tokens that were looked up in the prefix cache so far.
        prefix_cache_hits: Prompt tokens that were found there.
        queue_seconds: Time that requests spent in the queue so far, in s.
        queue_count: Number of requests in ``queue_seconds``.
        preemptions: Requests that were taken out of the batch so far, to free memory.

    Example:
        >>> before = await read_counters(session, "http://127.0.0.1:8000")
    """

    time: float
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    running: float | None = None
    waiting: float | None = None
    prefix_cache_queries: float | None = None
    prefix_cache_hits: float | None = None
    queue_seconds: float | None = None
    queue_count: float | None = None
    preemptions: float | None = None


#: The fields of ``Counters`` that a Prometheus metric is added to, by the metric's name in vLLM 0.20 to 0.32,
#: SGLang 0.5 and llama.cpp of 2026.
_FIELDS = {
    "vllm:prompt_tokens_total": ("prompt_tokens",),
    "vllm:generation_tokens_total": ("generation_tokens",),
    "vllm:num_requests_running": ("running",),
    "vllm:num_requests_waiting": ("waiting",),
    "vllm:prefix_cache_queries_total": ("prefix_cache_queries",),
    "vllm:prefix_cache_hits_total": ("prefix_cache_hits",),
    "vllm:request_queue_time_seconds_sum": ("queue_seconds",),
    "vllm:request_queue_time_seconds_count": ("queue_count",),
    "vllm:num_preemptions_total": ("preemptions",),
    "sglang:prompt_tokens_total": ("prompt_tokens", "prefix_cache_queries"),
    "sglang:generation_tokens_total": ("generation_tokens",),
    "sglang:num_running_reqs": ("running",),
    "sglang:num_queue_reqs": ("waiting",),
    "sglang:cached_tokens_total": ("prefix_cache_hits",),
    "sglang:queue_time_seconds_sum": ("queue_seconds",),
    "sglang:queue_time_seconds_count": ("queue_count",),
    "sglang:num_retracted_requests_total": ("preemptions",),
    "llamacpp:prompt_tokens_total": ("prompt_tokens", "prefix_cache_queries"),
    "llamacpp:tokens_predicted_total": ("generation_tokens",),
    "llamacpp:requests_processing": ("running",),
    "llamacpp:requests_deferred": ("waiting",),
    "llamacpp:prompt_tokens_cached_total": ("prefix_cache_hits", "prefix_cache_queries"),
}

_SAMPLE = re.compile(r"^([a-z]+:\w+)(\{.*\})? +(\S+)", re.MULTILINE)

#: Labels of a tensor-parallel rank other than 0: SGLang can export a request once for each rank.
_OTHER_RANK = re.compile(r'\btp_rank="(?!0")')


async def read_counters(session: aiohttp.ClientSession, url: str, path: str = "/metrics") -> Counters | None:
    """Return the counters of a server; None if it has none, or did not answer within 5 s.

    Args:
        session: An open session, such as ``Client.session``.
        url: Base URL of the server.
        path: Path of the metrics.
    """
    time = monotonic()
    try:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        async with session.get(url.rstrip("/") + path, timeout=timeout) as response:
            return parse(await response.text(), time) if response.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
        return None


def parse(text: str, time: float) -> Counters | None:
    """Return the counters in Prometheus *text*, summed over the server's replicas; None if there are none."""
    values: dict[str, float] = {}
    for name, labels, number in _SAMPLE.findall(text):
        if name not in _FIELDS or _OTHER_RANK.search(labels):
            continue
        value = float(number)
        if math.isfinite(value):
            for field in _FIELDS[name]:
                values[field] = values.get(field, 0.0) + value
    if "prefix_cache_hits" not in values:
        values.pop("prefix_cache_queries", None)
    return Counters(time, **values) if values else None


def mean_batch(readings: Iterable[Counters]) -> float | None:
    """Return the mean number of requests in the batch over *readings* at equal intervals; None if unknown.

    Example:
        >>> mean_batch([Counters(0.0, running=8), Counters(0.5, running=6)])
        7.0
    """
    running = [reading.running for reading in readings if reading.running is not None]
    return sum(running) / len(running) if running else None
