"""Why a gate may not judge a metric although it has a value, and which other metric a default gate judges.

A metric is ineligible if its energy is invalid, does not cover all of the engine's devices or not the same ones in
all cycles, covers too few ticks of the counter, or was estimated where the study does not allow that; or if code,
model or dataset have changed since a replayed result was measured. A default gate is one of a study that names no
metrics. If the sides of a comparison generated different numbers of tokens, or do not know them, a default gate on
a metric that counts output tokens judges the one that counts requests instead; under a load, one on ITL judges
TPOT if a side does not know ITL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_llem.catalogue import CATALOGUE, PERCENTILES
from pytest_llem.gates.verdict_text import rounded
from pytest_llem.results.facts import MIN_TICKS, PREFILL_TICKS, TICKS
from pytest_llem.results.metrics import INVALID, resolution
from pytest_llem.results.points import PointResult
from pytest_llem.study.config import AUTO

ESTIMATED = "energy is estimated, not measured: set energy.allow_estimated: true to let it decide"

#: Energy metrics that are not measured in the window, so that its ticks do not concern them.
_NO_WINDOW = {"load_energy_j", "idle_power_w"}

#: Metrics that depend on the window of prefill, alone or with the other one.
_PREFILL = {"prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"}

#: Metrics whose names say which devices they cover.
_NAME_THEIR_BOUNDARY = {"gpu_energy_j", "cpu_energy_j", "dram_energy_j"}

#: Units of metrics that do not depend on other processes.
_UNAFFECTED = {"MB", "tokens", "FLOP"}


def contention_reason(point: PointResult, metric: str) -> str | None:
    """Return which cycles of *point* were contended and why; None if none were or *metric* is not affected."""
    found = point.contention
    if found is None or not found.contended or CATALOGUE[metric].unit in _UNAFFECTED:
        return None
    cycles = ", ".join(map(str, found.contended))
    more = f"; and {len(found.reasons) - 1} more" if len(found.reasons) > 1 else ""
    return f"cycle{'s' * (len(found.contended) > 1)} {cycles} contended: {found.reasons[0]}{more}"


def unknown_contention_reason(candidate: PointResult, reference: PointResult, metric: str) -> str | None:
    """Return on which side contention is unknown and why; None if on neither or *metric* is not affected."""
    if CATALOGUE[metric].unit in _UNAFFECTED:
        return None
    sides = {"candidate": candidate.contention, "reference": reference.contention}
    texts = [
        f"in the {side}: {', '.join(found.unknown_reasons)}"
        for side, found in sides.items()
        if found is not None and found.unknown_reasons
    ]
    return "; ".join(texts) or None


def allows_estimates(point: PointResult) -> bool:
    """Whether the study lets gates judge estimated energy."""
    return bool(point.config.get("energy", {}).get("allow_estimated"))


def replay_ineligible_reason(point: PointResult) -> str | None:
    """Return what has changed since replayed results of *point* were measured; None if nothing has."""
    if point.replay_mismatch is None:
        return None
    return f"measured before, and since then {point.replay_mismatch}: measure it again"


def mixed_hosts_reason(point: PointResult) -> str | None:
    """Return a message if the cycles of *point* ran on hosts of different kinds; None if they did not."""
    names = {"gpu": "GPUs", "cpu": "CPUs", "host_cpu": "CPUs"}
    for key, name in names.items():
        if isinstance(models := point.testbed.get(key), list):
            return f"its cycles ran on different {name}: {', '.join(models)}; use hosts of one kind"
    return None


def ineligible_reason(point: PointResult, metric: str, *, candidate: PointResult | None = None) -> str | None:
    """Return why the measurement of *point* keeps gates from judging its energy *metric*; None if it does not.

    Whether an estimate may decide is a question of its own: see :func:`allows_estimates`.

    Args:
        point: The measured point.
        metric: Name of the metric in the catalogue.
        candidate: The point whose study decides whether the energy may be that of other devices than the engine's;
            None for *point* itself.
    """
    summary = point.metrics[metric]
    if summary.method is None:  # not an energy
        return None
    if summary.invalid is not None:
        return f"invalid ({summary.invalid}): {INVALID.get(summary.invalid, 'reason unknown to this version')}"
    if summary.is_mixed:
        return "its cycles differ in what their energy covers"
    if not summary.covers_engine and not _names_boundary(candidate or point, metric):
        known = summary.covers_engine is False
        what = f"the energy covers {summary.boundary} and not" if known else "unknown whether the energy covers"
        return f"{what} the devices that the engine ran on (name the meter in energy.backend if that is meant)"
    if metric in _NO_WINDOW:
        return None
    windows = [TICKS, PREFILL_TICKS] if metric in _PREFILL else [TICKS]
    ticks = min((point.testbed[key] for key in windows if key in point.testbed), default=None)
    if ticks is None or ticks >= MIN_TICKS:
        return None
    return (
        f"a window holds {ticks:g} {resolution(summary.method)}, and a gate needs {MIN_TICKS}: "
        "raise measurement.min_window_seconds"
    )


def _names_boundary(point: PointResult, metric: str) -> bool:
    """Whether the study chose what the energy covers, by naming the meter or by a metric of one boundary."""
    return metric in _NAME_THEIR_BOUNDARY or point.config.get("energy", {}).get("backend") not in (AUTO, None)


#: Metrics that count output tokens, and those that replace them if answers differ in length.
PER_REQUEST = {
    "energy_per_output_token_j": "energy_per_request_j",
    "output_tokens_per_second": "requests_per_second",
}

#: Metrics of the times between tokens, and those that replace them if a side does not know them, as when a server
#: sends several tokens at a time.
PER_TOKEN_TIME = {f"itl_p{p}_ms": f"tpot_p{p}_ms" for p in PERCENTILES}

#: Metrics of tokens in a pass, and what messages call them per request.
_TOKENS = {"input_tokens": "input tokens per request", "output_tokens": "output tokens per request"}


def workload_differences(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield differences in the work of two points, one per line, as far as it is known of both."""
    counts = candidate.config.get("n"), reference.config.get("n")
    if None not in counts and counts[0] != counts[1]:
        yield f"prompts per pass: {counts[0]:,} in the candidate, {counts[1]:,} in the reference"
    for metric in _TOKENS:
        if (difference := _tokens_differ(metric, candidate, reference)) is not None:
            yield difference


