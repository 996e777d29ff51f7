"""How far the same thing, measured in another session, is off: what a gate's delta has to leave room for.

A session is one run of a study. What differs between sessions and not within one (temperature of the room, clocks,
where memory came to lie) shifts all cycles of a session alike, so that no number of cycles shows it. Comparing
cycle by cycle within one session is free of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_llem.gates.statistics import UndecidableError
from pytest_llem.results.models import StudyResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.gates import DEFAULT_DELTA

#: Of the upper bound of a session's standard deviation.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """The standard deviation of what a session adds to the logarithm of a value, so about relative to the value.

    Attributes:
        sigma: The estimate, 0 or more.
        upper: Its one-sided upper bound at :data:`CONFIDENCE`.
        degrees: Degrees of freedom, of the sessions alone: points of a session share its effect, so that more of
            them are hardly more evidence.
        noise_known: The noise of cycles was subtracted, as far as it is known: some point has several a session.
    """

    sigma: float
    upper: float
    degrees: int
    noise_known: bool


@dataclass(frozen=True)
class SessionEffect:
    """What sessions do to a metric.

    Attributes:
        metric: By its name in the catalogue.
        sessions: Results that have the metric.
        points: Points that were pooled.
        spread: The session effect.
        delta: Relative change to leave out of account when sessions are compared.
        notes: What else there is to say of it, in words.
    """

    metric: str
    sessions: int
    points: int
    spread: Spread
    delta: float
    notes: tuple[str, ...] = ()


def session_effect(results: Sequence[StudyResult], metric: str, *, alpha: float, metrics: int) -> SessionEffect:
    """Return what sessions do to *metric*.

    Args:
        results: Of the same study, a session each.
        metric: By its name in the catalogue.
        alpha: Of false alarms, as :func:`session_delta` has it.
        metrics: How many metrics are gated.

    Raises:
        UndecidableError: No point has values of two sessions.
    """
    by_hash = [{point.config_hash: point.metrics.get(metric) for point in result.points} for result in results]
    by_point: list[list[list[float]]] = []
    sessions: set[int] = set()
    left_out: dict[str, list[str]] = {}
    estimated = False
    for point in results[0].points:
        found = [session.get(point.config_hash) for session in by_hash]
        known = {at: summary for at, summary in enumerate(found) if summary is not None and summary.n}
        if (reason := _unfit(found, list(known.values()))) is not None:
            left_out.setdefault(reason, []).append(point.id)
            continue
        estimated |= any(summary.method == "estimated" for summary in known.values())
        sessions |= set(known)
        by_point.append([[math.log(value) for value in _values(summary)] for summary in known.values()])
    if not by_point:
        raise UndecidableError("; ".join(left_out) or "the study has no points")
    notes = [f"without {_named(points)}: {reason}" for reason, points in left_out.items()]
    spread = session_spread(by_point)
    if not spread.noise_known:
        notes.append("one cycle a session: the noise of cycles is in sigma_session")
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

    The variance of the sessions' means is that of sessions and, over the number of cycles, that of cycles; what
    the spread within sessions says of the latter is subtracted. The upper bound is by χ² for the sum of both,
    less the same.

    Args:
        points: Of each point, of each of two or more sessions, the logarithms of the values of one or more cycles.
    """
    from scipy.special import chdtri

    between = noise = 0.0
    freedom = freedom_within = 0
    for sessions in points:
        sums = [_squares(session) for session in sessions]
        inner = sum(len(session) - 1 for session in sessions)
        share = sum(1 / len(session) for session in sessions) / len(sessions)
        within = math.fsum(square for _, square in sums) / inner if inner else 0.0
        between += _squares([mean for mean, _ in sums])[1]
        noise += (len(sessions) - 1) * within * share
        freedom += len(sessions) - 1
        freedom_within += inner
    between, noise = between / freedom, noise / freedom
    degrees = max(map(len, points)) - 1
    most = between * degrees / float(chdtri(degrees, CONFIDENCE))
    return Spread(
        sigma=math.sqrt(max(0.0, between - noise)),
        upper=math.sqrt(max(0.0, most - noise)),
        degrees=degrees,
        noise_known=freedom_within > 0,
    )


def session_delta(spread: Spread, *, alpha: float, metrics: int) -> float:
    """Return the relative change that two sessions' results have to be allowed to differ by.

    It is the one-sided prediction bound of the difference of two sessions, t(1 − alpha / metrics) · √2 · sigma,
    and 2 % at least. A session shifts the points of a metric together, but metrics each in its own way: alpha is
    divided among them, so that alpha of all comparisons at most show a change that is none. The t is of the
    sessions' degrees of freedom, so that few sessions ask for more. 2 · sigma would not do: two sessions differ by
    more in one direction with a chance of 8 %, be sigma known ever so well.
    """
    from scipy.special import stdtrit

    bound = -float(stdtrit(spread.degrees, alpha / metrics)) * math.sqrt(2) * spread.sigma
    return max(DEFAULT_DELTA, math.expm1(min(bound, 700.0)))


def _unfit(found: Sequence[Summary | None], known: Sequence[Summary]) -> str | None:
    """Return why a point cannot be pooled, or None; *known* are those *found* that have values."""
    if not known:
        return next((summary.reason for summary in found if summary and summary.reason), "no session has values")
    if len(known) < 2:
        return "only one session has values"
    if (reason := next((one.not_judged for one in known if one.not_judged is not None), None)) is not None:
        return reason
    if not all(summary.values for summary in known):
        return "the version that measured it did not keep the values of cycles"
    if len({summary.boundary for summary in known}) > 1:
        return "sessions took energy over different boundaries"
    if invalid := next((summary.invalid for summary in known if summary.invalid), None):
        return f"a session's energy is invalid ({invalid})"
    unfit = [value for summary in known for value in _values(summary) if not (math.isfinite(value) and value > 0)]
    return f"a cycle is {unfit[0]:g}, and ratios need values above 0" if unfit else None


def _values(summary: Summary) -> list[float]:
    return [value for value in summary.values if value is not None]


def _squares(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the sum of squared deviations from it."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values)


def _named(points: Sequence[str]) -> str:
    return points[0] if len(points) == 1 else f"{points[0]} and {len(points) - 1} more"
