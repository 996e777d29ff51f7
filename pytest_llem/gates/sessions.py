"""The session effect: how much a metric differs between sessions without a change, which delta has to allow for.

A session is one run of a study. What differs between sessions but not within one (room temperature, clocks, memory
layout) shifts all cycles of a session alike, so that more cycles do not reveal it. Interleaved comparisons within
one session are free of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.matching import named
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import DEFAULT_DELTA

#: Confidence of the upper bound of the sessions' standard deviation.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the session effect on the logarithm of a value, which is about the relative deviation.

    Attributes:
        sigma: Estimate, 0 or more.
        upper: One-sided upper bound of ``sigma`` at :data:`CONFIDENCE`.
        degrees: Degrees of freedom, of the sessions alone: the points of a session share its effect, so that more
            points hardly add evidence.
        noise_known: Whether the noise of cycles was estimated and subtracted, for which some point must have
            several cycles in a session.
    """

    sigma: float
    upper: float
    degrees: int
    noise_known: bool


@dataclass(frozen=True)
class SessionEffect:
    """The session effect on a metric.

    Attributes:
        metric: Name of the metric in the catalogue.
        sessions: Number of sessions with pooled values.
        points: Number of pooled points.
        spread: Spread between sessions.
        delta: Relative change that should not count when sessions are compared.
        notes: Remarks, as text.
    """

    metric: str
    sessions: int
    points: int
    spread: Spread
    delta: float
    notes: tuple[str, ...] = ()


def session_effect(results: Sequence[StudyResult], metric: str, *, alpha: float, metrics: int) -> SessionEffect:
    """Return the session effect on *metric*.

    Args:
        results: Results of the same study, one per session.
        metric: Name of the metric in the catalogue.
        alpha: Probability of a false alarm, as in :func:`session_delta`.
        metrics: Number of gated metrics.

    Raises:
        UndecidableError: No point has usable values from two sessions.
    """
    by_hash = [{point.config_hash: point.metrics.get(metric) for point in result.points} for result in results]
    by_point: list[list[list[float]]] = []
    sessions: set[int] = set()
    left_out: dict[str, list[str]] = {}
    estimated = False
    ids = {point.config_hash: point.id for result in results for point in result.points}
    for config_hash, point_id in ids.items():  # a session may have measured only some of the points
        found = [session.get(config_hash) for session in by_hash]
        known = {index: summary for index, summary in enumerate(found) if summary is not None and summary.n}
        if (reason := _unfit(found, list(known.values()))) is not None:
            left_out.setdefault(reason, []).append(point_id)
            continue
        estimated |= any(summary.method == "estimated" for summary in known.values())
        sessions |= set(known)
        by_point.append([[math.log(value) for value in _values(summary)] for summary in known.values()])
    if not by_point:
        raise UndecidableError("; ".join(left_out) or "the study has no points")
    notes = [f"without {named(points)}: {reason}" for reason, points in left_out.items()]
    spread = session_spread(by_point)
    if not spread.noise_known:
        notes.append("one cycle per session: sigma_session includes the noise of cycles")
    if estimated:
        notes.append("estimated, not measured")
    return SessionEffect(
        metric=metric,
        sessions=len(sessions),
        points=len(by_point),
        spread=spread,
        delta=session_delta(spread, alpha=alpha, metrics=metrics),
        notes=tuple(notes),
    )


def session_spread(points: Sequence[Sequence[Sequence[float]]]) -> Spread:
    """Return the spread between sessions, by the method of moments, pooled over points.

    The variance of the sessions' means is the variance of sessions plus the variance of cycles ÷ their number. The
    latter is estimated within sessions and subtracted. The upper bound is the χ² bound of the sum, less the same
    estimate.

    Args:
        points: For each point and each of its two or more sessions, the logarithms of the cycles' values.
    """
    from scipy.special import chdtri

    between = noise = 0.0
    degrees_between = degrees_within = 0
    for sessions in points:
        moments = [_mean_and_squares(session) for session in sessions]
        degrees_of_point = sum(len(session) - 1 for session in sessions)
        mean_inverse_n = sum(1 / len(session) for session in sessions) / len(sessions)
        within = math.fsum(squares for _, squares in moments) / degrees_of_point if degrees_of_point else 0.0
        between += _mean_and_squares([mean for mean, _ in moments])[1]
        noise += (len(sessions) - 1) * within * mean_inverse_n
        degrees_between += len(sessions) - 1
        degrees_within += degrees_of_point
    between, noise = between / degrees_between, noise / degrees_between
    degrees = max(map(len, points)) - 1
    upper = between * degrees / float(chdtri(degrees, CONFIDENCE))
    return Spread(
        sigma=math.sqrt(max(0.0, between - noise)),
        upper=math.sqrt(max(0.0, upper - noise)),
        degrees=degrees,
        noise_known=degrees_within > 0,
    )


def session_delta(spread: Spread, *, alpha: float, metrics: int) -> float:
    """Return the relative change by which the results of two sessions may differ without a change.

    It is the one-sided prediction bound of the difference of two sessions, t(1 − alpha / metrics) · √2 · sigma,
    and at least 2 %. A session shifts all points of a metric alike, but each metric differently. So alpha is
    divided by the number of metrics, which limits the share of comparisons with a false alarm to alpha. The t has
    the sessions' degrees of freedom, so that fewer sessions give a larger bound. 2 · sigma would be too small: two
    sessions differ by more in one direction with a probability of 8 %, even if sigma is known exactly.
    """
    from scipy.special import stdtrit

    bound = -float(stdtrit(spread.degrees, alpha / metrics)) * math.sqrt(2) * spread.sigma
    return max(DEFAULT_DELTA, math.expm1(min(bound, 700.0)))  # above 709 the exponential overflows


def _unfit(found: Sequence[Summary | None], known: Sequence[Summary]) -> str | None:
    """Return why a point cannot be pooled; None if it can. *known* are the summaries in *found* with values."""
    if not known:
        return next((summary.reason for summary in found if summary and summary.reason), "no session has values")
    if len(known) < 2:
        return "only one session has values"
    if (reason := next((one.not_judged for one in known if one.not_judged is not None), None)) is not None:
        return reason
    if not all(summary.values for summary in known):
        return "the version that measured it did not keep the values of cycles"
    if len({summary.boundary for summary in known}) > 1:
        return "the energy boundary differs between sessions"
    if invalid := next((summary.invalid for summary in known if summary.invalid), None):
        return f"a session's energy is invalid ({invalid})"
    unfit = [value for summary in known for value in _values(summary) if not (math.isfinite(value) and value > 0)]
    return f"a cycle is {unfit[0]:g}, and ratios need values above 0" if unfit else None


def _values(summary: Summary) -> list[float]:
    return [value for value in summary.values if value is not None]


def _mean_and_squares(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the sum of squared deviations from it."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values)