def judged_metric(metric: str, candidate: PointResult, reference: PointResult) -> tuple[str, str | None]:
    """Return the metric that a default gate on *metric* judges, and why if that is another metric.

    Args:
        metric: Name of the metric in the catalogue.
        candidate: The judged point.
        reference: The point that it is compared with.
    """
    if candidate.config.get("load"):  # answers of a server may have any length
        is_known = all(_has_value(point, metric) for point in (candidate, reference))
        if metric not in PER_TOKEN_TIME or is_known:
            return metric, None
        replacement = PER_TOKEN_TIME[metric]
        return replacement, f"{replacement} in place of {metric}, which a side does not know"
    per_request = PER_REQUEST.get(metric)
    difference = None
    if per_request is not None:
        difference = _tokens_differ("output_tokens", candidate, reference)
        if all(_is_only_per_request(metric, per_request, point) for point in (candidate, reference)):
            difference = "the numbers of output tokens are not known"
    if per_request is None or difference is None:
        return metric, None
    return per_request, f"{per_request} in place of {metric}: {difference}"


def _has_value(point: PointResult, metric: str) -> bool:
    summary = point.summary_of(metric)
    return summary.mean is not None and summary.n == len(point.cycles)


def _is_only_per_request(metric: str, per_request: str, point: PointResult) -> bool:
    """Return whether a point has values per request only, as with a function that returns text without counts."""
    value, value_per_request = (_per_request(point, name) for name in (metric, per_request))
    return value is None and value_per_request is not None and _per_request(point, "output_tokens") is None


def _tokens_differ(metric: str, candidate: PointResult, reference: PointResult) -> str | None:
    tokens, reference_tokens = _per_request(candidate, metric), _per_request(reference, metric)
    if tokens is None or reference_tokens is None or math.isclose(tokens, reference_tokens, rel_tol=1e-9):
        return None
    digits = next(
        digits for digits in range(3, 18) if rounded(tokens, digits) != rounded(reference_tokens, digits)
    )
    one, other = (
        f"{value:,.0f}" if value.is_integer() else rounded(value, digits) for value in (tokens, reference_tokens)
    )
    return f"{_TOKENS[metric]}: {one} in the candidate, {other} in the reference"


def _per_request(point: PointResult, metric: str) -> float | None:
    mean, n = point.summary_of(metric).mean, point.config.get("n", 1)
    return mean / n if mean is not None and n else None
