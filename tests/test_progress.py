"""Progress reports of experiment processes, and the time left of a study."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llem.measurement.progress import MAX_PHASE_LENGTH, GpuStatus, Progress, parse
from pytest_llem.planning.forecast import Expected, Forecast


@pytest.mark.parametrize(
    "progress",
    [
        Progress("loading"),
        Progress("warming up", 3, 10, "runs"),
        Progress("warming up", 11, None, "runs"),
        Progress("measuring", total=10.0, unit="s"),
    ],
)
def test_progress_survives_its_event(progress: Progress) -> None:
    assert parse(json.loads(json.dumps(progress.as_event()))) == progress


@pytest.mark.parametrize(
    ("event", "seen"),
    [
        ({"power_w": 312.5, "temperature_c": 61}, GpuStatus(312.5, 61.0)),
        ({"power_w": 70}, GpuStatus(70.0)),
        ({"phase": "loading", "colour": "red"}, Progress("loading")),
        ({"phase": "loading", "done": "3", "total": True, "unit": "miles"}, Progress("loading")),
        ({"phase": "loading", "total": float("nan"), "unit": ["s"]}, Progress("loading")),
        ({"phase": "x" * 1000}, Progress("x" * MAX_PHASE_LENGTH)),
        ({"phase": 3}, None),
        ({"power_w": "much"}, None),
        ({"power_w": float("inf"), "temperature_c": 10**400}, None),
        ({}, None),
    ],
)
def test_malformed_fields_are_left_out(event: dict[str, Any], seen: GpuStatus | Progress | None) -> None:
    assert parse(event) == seen


JSON = st.sampled_from([None, True, [1], {"a": 1}, "text", ""]) | st.integers() | st.floats()


@given(st.dictionaries(st.sampled_from(["phase", "done", "total", "unit", "power_w", "temperature_c"]), JSON))
def test_parse_never_raises(event: dict[str, Any]) -> None:
    assert parse(event) is None or isinstance(parse(event), Progress | GpuStatus)


# ---- time left ----


def _forecast(estimates: Mapping[Hashable, Expected | None], cycles: int = 2) -> Forecast:
    points: dict[Hashable, Hashable] = {(point, cycle): point for cycle in range(cycles) for point in estimates}
    return Forecast(points, estimates)


def test_first_estimate_is_that_of_the_plan() -> None:
    forecast = _forecast({"a": Expected(10.0), "b": Expected(30.0, once=5.0)})
    assert forecast.seconds(("b", 0)) == 35.0
    forecast.remove(("b", 0))
    assert forecast.left() == pytest.approx(10 + 10 + 35)


def test_what_is_done_once_is_no_longer_left_while_it_is_done() -> None:
    forecast = _forecast({"a": Expected(10.0), "b": Expected(30.0, once=5.0)})
    forecast.start(("b", 0))
    assert forecast.left() == pytest.approx(10 + 10 + 30)
    assert forecast.seconds(("b", 1)) == 30.0
    forecast.end(("b", 0), 38.0, completed=True)
    assert forecast.left() == pytest.approx((10 + 10) * 33 / 30 + 33)


def test_estimates_are_corrected_by_what_experiments_have_taken() -> None:
    forecast = _forecast({"a": Expected(10.0), "b": Expected(30.0)})
    forecast.end(("a", 0), 20.0, completed=True)
    assert forecast.seconds(("b", 0)) == pytest.approx(60.0), "twice as long as estimated"
    forecast.end(("b", 0), 45.0, completed=True)
    assert forecast.seconds(("b", 1)) == pytest.approx(45.0), "a point takes what it took"
    assert forecast.left() == pytest.approx(20 + 45)


def test_the_idle_machine_is_measured_once() -> None:
    forecast = _forecast({"a": Expected(10.0, once=30.0)})
    forecast.end(("a", 0), 41.0, completed=True)
    assert forecast.left() == pytest.approx(11.0)


def test_failed_experiment_does_not_correct_estimates() -> None:
    forecast = _forecast({"a": Expected(10.0), "b": Expected(30.0)})
    forecast.end(("a", 0), 0.5, completed=False)
    assert forecast.seconds(("b", 0)) == 30.0
    assert forecast.seconds(("a", 1)) == 0.5


def test_without_an_estimate_time_left_is_unknown_before_the_first_run() -> None:
    forecast = _forecast({"a": None, "b": None})
    assert (forecast.seconds(("a", 0)), forecast.left()) == (None, None)
    forecast.end(("a", 0), 8.0, completed=True)
    assert forecast.seconds(("b", 0)) == 8.0
    assert forecast.left() == 24.0


def test_time_left_is_the_sum_over_remaining_experiments() -> None:
    """The running sums do not accumulate rounding errors."""
    estimates: dict[Hashable, Expected | None] = {
        point: [None, Expected(point), Expected(point, once=3.0)][point % 3] for point in range(60)
    }
    forecast = _forecast(estimates)
    order = [(point, cycle) for point in range(60) for cycle in range(2)]
    for number, (point, cycle) in enumerate(order[:-1], 1):
        forecast.end((point, cycle), point + number % 7, completed=number % 5 != 0)
        rest = order[number:]
        seconds = [forecast.seconds(one) for one in rest]
        known = [one for one in seconds if one is not None]
        assert len(known) == len(seconds)
        # Both cycles of a point that has not begun count the work that is done once for the point.
        twice = sum(point % 3 == 2 for point, cycle in rest if cycle == 0)
        assert forecast.left() == pytest.approx(sum(known) - 3 * twice)


def test_nothing_is_left_after_the_last() -> None:
    forecast = _forecast({"a": None}, cycles=1)
    forecast.end(("a", 0), 8.0, completed=True)
    assert forecast.left() == pytest.approx(0)
