"""Forecast a study's remaining time from the plan's estimates and the times of its finished experiments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from pytest_llem.planning import estimate
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.design import Point, StudyConfig


@dataclass(frozen=True)
class Expected:
    """Expected time of a point's experiments, in s.

    Attributes:
        each: Time of each experiment.
        once: Additional time of the point's first experiment, which measures idle power; the first experiment of a
            study also waits for its forkserver.
    """

    each: float
    once: float = 0.0


def expected(point: Point, study: StudyConfig, preflight: Preflight) -> Expected | None:
    """Return the estimated time of *point*: 0 s if it does not run, None if its model's size is unknown."""
    if point.skip is not None or preflight.refusal(point) is not None:
        return Expected(0.0)
    footprint = preflight.footprint(point.config)
    if footprint is None:
        return None
    host = preflight.host_of(point.config)
    return Expected(
        estimate.seconds(point.config, study.execution, preflight.needs(point.config), footprint, host),
        estimate.idle_power_seconds(point.config, host),
    )


class Forecast:
    """Forecast of the remaining time of a set of experiments.

    The expected time of an experiment is the mean time of its point so far. If the point has not run yet, it is
    the point's estimate × (total time of the completed experiments ÷ their total estimate). Without an estimate,
    it is the mean time of all completed experiments.

    Args:
        points: Unique key of the point of each experiment, by the experiment's key.
        estimates: Estimate of each point, or None.
    """

    def __init__(self, points: Mapping[Hashable, Hashable], estimates: Mapping[Hashable, Expected | None]) -> None:
        self._points = points
        self._estimates = estimates
        self._pending = set(points)
        #: Points of which an experiment runs or has run: their additional time is no longer expected.
        self._started: set[Hashable] = set()
        #: By point: number of pending experiments; number and total time (s) of ended ones.
        self._count = Counter(points.values())
        self._taken: dict[Hashable, tuple[int, float]] = {}
        #: Of all completed experiments: number and total time (s).
        self._completed, self._seconds = 0, 0.0
        #: Of the completed experiments with an estimate: total time and total estimate (s).
        self._actual, self._estimated = 0.0, 0.0
        #: Of all pending experiments: expected time (s) at points that have run; estimates (s) of other points,
        #: per experiment and once; number of experiments without an estimate. These sums are updated
        #: incrementally, because a study may have 20,000 experiments.
        self._known, self._each, self._once, self._unknown = 0.0, 0.0, 0.0, 0
        for point in self._count:
            self._add(point, 1)

    def start(self, key: Hashable) -> None:
        """Remove an experiment from the pending ones: it runs."""
        self.remove(key)
        point = self._points.get(key)
        self._add(point, -1)
        self._started.add(point)
        self._add(point, 1)

    def remove(self, key: Hashable) -> None:
        """Remove an experiment from the pending ones: it runs already, or will not run."""
        if key in self._pending:
            self._pending.remove(key)
            point = self._points[key]
            self._add(point, -1)
            self._count[point] -= 1
            self._add(point, 1)

    def end(self, key: Hashable, seconds: float, *, completed: bool) -> None:
        """Record the time of an ended experiment, in s.

        A failed experiment affects only the forecast of its own point.
        """
        self.remove(key)
        point = self._points.get(key)
        estimated = self._estimates.get(point)
        if estimated is not None and completed and point not in self._taken:
            seconds = max(0.0, seconds - estimated.once)
        times, total = self._taken.get(point, (0, 0.0))
        self._add(point, -1)
        self._taken[point] = times + 1, total + seconds
        self._add(point, 1)
        if completed:
            self._completed, self._seconds = self._completed + 1, self._seconds + seconds
            if estimated is not None:
                self._actual, self._estimated = self._actual + seconds, self._estimated + estimated.each

    def seconds(self, key: Hashable) -> float | None:
        """Return the expected time of an experiment, in s; None if unknown."""
        point = self._points.get(key)
        if point in self._taken:
            times, total = self._taken[point]
            return total / times
        estimated = self._estimates.get(point)
        if estimated is None:
            return self._mean
        return estimated.each * self._ratio + (0.0 if point in self._started else estimated.once)

    def left(self) -> float | None:
        """Return the expected time of all pending experiments, one after the other, in s; None if unknown."""
        mean = self._mean
        if self._unknown and mean is None:
            return None
        return max(0.0, self._known + self._each * self._ratio + self._once + self._unknown * (mean or 0.0))

    def _add(self, point: Hashable, sign: int) -> None:
        """Add a point's pending experiments to the sums (*sign* 1), or subtract them (-1)."""
        count = self._count[point]
        if not count:
            return
        if point in self._taken:
            times, total = self._taken[point]
            self._known += sign * count * total / times
        elif (estimated := self._estimates.get(point)) is not None:
            self._each += sign * count * estimated.each
            self._once += sign * (0.0 if point in self._started else estimated.once)
        else:
            self._unknown += sign * count

    @property
    def _mean(self) -> float | None:
        """Mean time of the completed experiments, in s; None if there are none."""
        return self._seconds / self._completed if self._completed else None

    @property
    def _ratio(self) -> float:
        """Total time of the completed experiments ÷ their total estimate; 1 if there are none."""
        return self._actual / self._estimated if self._estimated else 1.0


def forecast(runs: Iterable[tuple[str, StudyConfig, Preflight, Iterable[tuple[str, Point]]]]) -> Forecast:
    """Return the forecast of the experiments of one or more runs, keyed by (run's key, experiment's id).

    Args:
        runs: Key, study and preflight of each run, and the id and point of each of its experiments.
    """
    points: dict[Hashable, Hashable] = {}
    estimates: dict[Hashable, Expected | None] = {}
    for run, study, preflight, experiments in runs:
        forkserver = estimate.server_seconds(study.execution)
        for name, point in experiments:
            points[run, name] = (run, point.id)
            if (run, point.id) not in estimates:
                found = expected(point, study, preflight)
                if found is not None and found.each:
                    found, forkserver = replace(found, once=found.once + forkserver), 0.0
                estimates[run, point.id] = found
    return Forecast(points, estimates)
