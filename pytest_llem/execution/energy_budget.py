"""The marker ``energy_budget``: how much energy and time a test may take, held against what its call took."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from pytest_llem._plugin.declarations import ENERGY_BUDGET
from pytest_llem.energy.metering import EnergyMeter, EnergyReading
from pytest_llem.results.facts import MIN_TICKS
from pytest_llem.results.metrics import INVALID, resolution
from pytest_llem.study.problems import did_you_mean, shown

_LIMITS = ("joules", "seconds")
_KEYWORDS = (*_LIMITS, "allow_estimated")
_KNOWN = f" (there are: {', '.join(_KEYWORDS)})"


@dataclass(frozen=True)
class EnergyBudget:
    """What a test may take.

    Attributes:
        joules: In J; None for no such limit.
        seconds: In s; likewise.
        allow_estimated: An estimate of the energy may decide.
    """

    joules: float | None = None
    seconds: float | None = None
    allow_estimated: bool = False

    @classmethod
    def of(cls, item: pytest.Item) -> EnergyBudget:
        """Return the budget of a test that is marked; the marker nearest to it counts, and no other.

        Raises:
            pytest.fail.Exception: The marker says nothing that could be meant.
        """
        mark = item.get_closest_marker(ENERGY_BUDGET)
        assert mark is not None
        if (fault := _fault(mark)) is not None:
            pytest.fail(f"{ENERGY_BUDGET}: {fault}", pytrace=False)
        return cls(**mark.kwargs)

    def problems(self, used: EnergyReading, workers: int = 1) -> Iterator[str]:
        """Yield what a test that took *used* is not within, and why it is not judged.

        Args:
            used: What it took.
            workers: Of xdist, it among them, that used the devices at the time.
        """
        if self.joules is not None:
            if (why := self._unjudged(used)) is not None:
                yield f"its energy budget of {self.joules} J cannot be judged: {why}"
            elif used.energy_j is not None and used.energy_j > self.joules:
                took = _beyond(used.energy_j, self.joules)
                yield (
                    f"used {took} J ({used.method}, {used.source}{_beside(used, workers)}{_slowed()}), "
                    f"more than its budget of {self.joules} J"
                )
        if self.seconds is not None and used.seconds > self.seconds:
            took = _beyond(used.seconds, self.seconds)
            yield f"took {took} s{_slowed()}, more than its budget of {self.seconds} s"

    def _unjudged(self, used: EnergyReading) -> str | None:
        if used.energy_j is None:
            return f"no energy could be read ({used.reason})"
        if used.method == "estimated" and not self.allow_estimated:
            return (
                f"the energy is estimated ({used.source}), and not measured; allow_estimated=True lets that decide"
            )
        if used.invalid is not None:
            return f"the energy is invalid ({used.invalid}): {INVALID[used.invalid]}"
        if used.covers_gpus is False:
            return (
                f"the test uses a GPU, and the energy covers {used.boundary} only "
                '(the fixture energy_meter("rapl") measures that by name)'
            )
        if used.ticks is not None and used.ticks < MIN_TICKS:
            at_least = used.seconds / used.ticks * MIN_TICKS
            return (
                f"{used.seconds:.2g} s are {used.ticks:.0f} {resolution(used.method)}, and it takes "
                f"{MIN_TICKS}: have the test work for {at_least:.2g} s or more"
            )
        return None


@contextmanager
def metered(item: pytest.Item) -> Iterator[None]:
    """Meter the context and put the figures on *item*; what would pass fails where it is not within its budget."""
    budget = EnergyBudget.of(item)
    readings: list[EnergyReading] = []
    try:
        with EnergyMeter()() as reading:
            readings.append(reading)
            yield
    finally:
        for reading in readings:  # none where the meter did not get as far
            _put(item, reading)
    workers = getattr(item.config, "workerinput", {}).get("workercount", 1)
    if problems := list(budget.problems(reading, workers)):
        pytest.fail("; ".join(problems), pytrace=False)


def _beside(used: EnergyReading, workers: int) -> str:
    """Say that other tests may have a part in *used*: a device is read whole, whichever worker used it."""
    return f", with what {workers} workers of -n used at the time" * (workers > 1 and used.method != "estimated")


def _slowed() -> str:
    """Say that coverage, a debugger or a profiler has a part in what a test took: ``pytest --cov`` is one."""
    from pytest_llem.measurement.quality_warnings import active_tracer

    tracer = active_tracer()
    return "" if tracer is None else f", while {tracer}"


def _put(item: pytest.Item, reading: EnergyReading) -> None:
    """Put the figures into the user properties, and so into JUnit XML."""
    figures: list[tuple[str, object]] = [("llem_seconds", reading.seconds), ("llem_energy_method", reading.method)]
    if reading.energy_j is not None:
        figures += [("llem_energy_j", reading.energy_j), ("llem_energy_boundary", reading.boundary)]
    names = {name for name, _ in figures} | {"llem_energy_j", "llem_energy_boundary"}
    item.user_properties[:] = [one for one in item.user_properties if one[0] not in names] + figures  # a rerun's


def _fault(mark: pytest.Mark) -> str | None:
    """Return what is wrong with a marker's arguments."""
    if mark.args:
        return f"takes keywords only: {', '.join(_KEYWORDS)} (got {', '.join(map(shown, mark.args))})"
    for name in mark.kwargs:
        if name not in _KEYWORDS:
            return f"has no {name!r}{did_you_mean(name, _KEYWORDS) or _KNOWN}"
    given = {name: mark.kwargs[name] for name in _LIMITS if mark.kwargs.get(name) is not None}
    if not given:
        return "needs joules, seconds or both"
    for name, limit in given.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            return f"{name} must be a number greater than 0 (got {shown(limit)})"
    allow = mark.kwargs.get("allow_estimated", False)
    return None if isinstance(allow, bool) else f"allow_estimated must be true or false (got {shown(allow)})"


def _beyond(figure: float, limit: float) -> str:
    """Return *figure* with as many digits as it takes to be seen beyond *limit*, three at least."""
    least = max(3, len(f"{figure:.0f}"))  # none of those before the point is left to an exponent
    texts = (f"{figure:.{digits}g}" for digits in range(least, 18))
    return next((text for text in texts if float(text) > limit), repr(figure))
