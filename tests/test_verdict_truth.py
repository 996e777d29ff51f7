"""Shown verdicts, intervals and marks agree with what was decided."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llem.gates.regression import compare
from pytest_llem.gates.verdict_text import percent, verdict_text
from pytest_llem.reporting.terminal.comparison import lines
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.reporting.text import mean_text
from pytest_llem.results.metrics import metric
from pytest_llem.results.pareto import Ranking, best, pareto_optimal
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary, mean_interval
from pytest_llem.results.tabular import point_table
from pytest_llem.results.verdicts import GateVerdict, worst
from pytest_llem.study.gates import DEFAULT_FAMILY, GatesConfig
from tests.support.study_results import H100, point, study_result, summary

COST, SPEED, TTFT = DEFAULT_FAMILY

STEADY = [1.000, 1.001, 0.999, 1.0005, 0.9995]
NOISY = [0.5, 1.0, 2.0, 0.7, 1.4]


def scaled(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def verdict(word: Any, outcome: Any) -> GateVerdict:
    return GateVerdict(gate="regression", id="x", metric=COST, point="p", unit="J", verdict=word, outcome=outcome)


def _column(points: list[PointResult], name: str) -> list[Any]:
    """Return a column of summary.csv."""
    table = point_table(study_result(*points))
    return [row[table.columns.index(name)] for row in table.rows]


EXCUSED = verdict("NOT JUDGED", "skipped")


class TestColumn:
    @pytest.mark.parametrize(
        "other",
        [
            verdict("INCONCLUSIVE", "skipped"),
            verdict("SAME", "passed"),
            verdict("IMPROVEMENT", "passed"),
            verdict("REGRESSION", "failed"),
        ],
        ids=lambda one: one.verdict,
    )
    def test_judged_verdict_is_shown_before_one_on_estimated_energy(self, other: GateVerdict) -> None:
        assert worst([EXCUSED, other]) is worst([other, EXCUSED]) is other

    def test_failed_not_judged_is_shown_before_inconclusive(self) -> None:
        failed = verdict("NOT JUDGED", "failed")
        assert worst([verdict("INCONCLUSIVE", "skipped"), failed]) is failed

    def test_verdict_column_of_a_point_with_estimated_energy(self) -> None:
        def estimated(values: list[float]) -> PointResult:
            cost = summary(COST, values, method="estimated", boundary="cpu_package")
            return point({"n": 1}, **{COST: cost, SPEED: NOISY, TTFT: NOISY, "seconds": NOISY})

        candidate, reference = estimated(STEADY), estimated(STEADY)
        found = compare(study_result(candidate), study_result(reference), GatesConfig(), name="main")
        candidate.verdicts = found.verdicts
        made = points_table([candidate], {candidate.config_hash: 5}, 80)
        assert render(made.table, 80)[-1].split()[-1] == "INCONCLUSIVE"
        assert _column([candidate], "verdict") == ["INCONCLUSIVE"]


#: What a side may have of a metric.
SIDES: dict[str, Any] = {
    "measured": summary(COST, STEADY),
    "estimated": summary(COST, STEADY, method="estimated", boundary="cpu_package"),
    "no meter": Summary(mean=None, n=0, unit="J", reason="no meter", method="unavailable"),
}


class TestWithoutMeter:
    """A default gate is skipped only if neither side can have the metric."""

    @pytest.mark.parametrize(("candidate", "reference"), [*itertools.product(SIDES, repeat=2)])
    def test_default_gate_is_skipped_only_if_both_sides_have_no_value(
        self, candidate: str, reference: str
    ) -> None:
        sides = [
            point({}, testbed={**H100, "energy_method": side}, **{COST: SIDES[side], SPEED: STEADY, TTFT: STEADY})
            for side in (candidate, reference)
        ]
        found = compare(study_result(sides[0]), study_result(sides[1]), GatesConfig(), name="main").verdicts[0]
        if candidate == reference == "measured":
            assert (found.verdict, found.outcome) == ("SAME", "passed")
        else:
            is_lost = "measured" in (candidate, reference)
            assert (found.verdict, found.outcome) == ("NOT JUDGED", "failed" if is_lost else "skipped")

    def test_point_measured_on_neither_side_does_not_pass(self) -> None:
        found = compare(study_result(point({})), study_result(point({})), GatesConfig(), name="main")
        assert [(one.verdict, one.outcome) for one in found.verdicts] == [("NOT JUDGED", "failed")] * 3


class TestInterval:
    """The shown interval is the one that decided."""

    @pytest.mark.parametrize("delta", [0.0, 0.02])
    @pytest.mark.parametrize("factor", [0.9, 0.99, 1.0, 1.01, 1.03, 1.1])
    def test_interval_agrees_with_the_verdict(self, delta: float, factor: float) -> None:
        """In some of these families Holm's procedure changes verdicts."""
        points = [point({"n": n}, seconds=scaled([0.98, 1.0, 1.02], 1 + 0.02 * n)) for n in range(6)]
        reference = [point({"n": n}, seconds=scaled([0.981, 1.0, 1.019], 1 / factor)) for n in range(6)]
        settings = GatesConfig(metrics=["seconds"], delta=delta)
        found = compare(study_result(*points), study_result(*reference), settings, name="main")
        for one in found.verdicts:
            assert one.interval is not None
            low, high = one.interval
            assert (one.verdict == "REGRESSION") == (low > 1 + delta), one
            assert (one.verdict == "IMPROVEMENT") == (high < 1 / (1 + delta)), one
            within = 1 / (1 + delta) < low < high < 1 + delta
            assert (one.verdict == "SAME") == within, one

    def test_interval_of_gate_inconclusive_by_holm_includes_the_margin(self) -> None:
        values, worse = [0.99, 1.0, 1.01], [1.062, 1.073, 1.084]
        points = [point({"n": n}, seconds=values) for n in range(1, 6)]
        candidate = study_result(point({"n": 0}, seconds=worse), *points)
        reference = study_result(point({"n": 0}, seconds=values), *points)
        settings = GatesConfig(metrics=["seconds"])
        alone = compare(candidate, reference, settings, name="main", points=["n=0"]).verdicts[0]
        family = compare(candidate, reference, settings, name="main").verdicts[0]
        assert (alone.verdict, family.verdict) == ("REGRESSION", "INCONCLUSIVE")
        assert (alone.confidence, family.confidence) == pytest.approx((0.98, 1 - 0.02 / 6))
        assert alone.interval is not None
        assert family.interval is not None
        assert family.interval[0] < 1.02 < alone.interval[0]
        assert "99.7 % interval" in verdict_text(family)

    def test_table_states_the_confidence_of_its_intervals(self) -> None:
        points = [point({"n": n}, seconds=NOISY, load_seconds=STEADY) for n in range(2)]
        settings = GatesConfig(metrics=["seconds", "load_seconds"])
        found = compare(study_result(*points), study_result(*points), settings, name="main")
        assert any("with the 98 % to 99.5 % interval that decided" in line for line in lines(found, 100))

    def test_confidence_below_one_is_never_shown_as_100_percent(self) -> None:
        assert [percent(share) for share in (0.98, 0.99833, 0.99998, 0.9999999)] == [
            "98 %",
            "99.8 %",
            "99.998 %",
            "99.99999 %",
        ]


