"""What changed together with a metric that got worse or better: a hint where to look, which proves no cause."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_llem.gates.decisions import Contrast, UndecidableError, contrast
from pytest_llem.gates.differences import different_facts
from pytest_llem.gates.matching import in_pairs, values_by_cycle
from pytest_llem.gates.ttests import p_beyond
from pytest_llem.gates.verdict_text import ratio_text, rounded
from pytest_llem.results.points import PointResult

#: Energy metrics, each with the metric of its time: energy is mean power × time.
_TIME_OF_ENERGY = {
    "energy_j": "seconds",
    "energy_per_output_token_j": "output_tokens_per_second",
    "energy_per_request_j": "requests_per_second",
    "wh_per_1000_requests": "requests_per_second",
    "tokens_per_joule": "output_tokens_per_second",
}

#: Metrics that a pass's time depends on, by their names in the clauses.
_OF_A_PASS = {
    "TTFT": "ttft_p50_ms",
    "TPOT": "tpot_p50_ms",
    "ITL": "itl_p50_ms",
    "queue time": "queue_p50_ms",
    "output tokens": "output_tokens",
}

#: The parts of each metric: metrics that it depends on, as above. Keys without a percentile stand for all of them.
_PARTS = {
    **dict.fromkeys((*_TIME_OF_ENERGY, *_TIME_OF_ENERGY.values(), "e2e"), _OF_A_PASS),
    "ttft": {"queue time": "queue_p50_ms", "input tokens": "input_tokens"},
}

#: A part that changed by less than this share of the metric's log ratio is not worth naming.
_MIN_SHARE = 0.1

#: Level of the two-sided test by which a part has changed at all. It is not adjusted for the number of parts.
_LEVEL = 0.05

#: Beginning of the clause that names facts that differ.
DIFFERENT = "different: "

#: Differences that are named; the others are counted.
_MAX_NAMES = 3


def associations(candidate: PointResult, reference: PointResult, metric: str, *, paired: bool) -> list[str]:
    """Return what changed together with *metric*, in at most three short clauses.

    They say how an energy's change splits into power and time, which latencies and lengths moved, and which facts
    differ. Contention is not among them: verdicts already include it.

    Args:
        candidate: The point whose metric changed.
        reference: The point that it is compared with.
        metric: Name of the metric in the catalogue. Both points have values of it.
        paired: Whether cycles of the same number were interleaved.

    Example:
        >>> associations(candidate, reference, "energy_per_output_token_j", paired=True)
        ['time × 1.198 at equal power', 'TPOT × 1.241', 'different: torch, commit']
    """
    points = candidate, reference
    change = _change(*points, metric, paired=paired)
    total = 0.0 if change is None else change.log_ratio
    moved = ", ".join([*_moved(*points, metric, total, paired=paired), *_throttling(*points)])
    differences = different_facts(*points)
    named = ", ".join(differences[:_MAX_NAMES])
    if len(differences) > _MAX_NAMES:
        named += f" and {len(differences) - _MAX_NAMES} more"
    clauses = [_power_and_time(*points, metric, total, paired=paired), moved, named and f"{DIFFERENT}{named}"]
    return [clause for clause in clauses if clause]


def _change(candidate: PointResult, reference: PointResult, metric: str, *, paired: bool) -> Contrast | None:
    """Return how *metric* changed; None if a point has too few values or one that is not above 0."""
    values, reference_values = values_by_cycle(candidate, metric), values_by_cycle(reference, metric)
    if paired:
        values, reference_values = in_pairs(candidate, reference, metric, values, reference_values)
    try:
        return contrast(values, reference_values, paired=paired)
    except UndecidableError:
        return None


def _power_and_time(
    candidate: PointResult, reference: PointResult, metric: str, total: float, *, paired: bool
) -> str | None:
    """Return how the change of an energy splits into power and time; None for another metric or if it is unknown.

    *total* is the metric's log ratio.
    """
    if (of_time := _TIME_OF_ENERGY.get(metric)) is None:
        return None
    found = [_change(candidate, reference, one, paired=paired) for one in ("mean_power_w", of_time)]
    power, time = found
    if power is None or time is None:
        return None
    logs = {"power": power.log_ratio, "time": time.log_ratio if of_time == "seconds" else -time.log_ratio}
    large = {name: log for name, log in logs.items() if abs(log) >= _MIN_SHARE * abs(total)}
    text = ", ".join(f"{name} × {ratio_text(math.exp(log))}" for name, log in large.items())
    equal = [name for name in logs if name not in large]
    return f"{text} at equal {equal[0]}" if len(equal) == 1 else text


def _moved(
    candidate: PointResult, reference: PointResult, metric: str, total: float, *, paired: bool
) -> Iterator[str]:
    """Yield the parts of *metric* that changed too. *total* is the metric's log ratio."""
    import numpy as np

    parts = _PARTS.get(metric) or _PARTS.get(metric.partition("_")[0], {})
    for name, part in parts.items():
        change = _change(candidate, reference, part, paired=paired)
        if change is None or abs(change.log_ratio) < _MIN_SHARE * abs(total):
            continue
        distance, error, degrees = map(np.asarray, (abs(change.log_ratio), change.standard_error, change.degrees))
        if p_beyond(distance, error, degrees, 0.0) <= _LEVEL / 2:
            yield f"{name} × {ratio_text(math.exp(change.log_ratio))}"


def _throttling(candidate: PointResult, reference: PointResult) -> Iterator[str]:
    """Yield how long clocks were throttled, if that was longer in the candidate."""
    seconds, reference_seconds = (one.summary_of("throttled_seconds").mean for one in (candidate, reference))
    if seconds is not None and reference_seconds is not None and seconds > reference_seconds:
        yield f"clocks throttled for {rounded(seconds)} s against {rounded(reference_seconds)} s"
