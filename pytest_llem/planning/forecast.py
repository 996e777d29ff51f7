"""How much longer a study takes: the plan's estimates, corrected by what its experiments have taken so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from pytest_llem.planning import estimate
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.design import Point, StudyConfig


@dataclass(frozen=True)
class Expected:
    """What an experiment of a point is expected to take, in s.

    Attributes:
        each: Every one of them.
        once: What the first of them takes beyond that: it measures the idle machine, and that of a study waits for
            its forkserver.
    """

    each: float
    once: float = 0.0


def expected(point: Point, study: StudyConfig, preflight: Preflight) -> Expected | None:
    """Return a rough estimate for *point*, none of it where it cannot run here; None where nothing tells."""
    if point.skip is not None or preflight.reason(point) is not None:
        return Expected(0.0)
    footprint = preflight.footprint(point.config)
    if footprint is None:
        return None
    host = preflight.host_of(point.config)
    return Expected(
        estimate.seconds(point.config, study.execution, footprint, host),
        estimate.idle_power_seconds(point.config, host),
    )


class Forecast:
    """The experiments that are left, and what they are expected to take.

    One is expected to take what its point has taken before, on average; if that has not run yet, to
    take its estimate, times what the completed ones have taken ÷ what was estimated for them; where there is no
    estimate, what the completed ones have taken on average.

    Args:
        points: The point of each experiment, in any terms that tell them apart.
        estimates: By point; None where nothing is known.
    """

    def __init__(self, points: Mapping[Hashable, Hashable], estimates: Mapping[Hashable, Expected | None]) -> None:
        self._points = points
        self._estimates = estimates
        self._pending = dict.fromkeys(points)
        #: How many are left, by point, and what has been taken: how often and how long in all, in s.
        self._count = Counter(points.values())
        self._taken: dict[Hashable, tuple[int, float]] = {}
        #: Of completed ones: how many, what they have taken, and that and the estimate of those that had one.
        self._completed, self._seconds = 0, 0.0
        self._actual, self._estimated = 0.0, 0.0
        #: Of those that are left: what points that have run will take; estimates of the others, for each and
        #: once; how many have none. There may be 20,000 of them, so that none of it is added up anew each time.
        self._known, self._each, self._once, self._unknown = 0.0, 0.0, 0.0, 0
        for point in self._count:
            self._add(point, 1)

    def begin(self, key: Hashable) -> None:
        """Count an experiment as left no more: it runs, or will not."""
        if key in self._pending:
            del self._pending[key]
            point = self._points[key]
            self._add(point, -1)
            self._count[point] -= 1
            self._add(point, 1)

    def end(self, key: Hashable, seconds: float, *, completed: bool) -> None:
        """Learn of what an experiment has taken. One that failed tells nothing of other points."""
        self.begin(key)
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
        """Return what an experiment is expected to take, in s; None where nothing tells."""
        point = self._points.get(key)
        if point in self._taken:
            times, total = self._taken[point]
            return total / times
        estimated = self._estimates.get(point)
        return self._mean if estimated is None else estimated.each * self._ratio + estimated.once

    def left(self) -> float | None:
        """Return what those that are left are expected to take, one after the other, in s; None: nothing tells."""
        mean = self._mean
        if self._unknown and mean is None:
            return None
        return max(0.0, self._known + self._each * self._ratio + self._once + self._unknown * (mean or 0.0))

    def _add(self, point: Hashable, sign: int) -> None:
        """Add what is left of a point to the sums, or take it out."""
        count = self._count[point]
        if not count:
            return
        if point in self._taken:
            times, total = self._taken[point]
            self._known += sign * count * total / times
        elif (estimated := self._estimates.get(point)) is not None:
            self._each += sign * count * estimated.each
            self._once += sign * estimated.once
        else:
            self._unknown += sign * count

    @property
    def _mean(self) -> float | None:
        """What the completed ones have taken on average, in s; None where there is none."""
        return self._seconds / self._completed if self._completed else None

    @property
    def _ratio(self) -> float:
        """By what factor the completed ones have taken longer than estimated; 1 where nothing tells."""
        return self._actual / self._estimated if self._estimated else 1.0


def forecast(runs: Iterable[tuple[str, StudyConfig, Preflight, Iterable[tuple[str, Point]]]]) -> Forecast:
    """Return the forecast of experiments of one or more runs; each is known by its run's key and its id.

    Args:
        runs: Key, study and preflight of each, and id and point of each of its experiments.
    """
    points: dict[Hashable, Hashable] = {}
    estimates: dict[Hashable, Expected | None] = {}
    for run, study, preflight, experiments in runs:
        server = estimate.server_seconds(study.execution)
        for name, point in experiments:
            points[run, name] = (run, point.id)
            if (run, point.id) not in estimates:
                found = expected(point, study, preflight)
                if found is not None and found.each:
                    found, server = replace(found, once=found.once + server), 0.0
                estimates[run, point.id] = found
    return Forecast(points, estimates)
