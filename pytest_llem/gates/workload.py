"""What two points were asked, and how much they answered: a difference of that is none of cost.

An answer of more tokens costs more, and less per token, as the prompt's share is spread over more of them. So
where answers differ in length the figures per token say nothing of a change, and those per request do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_llem.gates.text import figure
from pytest_llem.results.models import PointResult

#: Metrics per output token, and what is judged in their place where answers differ in length.
PER_REQUEST = {
    "energy_per_output_token_j": "energy_per_request_j",
    "output_tokens_per_second": "requests_per_second",
}

#: Metrics of tokens in a pass, as they are called by request.
_TOKENS = {"input_tokens": "input tokens per request", "output_tokens": "output tokens per request"}


def workload_differences(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield in what the work of two points differs, a line each; nothing of what is not known of both."""
    counts = candidate.config.get("n"), reference.config.get("n")
    if None not in counts and counts[0] != counts[1]:
        yield f"prompts per pass: {counts[0]:,} here, {counts[1]:,} in the reference"
    for metric in _TOKENS:
        if (difference := _tokens_differ(metric, candidate, reference)) is not None:
            yield difference


def judged_metric(metric: str, candidate: PointResult, reference: PointResult) -> tuple[str, str | None]:
    """Return what a default gate on *metric* judges, and why, where that is another metric.

    Args:
        metric: By its name in the catalogue.
        candidate: What is judged.
        reference: What it is compared with.
    """
    instead = PER_REQUEST.get(metric)
    difference = _tokens_differ("output_tokens", candidate, reference) if instead is not None else None
    if instead is None or difference is None:
        return metric, None
    return instead, f"{instead} in place of {metric}: {difference}"


def _tokens_differ(metric: str, candidate: PointResult, reference: PointResult) -> str | None:
    here, there = _per_request(candidate, metric), _per_request(reference, metric)
    if here is None or there is None or math.isclose(here, there, rel_tol=1e-9):
        return None
    digits = next(digits for digits in range(3, 18) if figure(here, digits) != figure(there, digits))
    one, other = (f"{value:,.0f}" if value.is_integer() else figure(value, digits) for value in (here, there))
    return f"{_TOKENS[metric]}: {one} here, {other} in the reference"


def _per_request(point: PointResult, metric: str) -> float | None:
    summary = point.metrics.get(metric)
    return None if summary is None or summary.mean is None else summary.mean / point.config.get("n", 1)
