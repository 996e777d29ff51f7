"""Verdicts on changes, compared with scipy, hand calculation, and the stated rates of false alarms and power."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pytest_llem import load_study
from pytest_llem.gates.decisions import Contrast, Decision, Question, UndecidableError, contrast, decide
from pytest_llem.gates.plan_lines import minimum_detectable_effects
from pytest_llem.gates.power_analysis import _distance, detectable
from pytest_llem.gates.ttests import holm, judge, paired_estimate, unpaired_estimate, welch
from pytest_llem.study.design import StudyConfig
from tests.support.pairs import ALPHA, FAMILY, METRICS, POINTS, Noise, Simulation, found, regressions
from tests.support.study_results import point, study_result, summary

PROPERTY = settings(deadline=None)  # other processes may slow down the machine

CANDIDATE = [0.4512, 0.4609, 0.4533, 0.4571, 0.4498]
REFERENCE = [0.4401, 0.4388, 0.4432, 0.4415, 0.4379]


Better = Literal["lower", "higher"]


def cycles(values: Any) -> Any:
    return dict(enumerate(values, start=1))


def study_of(folder: Path, text: str) -> StudyConfig:
    (folder / "study.yaml").write_text(f"model: m\n{text}")
    return load_study(folder / "study.yaml")


def compared(candidate: Any, reference: Any, *, paired: bool = False) -> Any:
    return contrast(cycles(candidate), cycles(reference), paired=paired)


def decision(
    candidate: Any,
    reference: Any,
    *,
    better: Better = "lower",
    delta: float = 0.02,
    alpha: Any = ALPHA,
    paired: bool = False,
) -> Decision:
    [only] = decide([Question(compared(candidate, reference, paired=paired), better, delta)], alpha)
    return only


def question_of(
    log_ratio: Any,
    *,
    error: float = 0.01,
    better: Better = "lower",
    delta: float = 0.0,
    degrees: float = 8.0,
    n: int = 5,
) -> Question:
    """Return a question with the given contrast."""
    variance = error**2 * n / 2
    return Question(Contrast(log_ratio, error, degrees, n, n, False, variance, variance), better, delta)


class TestContrast:
    def test_unpaired_is_welch_on_logarithms(self) -> None:
        found = compared(CANDIDATE, REFERENCE)
        test = stats.ttest_ind(np.log(CANDIDATE), np.log(REFERENCE), equal_var=False)
        assert found.log_ratio / found.standard_error == pytest.approx(test.statistic, rel=1e-9)
        assert found.degrees == pytest.approx(test.df, rel=1e-9)
        assert math.exp(found.log_ratio) == pytest.approx(stats.gmean(CANDIDATE) / stats.gmean(REFERENCE))
        assert (found.n, found.n_reference, found.paired) == (5, 5, False)
        assert found.variance == pytest.approx(np.var(np.log(CANDIDATE), ddof=1))
        assert found.variance_reference == pytest.approx(np.var(np.log(REFERENCE), ddof=1))

    def test_paired_is_a_test_of_the_differences(self) -> None:
        found = compared(CANDIDATE, REFERENCE, paired=True)
        test = stats.ttest_rel(np.log(CANDIDATE), np.log(REFERENCE))
        assert found.log_ratio / found.standard_error == pytest.approx(test.statistic, rel=1e-9)
        assert (found.degrees, found.n, found.n_reference, found.paired) == (4, 5, 5, True)

    def test_pairs_are_matched_by_their_cycle(self) -> None:
        candidate, reference = {4: 2.0, 1: 1.0, 2: 3.0, 9: 7.0}, {2: 1.5, 3: 9.0, 1: 1.0, 4: 1.0}
        assert contrast(candidate, reference, paired=True) == compared(
            [1.0, 3.0, 2.0], [1.0, 1.5, 1.0], paired=True
        )

    @pytest.mark.parametrize(("n", "n_reference"), [(2, 5), (3, 5), (5, 2)])
    def test_unequal_numbers_are_never_more_certain_than_by_welch(self, n: int, n_reference: int) -> None:
        candidate, reference = CANDIDATE[:n], REFERENCE[:n_reference]
        found = compared(candidate, reference)
        test = stats.ttest_ind(np.log(candidate), np.log(reference), equal_var=False)
        pooled = stats.ttest_ind(np.log(candidate), np.log(reference))
        size = min(abs(test.statistic), abs(pooled.statistic))
        assert abs(found.log_ratio / found.standard_error) == pytest.approx(size, rel=1e-9)
        assert found.degrees == pytest.approx(min(test.df, 2 * (min(n, n_reference) - 1)), rel=1e-9)

    @pytest.mark.parametrize(
        ("candidate", "reference", "paired", "message"),
        [
            (
                {1: 1.0},
                {1: 1.0, 2: 1.0, 3: 1.0},
                False,
                "2 cycles on either side (1 in the candidate, 3 in the reference)",
            ),
            ({1: 1.0, 2: 2.0}, {}, False, "2 cycles on either side (2 in the candidate, 0 in the reference)"),
            ({1: 1.0, 2: 1.0}, {2: 1.0, 3: 1.0}, True, "2 cycles that both sides have (1 in common)"),
            ({1: 1.0, 2: 0.0}, {1: 1.0, 2: 1.0}, False, "cycle 2 is 0, and ratios need values above 0"),
            ({1: 1.0, 2: 1.0}, {1: -2.5, 2: 1.0}, True, "cycle 1 of the reference is -2.5, and"),
            ({1: 1.0, 2: math.inf}, {1: 1.0, 2: 1.0}, False, "cycle 2 is inf, and"),
            ({1: 1.0, 2: math.nan}, {1: 1.0, 2: 1.0}, False, "cycle 2 is nan, and"),
        ],
    )
    def test_undecidable_contrast_raises_with_the_reason(
        self, candidate: dict[int, float], reference: dict[int, float], paired: bool, message: str
    ) -> None:
        with pytest.raises(UndecidableError) as raised:
            contrast(candidate, reference, paired=paired)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_cycle_without_a_partner_is_ignored(self) -> None:
        assert contrast({1: 1.0, 2: 2.0, 3: 0.0}, {1: 1.0, 2: 2.0}, paired=True).n == 2


class TestDecide:
    def test_bound_matches_scipy(self) -> None:
        for paired, test in (
            (False, stats.ttest_ind(np.log(CANDIDATE), np.log(REFERENCE), equal_var=False)),
            (True, stats.ttest_rel(np.log(CANDIDATE), np.log(REFERENCE))),
        ):
            found = decision(CANDIDATE, REFERENCE, delta=0.0, paired=paired)
            assert found.p == pytest.approx(test.pvalue / 2, rel=1e-9)
            interval = test.confidence_interval(0.98)
            assert found.interval == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-9)
            assert found.confidence == pytest.approx(0.98)
            assert found.ratio == pytest.approx(stats.gmean(CANDIDATE) / stats.gmean(REFERENCE))

    @pytest.mark.parametrize("delta", [0.0, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06, 0.08])
    @pytest.mark.parametrize("paired", [False, True])
    def test_verdict_follows_from_the_interval(self, delta: float, paired: bool) -> None:
        found = decision(CANDIDATE, REFERENCE, delta=delta, paired=paired)
        low, high = found.interval
        inside = high <= 1 + delta and low >= 1 / (1 + delta)
        assert found.verdict == ("REGRESSION" if low > 1 + delta else "SAME" if inside else "INCONCLUSIVE")
        assert (found.p <= ALPHA) == (found.verdict == "REGRESSION")
        assert (found.cycles_to_decide is not None) == (found.verdict == "INCONCLUSIVE")

    def test_all_four_verdicts(self) -> None:
        wide = [0.40, 0.50, 0.45, 0.47, 0.43]
        assert decision(CANDIDATE, REFERENCE, delta=0.01).verdict == "REGRESSION"
        assert decision(CANDIDATE, REFERENCE, delta=0.01, better="higher").verdict == "IMPROVEMENT"
        assert decision(CANDIDATE, REFERENCE, delta=0.08).verdict == "SAME"
        assert decision(wide, REFERENCE, delta=0.02).verdict == "INCONCLUSIVE"

    def test_no_questions_have_no_answers(self) -> None:
        assert decide([], ALPHA) == []

    @pytest.mark.parametrize("paired", [False, True])
    def test_two_equal_cycles_are_enough(self, paired: bool) -> None:
        assert decision([2.0, 2.0001], [1.0, 1.0001], paired=paired).verdict == "REGRESSION"
        assert decision([1.0, 1.03], [1.0, 1.0001], paired=paired).verdict == "INCONCLUSIVE"

    def test_interval_bound_is_never_infinite(self) -> None:
        found = decision([1e-3, 1e3], [1e-3, 1e3], alpha=1e-9)
        assert all(map(math.isfinite, found.interval))
        assert found.verdict == "INCONCLUSIVE"


class TestWithoutSpread:
    """Values without spread: memory, for example, may be equal to the byte in all cycles."""

    @pytest.mark.parametrize("paired", [False, True])
    @pytest.mark.parametrize(
        ("ratio", "delta", "verdict"),
        [
            (1.0, 0.0, "SAME"),
            (1.0, 0.02, "SAME"),
            (1.02, 0.02, "SAME"),
            (1 / 1.02, 0.02, "SAME"),
            (1.0200001, 0.02, "REGRESSION"),
            (1.5, 0.02, "REGRESSION"),
            (0.5, 0.02, "IMPROVEMENT"),
            (1.0000001, 0.0, "REGRESSION"),
        ],
    )
    def test_values_without_spread_are_decided(
        self, ratio: float, delta: float, verdict: str, paired: bool
    ) -> None:
        for value, n in itertools.product((1.1, 0.1, 80_000_000_001.0, 3e-200), (2, 3, 7, 49)):
            found = decision([value * ratio] * n, [value] * n, delta=delta, paired=paired)
            assert found.verdict == verdict, (value, n)
            assert found.interval == pytest.approx((ratio, ratio), rel=1e-9)
            assert found.p == (1.0 if verdict == "SAME" else 0.0)
            assert found.cycles_to_decide is None

    def test_one_side_without_spread_is_decided(self) -> None:
        found = compared([1.0, 1.0, 1.0], [1.0, 1.1, 1.2])
        test = stats.ttest_ind([0, 0, 0], np.log([1.0, 1.1, 1.2]), equal_var=False)
        assert found.degrees == pytest.approx(2)
        assert found.log_ratio / found.standard_error == pytest.approx(test.statistic)

    def test_equal_differences_of_pairs_are_decided(self) -> None:
        candidate = [1.1 * value for value in CANDIDATE]
        assert decision(candidate, CANDIDATE, delta=0.1, paired=True).verdict == "SAME"
        assert decision(candidate, CANDIDATE, delta=0.09, paired=True).verdict == "REGRESSION"

    @PROPERTY
    @given(st.floats(1e-300, 1e300), st.integers(2, 40), st.integers(2, 40))
    def test_rounding_is_not_a_change(self, value: Any, n: Any, n_reference: Any) -> None:
        assert decision([value] * n, [value] * n_reference, delta=0.0).verdict == "SAME"


class TestHolm:
    def test_holm_matches_hand_calculation(self) -> None:
        assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm(np.array([0.9, 0.5])) == pytest.approx([1.0, 1.0])
        assert holm(np.array([0.02])) == pytest.approx([0.02])

    def test_holm_adjusts_each_family_separately(self) -> None:
        both = holm(np.array([[0.01, 0.04], [0.004, 0.002]]))
        assert both == pytest.approx(np.array([[0.02, 0.04], [0.004, 0.004]]))

    def test_holm_decides_between_gates(self) -> None:
        def question(p: Any) -> Any:
            return question_of(-0.01 * stats.t.ppf(p, 8))

        ps = [0.002, 0.004, 0.009, 0.3]
        alone = [decide([question(p)], ALPHA)[0] for p in ps]
        assert [one.verdict for one in alone] == ["REGRESSION"] * 3 + ["INCONCLUSIVE"]
        assert [one.p for one in alone] == pytest.approx(ps)
        together = decide([question(p) for p in reversed(ps)], ALPHA)[::-1]
        assert [one.p for one in together] == pytest.approx([0.008, 0.012, 0.018, 0.3])
        assert [one.verdict for one in together] == ["REGRESSION", "INCONCLUSIVE", "INCONCLUSIVE", "INCONCLUSIVE"]
        assert [one.confidence for one in together] == pytest.approx([1 - 2 * ALPHA / n for n in (4, 3, 3, 3)])

    def test_each_direction_is_a_family(self) -> None:
        worse, better = question_of(0.031), question_of(-0.031)
        [alone] = decide([worse], ALPHA)
        assert alone.p == pytest.approx(stats.t.sf(3.1, 8))
        first, second = decide([worse, better], ALPHA)
        assert [first.p, second.p] == pytest.approx([2 * alone.p] * 2)

    @PROPERTY
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_adjusted_p_keeps_the_order_and_is_never_smaller(self, ps: Any) -> None:
        given = np.array(ps)
        adjusted = holm(given)
        assert (adjusted >= given).all()
        assert (adjusted <= 1).all()
        assert (adjusted[np.argsort(given)] == np.sort(adjusted)).all()


class TestCyclesToDecide:
    @pytest.mark.parametrize("paired", [False, True])
    @pytest.mark.parametrize("delta", [0.0, 0.02, 0.06])
    def test_cycles_to_decide_is_the_smallest_number_that_decides(self, paired: bool, delta: float) -> None:
        candidate, reference = [0.46, 0.44, 0.47], [0.44, 0.45, 0.435]
        question = Question(compared(candidate, reference, paired=paired), "lower", delta)
        [found] = decide([question], ALPHA)
        assert found.verdict == "INCONCLUSIVE"
        needed = found.cycles_to_decide
        assert needed is not None
        assert needed > 3

        def at(n: Any) -> Any:
            had = question.contrast
            error, degrees = math.sqrt(had.variance / n), n - 1.0
            if not paired:
                error, degrees = map(float, welch(had.variance, n, had.variance_reference, n))
            then = dataclasses.replace(had, standard_error=error, degrees=degrees, n=n, n_reference=n)
            return decide([dataclasses.replace(question, contrast=then)], ALPHA)[0].verdict

        assert at(needed - 1) == "INCONCLUSIVE"
        assert at(needed) != "INCONCLUSIVE"

    def test_cycles_to_decide_keeps_the_larger_side(self) -> None:
        values = itertools.cycle([0.43, 0.45, 0.44, 0.446, 0.435])
        reference = [next(values) for _ in range(20)]
        found = [decision([0.48, 0.52, 0.50], reference[:n]) for n in (3, 20)]
        assert [one.verdict for one in found] == ["INCONCLUSIVE"] * 2
        few, many = (one.cycles_to_decide for one in found)
        assert few is not None
        assert many is not None
        assert 3 < many <= few

    def test_cycles_to_decide_is_null_at_delta_itself(self) -> None:
        # The change is delta itself: it is neither beyond it nor safely inside.
        assert decide([question_of(math.log(1.02), delta=0.02)], ALPHA)[0].cycles_to_decide is None

    def test_holm_needs_more_cycles_to_decide(self) -> None:
        alone = decide([question_of(0.02)], ALPHA)[0].cycles_to_decide
        among = decide([question_of(0.02), *[question_of(0.001)] * 11], ALPHA)[0].cycles_to_decide
        reported = decide([question_of(0.02), *[question_of(1.0)] * 11], ALPHA)[0].cycles_to_decide
        assert among is not None
        assert alone is not None
        assert among > alone == reported


VALUES = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=8)
SIDES = st.tuples(VALUES, VALUES)
MIRRORED = {"REGRESSION": "IMPROVEMENT", "IMPROVEMENT": "REGRESSION"}


class TestProperties:
    @PROPERTY
    @given(SIDES, st.booleans())
    def test_swapped_sides_invert_the_verdict(self, sides: Any, paired: Any) -> None:
        forward, back = decision(*sides, paired=paired), decision(*reversed(sides), paired=paired)
        assert back.ratio == pytest.approx(1 / forward.ratio)
        assert back.interval == pytest.approx((1 / forward.interval[1], 1 / forward.interval[0]))
        assert back.verdict == MIRRORED.get(forward.verdict, forward.verdict)
        assert back.cycles_to_decide == forward.cycles_to_decide

    @PROPERTY
    @given(SIDES, st.booleans())
    def test_better_direction_mirrors_the_verdict(self, sides: Any, paired: Any) -> None:
        lower, higher = (decision(*sides, better=better, paired=paired) for better in ("lower", "higher"))
        assert higher.verdict == MIRRORED.get(lower.verdict, lower.verdict)
        assert (higher.ratio, higher.interval) == (lower.ratio, lower.interval)
        assert higher.cycles_to_decide == lower.cycles_to_decide

    @PROPERTY
    @given(SIDES, st.floats(1e-9, 1e9), st.booleans())
    def test_units_do_not_affect_the_verdict(self, sides: Any, scale: Any, paired: Any) -> None:
        plain = decision(*sides, paired=paired)
        assume(abs(plain.p - ALPHA) > 1e-9)
        scaled = decision(*([scale * value for value in side] for side in sides), paired=paired)
        assert scaled.interval == pytest.approx(plain.interval)
        assert scaled.p == pytest.approx(plain.p, abs=1e-9)
        assert scaled.verdict == plain.verdict

    @PROPERTY
    @given(SIDES, st.booleans(), st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted))
    def test_a_larger_delta_is_never_stricter(self, sides: Any, paired: Any, deltas: Any) -> None:
        strict, lax = (decision(*sides, delta=delta, paired=paired) for delta in deltas)
        assert strict.p <= lax.p + 1e-12
        if lax.verdict in MIRRORED:
            assert strict.verdict == lax.verdict
        if strict.verdict == "SAME":
            assert lax.verdict == "SAME"

    @PROPERTY
    @given(SIDES, st.floats(0, 0.9), st.floats(1e-6, 0.4), st.booleans())
    def test_interval_ratio_and_p_are_consistent(self, sides: Any, delta: Any, alpha: Any, paired: Any) -> None:
        found = decision(*sides, delta=delta, alpha=alpha, paired=paired)
        assert 0 < found.interval[0] <= found.ratio * (1 + 1e-12)
        assert found.ratio <= found.interval[1] * (1 + 1e-12) < math.inf
        assert 0 <= found.p <= 1
        assert found.verdict not in MIRRORED or found.p <= alpha


#: Changes that a gate detects with a power of 90 % at a delta of 2 %: CV of the cycles, cycles per side, gates in
#: the family, change.
PROMISED = [
    *((0.005, 5, 1, 0.035), (0.005, 5, 50, 0.050), (0.005, 10, 1, 0.029)),
    *((0.02, 5, 1, 0.081), (0.02, 5, 50, 0.145), (0.02, 10, 1, 0.056)),
]


class TestDetectable:
    @pytest.mark.parametrize(("cv", "n", "family", "change"), PROMISED)
    def test_detectable_change_matches_table(self, cv: float, n: int, family: int, change: float) -> None:
        found = detectable(cv, n, n, delta=0.02, alpha=ALPHA, family=family)
        assert found == pytest.approx(change, abs=0.0006)

    @pytest.mark.parametrize("n", [3, 5, 20])
    def test_detectable_change_of_pairs_matches_noncentral_t(self, n: int) -> None:
        change = detectable(0.01, n, n, delta=0.02, alpha=0.01, paired=True)
        assert change is not None
        far = math.log1p(change) - math.log1p(0.02)
        noncentrality = far / (math.sqrt(2 * math.log1p(0.01**2)) / math.sqrt(n))
        assert stats.nct.sf(stats.t.isf(0.01, n - 1), n - 1, noncentrality) == pytest.approx(0.9, abs=1e-3)

    def test_many_cycles_match_the_normal_approximation(self) -> None:
        quantiles = stats.norm.isf(0.01) + stats.norm.ppf(0.8)
        assert _distance(400, 400, 0.01, 0.8, False) == pytest.approx(quantiles * math.sqrt(2 / 400), rel=0.01)

    def test_detectable_change_grows_with_noise_and_family(self) -> None:
        def change_of(
            cv: float = 0.01, n: int = 5, reference: int = 5, delta: float = 0.02, alpha: float = 0.01, **more: Any
        ) -> Any:
            return detectable(cv, n, reference, delta=delta, alpha=alpha, **more)

        plain = change_of()
        assert all(
            other > plain
            for other in (change_of(cv=0.02), change_of(delta=0.03), change_of(alpha=0.001), change_of(family=12))
        )
        assert all(
            other < plain for other in (change_of(n=6, reference=6), change_of(reference=50), change_of(power=0.5))
        )
        assert change_of(n=5, reference=3) == change_of(n=3, reference=5) > plain
        assert change_of(n=5, reference=9, paired=True) == change_of(paired=True)

    def test_detectable_change_without_noise_is_delta(self) -> None:
        assert detectable(0.0, 3, 3, delta=0.02, alpha=0.01) == pytest.approx(0.02)

    def test_plan_says_that_no_change_is_detected(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, "execution: {n_cycles: 2}\ngates: {alpha: 1.0e-6}\n")
        assert minimum_detectable_effects(study, None)[1:] == [
            "  no change if cycles vary by 0.5% (typical, not measured)",
            "  no change if cycles vary by 2.0% (typical, not measured)",
        ]

    def test_plan_names_each_metric_also_without_a_spread(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, "execution: {n_cycles: 3}\ngates: {metrics: [seconds, ttft_p50_ms]}\n")
        seconds = summary("seconds", [1.0, 1.02, 0.98]).model_copy(update={"cv": 0.02})
        reference = study_result(point({}, seconds=seconds, ttft_p50_ms=[]))
        measured, unknown = minimum_detectable_effects(study, reference)[1:]
        assert re.fullmatch(r"  [\d.]+% of seconds if cycles vary by 2.0%", measured)
        assert unknown == "  unknown of ttft_p50_ms: the reference has no spread of it"

    @pytest.mark.parametrize("n", [0, 1])
    def test_plan_has_the_number_of_too_few_cycles(self, tmp_path: Path, n: int) -> None:
        study = study_of(tmp_path, "execution: {n_cycles: 3}\n")
        (line,) = minimum_detectable_effects(study, study_result(point({}, seconds=[1.0] * n)))
        assert f"that needs 2 cycles, and the reference has {n} (" in line

    @pytest.mark.parametrize(("n", "n_reference"), [(0, 5), (1, 5), (5, 1)])
    def test_no_change_is_detectable_below_two_cycles(self, n: int, n_reference: int) -> None:
        assert detectable(0.01, n, n_reference, delta=0.02, alpha=0.01) is None

    def test_no_change_is_detectable_in_extreme_noise(self) -> None:
        assert detectable(0.05, 2, 2, delta=0.02, alpha=0.01, family=50) is None
        assert detectable(1e200, 5, 5, delta=0.02, alpha=0.01) is None


class TestSimulation:
    """A small version of ``tests/benchmarks/gates.py``."""

    @pytest.fixture
    def simulation(self) -> Simulation:
        return Simulation(2000)

    @pytest.mark.parametrize("paired", [False, True])
    def test_simulation_judges_as_decide_does(self, paired: bool) -> None:
        few = Simulation(60)
        candidate, reference = few.side(Noise(0.02), 3), few.side(Noise(0.02), 3)
        candidate[::3] += 0.4
        estimate = paired_estimate(candidate - reference) if paired else unpaired_estimate(candidate, reference)
        judged = judge(*estimate, np.full(FAMILY, np.log(1.02)), ALPHA)
        verdicts = set()
        for family in range(few.families):
            contrasts = [
                compared(*np.exp([candidate[family, at], reference[family, at]]), paired=paired)
                for at in range(FAMILY)
            ]
            decisions = decide([Question(one, "lower", 0.02) for one in contrasts], ALPHA)
            verdicts |= {one.verdict for one in decisions}
            worse = [one.verdict == "REGRESSION" for one in decisions]
            assert worse == judged.worse[family].tolist()
            assert [one.verdict == "SAME" for one in decisions] == (judged.same & ~judged.worse)[family].tolist()
            shown = [one.p if one.ratio >= 1 else 1.0 for one in decisions]
            assert shown == pytest.approx(np.where(estimate.log_ratio >= 0, judged.p_worse, 1.0)[family])
        assert {"REGRESSION", "INCONCLUSIVE"} <= verdicts
        assert FAMILY == METRICS * POINTS

    @pytest.mark.parametrize("cv", [0.005, 0.05])
    @pytest.mark.parametrize("n", [3, 5])
    @pytest.mark.parametrize("delta", [0.0, 0.02])
    def test_false_alarm_rate_is_at_most_alpha(
        self, simulation: Simulation, cv: float, n: int, delta: float
    ) -> None:
        for estimate in (simulation.unpaired(Noise(cv), n), simulation.paired(Noise(cv), n)):
            assert regressions(estimate, delta).beyond(ALPHA) == []

    @pytest.mark.parametrize(("n", "n_reference"), [(2, 2), (2, 10), (3, 5), (3, 20), (10, 3)])
    def test_false_alarm_rate_with_unequal_numbers_of_cycles(
        self, simulation: Simulation, n: int, n_reference: int
    ) -> None:
        assert regressions(simulation.unpaired(Noise(0.02), n, n_reference), 0.0).beyond(ALPHA) == []

    def test_false_alarm_rate_of_unchanged_gates_among_changed(self, simulation: Simulation) -> None:
        estimate = simulation.unpaired(Noise(0.01), 5)
        changed = np.arange(FAMILY) < FAMILY // 2
        shifted = estimate._replace(log_ratio=estimate.log_ratio + np.where(changed, 0.2, 0.0))
        judged = judge(*shifted, 0.0, ALPHA).worse
        assert judged[:, changed].mean() > 0.99
        false = judged[:, ~changed].any(axis=-1).mean()
        assert false <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / simulation.families)

    def test_same_is_rare_for_a_changed_metric(self, simulation: Simulation) -> None:
        for n in (2, 3, 5):
            for estimate in (simulation.unpaired(Noise(0.003), n), simulation.paired(Noise(0.003), n)):
                judged = judge(estimate.log_ratio + np.log(1.02), *estimate[1:], np.log(1.02), ALPHA)
                assert judged.same.mean() <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / judged.same.size)

    def test_session_effect_is_removed_by_pairing_or_covered_by_delta(self) -> None:
        simulation, noise = Simulation(1000), Noise(0.005, session=0.01)
        estimate = simulation.unpaired(noise, 5)
        assert regressions(estimate, 0.02).beyond(ALPHA) != []
        assert regressions(estimate, simulation.deltas(noise, 5, sessions=5)).beyond(ALPHA) == []
        assert regressions(simulation.paired(noise, 5), 0.0).beyond(ALPHA) == []

    @pytest.mark.parametrize(("cv", "n", "family", "change"), PROMISED)
    def test_promised_changes_are_found(self, cv: float, n: int, family: int, change: float) -> None:
        estimate = Simulation(2000).unpaired(Noise(cv), n)
        assert found(estimate, change, 0.02, ALPHA / family) == pytest.approx(0.9, abs=0.03)

    @pytest.mark.parametrize("cv", [0.005, 0.02])
    @pytest.mark.parametrize(("n", "n_reference"), [(3, 3), (5, 5), (3, 10)])
    @pytest.mark.parametrize("family", [1, FAMILY])
    def test_detectable_change_is_found_with_90_percent_power(
        self, simulation: Simulation, cv: float, n: int, n_reference: int, family: int
    ) -> None:
        noise = Noise(cv)
        draws = {False: simulation.unpaired(noise, n, n_reference), True: simulation.paired(noise, n)}
        for paired, estimate in draws.items():
            change = detectable(cv, n, n_reference, delta=0.02, alpha=ALPHA, family=family, paired=paired)
            assert change is not None
            assert found(estimate, change, 0.02, ALPHA / family) == pytest.approx(0.9, abs=0.03)
