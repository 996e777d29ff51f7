"""A change's line names what changed together with the metric, and says that this need not be the cause."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llem.gates.associations import associations
from pytest_llem.gates.regression import compare
from pytest_llem.gates.verdict_text import verdict_text
from pytest_llem.results.points import PointResult
from pytest_llem.study.gates import GatesConfig
from tests.support.study_results import H100, point, study_result

COST, SPEED, POWER = "energy_per_output_token_j", "output_tokens_per_second", "mean_power_w"
WOBBLE = [1.000, 1.001, 0.999, 1.0005, 0.9995]
SUT = {"torch": "2.5.1", "commit": "a" * 40}


def _point(
    *, power: float = 1.0, time: float = 1.0, ttft: float = 1.0, tpot: float = 1.0, **fields: Any
) -> PointResult:
    """Return a point with such multiples of power, time and latencies."""
    values = {COST: power * time, SPEED: 1 / time, POWER: 100 * power, "ttft_p50_ms": ttft, "tpot_p50_ms": tpot}
    known = {name: [value * one for one in WOBBLE] for name, value in values.items()}
    return point({"size": 1}, **known | {"sut": SUT} | fields)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"time": 1.2}, "time × 1.200 at equal power"),
        ({"power": 1.2}, "power × 1.200 at equal time"),
        ({"power": 1.1, "time": 1.1}, "power × 1.100, time × 1.100"),
        ({"power": 0.8, "time": 1.5}, "power × 0.800, time × 1.500"),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_change_of_energy_is_split_into_power_and_time(change: dict[str, float], text: str, paired: bool) -> None:
    assert associations(_point(**change), _point(), COST, paired=paired) == [text]


def test_only_the_latency_that_moved_is_named() -> None:
    assert associations(_point(time=1.2, tpot=1.25), _point(), SPEED, paired=True) == ["TPOT × 1.250"]
    assert associations(_point(time=1.2, ttft=1.25), _point(), SPEED, paired=True) == ["TTFT × 1.250"]


def test_latency_that_moved_within_its_noise_is_not_named() -> None:
    noisy = _point(time=1.2, ttft_p50_ms=[1.0, 1.6, 0.9, 1.2, 0.8])
    assert associations(noisy, _point(), SPEED, paired=False) == []


def test_first_token_is_not_explained_by_later_tokens() -> None:
    assert associations(_point(ttft=1.2, tpot=1.2), _point(), "ttft_p50_ms", paired=True) == []


def test_longer_throttling_is_named() -> None:
    hot = _point(time=1.2, throttled_seconds=[2.0] * 5)
    cool = _point(throttled_seconds=[0.0] * 5)
    assert associations(hot, cool, SPEED, paired=True) == ["clocks throttled for 2.00 s against 0 s"]
    assert associations(cool, hot, SPEED, paired=True) == []


def test_part_without_values_in_the_reference_is_not_named() -> None:
    reference = _point(mean_power_w=[None] * 5)
    assert associations(_point(time=1.2), reference, COST, paired=True) == []


def test_first_three_facts_that_differ_are_named() -> None:
    sut = {"torch": "2.6.0", "commit": "b" * 40, "settings.kv_cache": "static", "python": "3.12"}
    testbed = H100 | {"driver": "581.0", "ecc": "on"}  # only the candidate knows ecc
    found = associations(_point(sut=sut, testbed=testbed), _point(), COST, paired=False)
    assert found[-1] == "different: torch, commit, settings.kv_cache and 2 more"


def test_decided_change_stores_and_shows_associations() -> None:
    candidate, reference = _point(time=1.2, tpot=1.25, sut=SUT | {"torch": "2.6.0"}), _point()
    settings, there = GatesConfig(metrics=[COST]), study_result(reference)
    (worse,) = compare(study_result(candidate), there, settings, name="main", paired=True).verdicts
    assert worse.associated == ["time × 1.200 at equal power", "TPOT × 1.250", "different: torch"]
    assert verdict_text(worse).endswith(
        "; associated, which need not be the cause: time × 1.200 at equal power; TPOT × 1.250; different: torch"
    )
    (better,) = compare(there, study_result(candidate), settings, name="main").verdicts
    assert better.verdict == "IMPROVEMENT"
    assert better.associated == ["time × 0.833 at equal power", "TPOT × 0.800", "different: torch"]
    (same,) = compare(there, there.model_copy(deep=True), settings, name="main").verdicts
    assert same.associated == []
