"""Best and Pareto-optimal points."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llem.results.pareto import best, pareto_optimal
from tests.support.study_results import point, summary

COST = "energy_per_output_token_j"


def _point(number: Any, speed: Any, cost: Any, method: str = "measured", boundary: str = "gpu_board") -> Any:
    """Return a point whose cycles have equal values, so that intervals have no width."""
    cost = summary(COST, [cost] * 3, method=method, boundary=boundary)
    return point({"n": number}, output_tokens_per_second=[speed] * 3, energy_per_output_token_j=cost)


def _points(*figures: Any) -> Any:
    return [_point(number, *one) for number, one in enumerate(figures)]


def test_dominated_points_are_not_optimal() -> None:
    points = _points((100, 1.0), (200, 0.5), (300, 0.7), (300, 0.8), (50, 0.5), (50, 0.1))
    assert pareto_optimal(points).first == {1, 2, 5}


def test_equal_points_are_all_optimal() -> None:
    assert pareto_optimal(_points((100, 1.0), (100, 1.0), (100, 1.1), (90, 1.0))).first == {0, 1}


def test_point_without_a_value_is_not_optimal() -> None:
    points = _points((100, 1.0), (None, 0.1), (500, None), (200, 0.9))
    assert pareto_optimal(points).first == {3}


def test_energies_of_different_kinds_are_not_compared() -> None:
    points = _points(
        (100, 1.0),
        (90, 2.0),
        (1000, 0.001, "estimated", "cpu_package"),
        (2000, 0.002, "estimated", "cpu_package"),
        (5000, 1e-6, "estimated", "gpu_board"),
        (9000, 1e-9, "measured", None),
    )
    assert pareto_optimal(points).first == {0, 2, 3}, "neither those whose energy is like no other's"
    assert best(points, COST).first == {0, 2}
    assert best(points, "output_tokens_per_second").first == {5}, "throughput is not an energy"


@pytest.mark.parametrize(
    ("facts", "first"),
    [
        ([{"gpu": "H100"}, {"gpu": "2 × H100"}], {1}),
        ([{"gpu": "H100"}, {"gpu": "A100"}], set()),
        ([{"gpu": "H100", "host_cpu": "X"}, {"cpu": "X"}], {1}),
        ([{"cpu": "X"}, {"cpu": "Y"}], set()),
    ],
    ids=["one kind", "other GPUs", "GPU and CPU of one host", "other CPUs"],
)
def test_points_of_different_hosts_are_not_compared(facts: list[dict[str, Any]], first: set[int]) -> None:
    points = [
        one.model_copy(update={"testbed": testbed})
        for one, testbed in zip(_points((100, 1.0), (200, 0.5)), facts, strict=True)
    ]
    assert best(points, COST).first == first


def test_single_point_is_not_marked_as_best() -> None:
    assert pareto_optimal(_points((100, 1.0))).first == set()
    assert best(_points((100, 1.0)), COST).first == set()


def test_best_follows_the_direction_of_the_catalogue() -> None:
    points = _points((100, 1.0), (200, 2.0), (200, 2.0))
    assert best(points, "output_tokens_per_second").first == {1, 2}
    assert best(points, COST).first == {0}
    assert best(points, "mean_power_w").first == set(), "neither way is better"
    assert best(_points((100, 1.0), (100, 1.0)), "output_tokens_per_second").first == set(), "all are the same"


def test_negative_values_are_smaller() -> None:
    points = [point({"n": n}, active_energy_j=[joules] * 3) for n, joules in enumerate((0.5, -0.25, 0.0))]
    assert best(points, "active_energy_j").first == {1}


FIGURES = st.lists(
    st.tuples(
        st.sampled_from([None, 1.0, 2.0, 3.0, 4.0]),
        st.sampled_from([None, -1.0, 0.0, 1.0, 2.0]),
        st.sampled_from(["measured", "estimated"]),
    ),
    max_size=8,
)


@given(FIGURES)
def test_pareto_matches_its_definition(figures: Any) -> None:
    points = _points(*figures)
    known = [place for place, (speed, cost, _) in enumerate(figures) if None not in (speed, cost)]

    def beats(one: Any, other: Any) -> Any:
        (speed, cost, method), (others_speed, others_cost, others_method) = figures[one], figures[other]
        no_worse = speed >= others_speed and cost <= others_cost
        return method == others_method and no_worse and (speed, cost) != (others_speed, others_cost)

    alone = [place for place in known if sum(figures[one][2] == figures[place][2] for one in known) == 1]
    wanted = {place for place in known if place not in alone and not any(beats(one, place) for one in known)}
    assert pareto_optimal(points).first == wanted


#: Values of a point's cycles: without spread, with overlapping intervals, and without an interval.
CYCLES = st.sampled_from([[1.0] * 3, [2.0] * 3, [1.0, 2.0, 3.0], [1.9, 2.0, 2.1], [2.0]])


@given(st.lists(st.tuples(CYCLES, CYCLES), max_size=6))
def test_pareto_of_intervals_matches_its_definition(figures: list[tuple[list[float], list[float]]]) -> None:
    points = [
        point(
            {"n": number},
            output_tokens_per_second=speeds,
            energy_per_output_token_j=summary(COST, costs, method="measured", boundary="gpu_board"),
        )
        for number, (speeds, costs) in enumerate(figures)
    ]
    best_values, worst_values = [], []
    for one in points:
        slow, fast = one.metrics["output_tokens_per_second"].ci95 or (-math.inf, math.inf)
        cheap, dear = one.metrics[COST].ci95 or (-math.inf, math.inf)
        best_values.append((-fast, cheap))
        worst_values.append((-slow, dear))

    def beaten(rivals: list[tuple[float, float]], values: list[tuple[float, float]]) -> set[int]:
        return {
            place
            for place, one in enumerate(values)
            for other, rival in enumerate(rivals)
            if other != place and rival != one and rival[0] <= one[0] and rival[1] <= one[1]
        }

    perhaps, surely = beaten(best_values, worst_values), beaten(worst_values, best_values)
    compared = len(points) > 1 and any(min(map(len, one)) > 1 for one in figures)
    every = {*range(len(points))} if compared else set()
    assert pareto_optimal(points) == (every - perhaps, every & (perhaps - surely))


@pytest.mark.parametrize("figures", [[], [(None, None)]])
def test_empty_study_has_no_best(figures: list[Any]) -> None:
    points = _points(*figures)
    assert (*pareto_optimal(points), *best(points, COST)) == (set(),) * 4