class TestFewValues:
    @pytest.mark.parametrize("values", [[1.0], [1.0, 2.0]])
    def test_fewer_than_three_values_have_no_interval(self, values: list[float]) -> None:
        assert mean_interval(values)[2] is None
        found = summary(SPEED, values)
        assert found.ci95 is None
        assert "±" not in mean_text(found)

    def test_two_values_have_a_standard_deviation(self) -> None:
        assert mean_interval([1.0, 3.0])[:2] == pytest.approx((2.0, 2**0.5))

    def test_interval_of_two_values_in_an_older_result_is_dropped(self) -> None:
        assert Summary(mean=1.0, n=2, unit="s", ci95=(0.0, 2.0)).ci95 is None
        assert Summary(mean=1.0, n=3, unit="s", ci95=(0.0, 2.0)).ci95 == (0.0, 2.0)


def _point(number: int, speed: tuple[float, float], cost: tuple[float, float], n: int = 3) -> PointResult:
    """Return a point with intervals, or without them for fewer than three cycles."""

    def made(name: str, edges: tuple[float, float]) -> Summary:
        energy = {"method": "measured", "boundary": "gpu_board"} if name == COST else {}
        unit = metric(name, None).unit
        return Summary(mean=sum(edges) / 2, ci95=edges, n=n, unit=unit, **energy)

    return point({"n": number}, config_hash=f"{number:016}", **{SPEED: made(SPEED, speed), COST: made(COST, cost)})


