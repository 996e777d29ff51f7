"""The marker ``energy_budget``: compare the energy and time of a test's call with limits."""

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
    """Limits for one test.

    Attributes:
        joules: Energy limit in J; None for no limit.
        seconds: Time limit in s; None for no limit.
        allow_estimated: Whether an estimated energy may be judged.
    """

    joules: float | None = None
    seconds: float | None = None
    allow_estimated: bool = False

    @classmethod
    def of(cls, item: pytest.Item) -> EnergyBudget:
        """Return the budget of a marked test, from the marker closest to it.

        Raises:
            pytest.fail.Exception: The marker's arguments are invalid.
        """
        mark = item.get_closest_marker(ENERGY_BUDGET)
        assert mark is not None
        if (fault := _fault(mark)) is not None:
            pytest.fail(f"{ENERGY_BUDGET}: {fault}", pytrace=False)
        return cls(**mark.kwargs)

    def problems(self, used: EnergyReading, workers: int = 1) -> Iterator[str]:
        """Yield each limit that a test exceeds or that cannot be judged, with the reason.

        Args:
            used: Energy and time of the test.
            workers: Number of xdist workers that used the devices at the time, this one included.
        """
        if self.joules is not None:
            if (why := self._unjudged(used)) is not None:
                yield f"its energy budget of {self.joules} J cannot be judged: {why}"
            elif used.energy_j is not None and used.energy_j > self.joules:
                amount = _beyond(used.energy_j, self.joules)
                yield (
                    f"used {amount} J ({used.method}, {used.source}{_beside(used, workers)}{_slowed()}), "
                    f"more than its budget of {self.joules} J"
                )
        if self.seconds is not None and used.seconds > self.seconds:
            amount = _beyond(used.seconds, self.seconds)
            yield f"took {amount} s{_slowed()}, more than its budget of {self.seconds} s"

    def _unjudged(self, used: EnergyReading) -> str | None:
        if used.energy_j is None:
            return f"no energy could be read ({used.reason})"
        if used.method == "estimated" and not self.allow_estimated:
            return f"the energy is estimated ({used.source}), not measured; allow_estimated=True accepts estimates"
        if used.invalid is not None:
            return f"the energy is invalid ({used.invalid}): {INVALID[used.invalid]}"
        if used.covers_gpus is False:
            return (
                f"the test uses a GPU, and the energy covers {used.boundary} only "
                '(the fixture energy_meter("rapl") measures that by name)'
            )
        if used.ticks is not None and used.tick_seconds is not None and used.ticks < MIN_TICKS:
            # Not computed from the test's own time: a meter that waits for ticks covers more than a short test.
            return (
                f"the energy has {math.floor(used.ticks)} {resolution(used.method)}, fewer than {MIN_TICKS}: "
                f"have the test work for {MIN_TICKS * used.tick_seconds:.2f} s or more"
            )
        return None


@contextmanager
def metered(item: pytest.Item) -> Iterator[None]:
    """Measure the context, and put energy and time on *item*.

    A passing test fails if it exceeds its budget, or if that cannot be judged.
    """
    budget = EnergyBudget.of(item)
    readings: list[EnergyReading] = []
    try:
        with EnergyMeter()() as reading:
            readings.append(reading)
            yield
    finally:
        for reading in readings:  # none if the meter failed to start
            _put(item, reading)
    workers = getattr(item.config, "workerinput", {}).get("workercount", 1)
    if problems := list(budget.problems(reading, workers)):
        pytest.fail("; ".join(problems), pytrace=False)


def _beside(used: EnergyReading, workers: int) -> str:
    """Return a note that *used* may include other tests: a counter covers a whole device, for all workers."""
    return f", with what {workers} workers of -n used at the time" * (workers > 1 and used.method != "estimated")


def _slowed() -> str:
    """Return a note that coverage (``pytest --cov``), a debugger or a profiler slowed the test down."""
    from pytest_llem.measurement.quality_warnings import tracer_warning

    tracer = tracer_warning()
    return "" if tracer is None else f", while {tracer}"


def _put(item: pytest.Item, reading: EnergyReading) -> None:
    """Put the values into the user properties, which JUnit XML shows."""
    values: list[tuple[str, object]] = [("llem_seconds", reading.seconds), ("llem_energy_method", reading.method)]
    if reading.energy_j is not None:
        values += [("llem_energy_j", reading.energy_j), ("llem_energy_boundary", reading.boundary)]
    names = {name for name, _ in values} | {"llem_energy_j", "llem_energy_boundary"}
    # A rerun replaces the values of the previous run.
    item.user_properties[:] = [one for one in item.user_properties if one[0] not in names] + values


def _fault(mark: pytest.Mark) -> str | None:
    """Return what is wrong with a marker's arguments; None if they are valid."""
    if mark.args:
        return f"takes keywords only: {', '.join(_KEYWORDS)} (got {', '.join(map(shown, mark.args))})"
    for name in mark.kwargs:
        if name not in _KEYWORDS:
            return f"unknown argument {name!r}{did_you_mean(name, _KEYWORDS) or _KNOWN}"
    given = {name: mark.kwargs[name] for name in _LIMITS if mark.kwargs.get(name) is not None}
    if not given:
        return "needs joules, seconds or both"
    for name, limit in given.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            return f"{name} must be a number greater than 0 (got {shown(limit)})"
    allow = mark.kwargs.get("allow_estimated", False)
    return None if isinstance(allow, bool) else f"allow_estimated must be true or false (got {shown(allow)})"


def _beyond(value: float, limit: float) -> str:
    """Return *value* with at least three digits, and as many as show that it exceeds *limit*."""
    min_digits = max(3, len(f"{value:.0f}"))  # so that no exponent is used
    texts = (f"{value:.{digits}g}" for digits in range(min_digits, 18))
    return next((text for text in texts if float(text) > limit), repr(value))
