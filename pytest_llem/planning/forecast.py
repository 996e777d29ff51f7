"""How much longer a study takes: the plan's estimates, corrected by what its experiments have taken so far."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from pytest_llem.planning import estimate
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.design import Point, StudyConfig


@dataclass(frozen=True)
class Expected:
    """What an experiment of a point is expected to take, in s.

    Attributes:
        each: Every one of them.
        once: What the first of them takes beyond that: it measures the idle machine.
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
        estimate.baseline_seconds(point.config, host),
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
        #: What experiments have taken, less what only a first one takes, by point.
        self._taken: dict[Hashable, list[float]] = {}
        #: Of completed ones: what they have taken, and what was estimated for them.
        self._completed: list[tuple[float, float | None]] = []
        self._left: float | None = None
        self._is_known = False

    def begin(self, key: Hashable) -> None:
        """Count an experiment as left no more: it runs, or will not."""
        self._pending.pop(key, None)
        self._is_known = False

    def end(self, key: Hashable, seconds: float, *, completed: bool) -> None:
        """Learn of what an experiment has taken. One that failed tells nothing of other points."""
        self.begin(key)
        point = self._points.get(key)
        estimated = self._estimates.get(point)
        first = not self._taken.get(point)
        seconds = max(0.0, seconds - estimated.once) if estimated is not None and first and completed else seconds
        self._taken.setdefault(point, []).append(seconds)
        if completed:
            self._completed.append((seconds, estimated.each if estimated is not None else None))

    def seconds(self, key: Hashable) -> float | None:
        """Return what an experiment is expected to take, in s; None where nothing tells."""
        return self._of(self._points.get(key), self._ratio())

    def left(self) -> float | None:
        """Return what those that are left are expected to take, one after the other, in s; None: nothing tells."""
        if not self._is_known:
            ratio = self._ratio()
            each = [self._of(self._points[key], ratio) for key in self._pending]
            known = [seconds for seconds in each if seconds is not None]
            self._left = sum(known) if len(known) == len(each) else None
            self._is_known = True
        return self._left

    def _of(self, point: Hashable, ratio: float | None) -> float | None:
        if taken := self._taken.get(point):
            return fmean(taken)
        estimated = self._estimates.get(point)
        if estimated is not None:
            return estimated.each * (1.0 if ratio is None else ratio) + estimated.once
        return fmean(seconds for seconds, _ in self._completed) if self._completed else None

    def _ratio(self) -> float | None:
        """Return by what factor the completed ones have taken longer than estimated; None where nothing tells."""
        known = [(seconds, estimated) for seconds, estimated in self._completed if estimated]
        estimated = sum(one for _, one in known if one is not None)
        return sum(seconds for seconds, _ in known) / estimated if estimated else None


def forecast(runs: Iterable[tuple[str, StudyConfig, Preflight, Iterable[tuple[str, Point]]]]) -> Forecast:
    """Return the forecast of experiments of one or more runs; each is known by its run's key and its id.

    Args:
        runs: Key, study and preflight of each, and id and point of each of its experiments.
    """
    points: dict[Hashable, Hashable] = {}
    estimates: dict[Hashable, Expected | None] = {}
    for run, study, preflight, experiments in runs:
        for name, point in experiments:
            points[run, name] = (run, point.id)
            if (run, point.id) not in estimates:
                estimates[run, point.id] = expected(point, study, preflight)
    return Forecast(points, estimates)