class TestMarks:
    """A point is best, or Pareto-optimal, only if its interval does not overlap with the others'."""

    def test_best_point_has_an_interval_apart_from_the_others(self) -> None:
        points = [_point(0, (100, 110), (1, 2)), _point(1, (120, 130), (1.5, 3)), _point(2, (90, 95), (5, 6))]
        assert best(points, SPEED) == Ranking({1}, set())
        assert best(points, COST) == Ranking(set(), {0, 1})

    def test_point_without_an_interval_may_be_best(self) -> None:
        points = [_point(0, (100, 110), (1, 2)), _point(1, (500, 600), (0.1, 0.2), n=2)]
        assert best(points, SPEED) == pareto_optimal(points) == Ranking(set(), {0, 1})

    def test_without_any_interval_no_point_is_marked(self) -> None:
        points = [_point(n, (100 * n, 110 * n), (1, 2), n=2) for n in (1, 2)]
        assert best(points, SPEED) == pareto_optimal(points) == Ranking(set(), set())
        made = points_table(points, {one.config_hash: 2 for one in points}, 80)
        assert made.legend == []

    def test_pareto_optimal_points_have_intervals_apart(self) -> None:
        cheap, fast = _point(0, (100, 110), (1, 2)), _point(1, (200, 210), (3, 4))
        beaten, open_ = _point(2, (50, 60), (5, 6)), _point(3, (205, 215), (3.5, 5))
        assert pareto_optimal([cheap, fast, beaten]) == Ranking({0, 1}, set())
        assert pareto_optimal([cheap, fast, beaten, open_]) == Ranking({0}, {1, 3})

    def test_value_that_is_not_judged_is_never_best(self) -> None:
        points = [_point(0, (100, 110), (1, 2)), _point(1, (120, 130), (3, 4)), _point(2, (900, 910), (0.1, 0.2))]
        for name in (SPEED, COST):
            points[2].metrics[name].not_judged = "1 of 8 requests failed or returned no token"
        assert best(points, SPEED) == Ranking({1}, set())
        assert pareto_optimal(points) == Ranking({0, 1}, set())

    def test_table_marks_ties(self) -> None:
        points = [_point(0, (100, 110), (1, 2)), _point(1, (105, 115), (3, 4)), _point(2, (10, 11), (8, 9))]
        made = points_table(points, {one.config_hash: 3 for one in points}, 80)
        one, other, last = render(made.table, 80)[-3:]
        assert [line[0] for line in made.legend] == ["*", "P", "~"]
        assert (one[0], other[0], last[0]) == ("P", "~", " ")
        assert "105 ±4.8%~" in one
        assert one.count("*") == 1
        assert "110 ±4.5%~" in other
        assert "~" not in last
        assert "*" not in last
        assert _column(points, "pareto_optimal") == [True, None, False]
        assert _column(points[:1], "pareto_optimal") == [None], "no other point is better"

    @given(
        st.lists(
            st.tuples(*[st.tuples(st.integers(0, 5), st.integers(0, 3)).map(lambda e: (e[0], e[0] + e[1]))] * 2),
            min_size=2,
            max_size=7,
        )
    )
    def test_best_and_tied_match_their_definitions(self, figures: Any) -> None:
        """First: no other is better for any values within the intervals. Tied: for some values."""
        points = [_point(number, *edges) for number, edges in enumerate(figures)]

        def may_dominate(one: int, other: int, *, surely: bool) -> bool:
            (slow, fast), (cheap, dear) = figures[one]
            (others_slow, others_fast), (others_cheap, others_dear) = figures[other]
            if surely:
                return slow >= others_fast and dear <= others_cheap and (slow, dear) != (others_fast, others_cheap)
            return fast >= others_slow and cheap <= others_dear and (fast, cheap) != (others_slow, others_dear)

        def unbeaten(*, surely: bool) -> set[int]:
            places = range(len(points))
            return {p for p in places if not any(may_dominate(q, p, surely=surely) for q in places if q != p)}

        first = unbeaten(surely=False)
        assert pareto_optimal(points) == Ranking(first, unbeaten(surely=True) - first)
