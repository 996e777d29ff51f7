"""The log ratio of two interleaved cycles, from their turns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.pair_log_ratio import location, pair_log_ratio, process_share, turn_spread

TURNS = st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)), min_size=1, max_size=12)


def turns(random: np.random.Generator, ratio: float = 1.0) -> tuple[list[float], list[float]]:
    """Return eight turns of each of two cycles."""
    candidate, reference = np.exp(0.01 * random.standard_normal((2, 8)))
    return list(ratio * candidate), list(reference)


def test_shared_slowdown_does_not_change_the_log_ratio() -> None:
    machine = np.array([1.0, 1.8, 0.7, 1.2, 3.0, 1.0])
    assert pair_log_ratio(list(1.05 * machine), list(machine)) == pytest.approx(math.log(1.05))
    assert turn_spread(list(1.05 * machine), list(machine)) == pytest.approx(0.0, abs=1e-12)


def test_linear_drift_cancels_in_alternating_order() -> None:
    slots = iter(np.exp(0.1 * np.arange(16)))
    candidate: list[float] = []
    reference: list[float] = []
    for turn in range(8):
        for side in (candidate, reference) if turn % 2 == 0 else (reference, candidate):
            side.append(float(next(slots)))
    assert pair_log_ratio(candidate, reference) == pytest.approx(0.0, abs=1e-12)


def test_turns_disturbed_on_one_side_are_left_out() -> None:
    candidate, reference = [1.02, 1.01, 1.02, 1.03, 1.02, 1.02], [1.0, 1.0, 1.01, 1.0, 1.0, 1.01]
    expected = pair_log_ratio(candidate, reference)
    assert pair_log_ratio([*candidate, 3.0, 1.02], [*reference, 1.0, 2.5]) == pytest.approx(expected)
    assert turn_spread([*candidate, 3.0], [*reference, 1.0]) < 0.02


@settings(deadline=None)  # other processes may slow down the machine
@given(TURNS)
def test_exchanged_sides_change_the_sign(pairs: list[tuple[float, float]]) -> None:
    candidate, reference = (list(side) for side in zip(*pairs, strict=True))
    assert pair_log_ratio(reference, candidate) == pytest.approx(-pair_log_ratio(candidate, reference), abs=1e-12)


def test_location_takes_the_last_axis() -> None:
    ratios = np.random.default_rng(1).standard_t(2, (5, 3, 8))
    assert location(ratios)[4, 2] == pytest.approx(location(ratios[4, 2]))


@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    [
        ([1.0, 2.0], [1.0], "2 turns in the candidate, 1 in the reference"),
        ([], [], "no turns"),
        ([1.0, None], [1.0, 1.0], "turn 2 has no value"),
        ([1.0, 1.0], [1.0, 0.0], "turn 2 of the reference is 0, and ratios need values above 0"),
        ([math.nan], [1.0], "turn 1 is nan, and"),
    ],
)
def test_turns_without_a_log_ratio_raise_with_the_reason(
    candidate: list[float | None], reference: list[float | None], message: str
) -> None:
    with pytest.raises(UndecidableError, match=message):
        pair_log_ratio(candidate, reference)


def test_process_share_separates_processes_from_turns() -> None:
    random = np.random.default_rng(2)
    alike = [turns(random) for _ in range(400)]
    apart = [turns(random, math.exp(0.01 * random.standard_normal())) for _ in range(400)]
    assert process_share(alike) < 0.15
    # A log ratio of two turns varies by √2 · 1 %, the location of eight by 0.54 %, and processes by 1 %.
    assert process_share(apart) == pytest.approx(1 / (1 + 0.54**2), abs=0.05)


def test_spread_needs_two_turns_and_share_two_pairs() -> None:
    with pytest.raises(UndecidableError, match="at least 2 turns"):
        turn_spread([1.0], [1.0])
    with pytest.raises(UndecidableError, match="at least 2 pairs of cycles"):
        process_share([([1.0, 1.1], [1.0, 1.0])])
