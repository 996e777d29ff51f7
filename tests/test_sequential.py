"""Verdicts on cycles that run until a gate is decided."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pytest_llem import load_study
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.gates.decisions import Decision, Question, UndecidableError, decide, paired_contrast
from pytest_llem.gates.plan_lines import expected_cycles
from pytest_llem.gates.power_analysis import CyclesNeeded, cycles_needed
from pytest_llem.gates.regression import compare
from pytest_llem.gates.sequential import Schedule, is_precise, paired_looks, unpaired_looks
from pytest_llem.judging.until_decided import UntilDecided
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.statistics import STOPPED_CONFIDENCE, mean_interval
from pytest_llem.study.gates import GatesConfig
from tests.support.pairs import ALPHA
from tests.support.sequential import Run, until_decided
from tests.support.study_results import point, study_result

SCHEDULE = Schedule(4, 40)


def question(log_ratios: Any, schedule: Schedule = SCHEDULE, delta: float = 0.02) -> Question:
    looks = paired_looks(log_ratios, schedule)
    return Question(looks[-1].contrast, "lower", delta, looks)


def decision(log_ratios: Any, schedule: Schedule = SCHEDULE, delta: float = 0.02) -> Decision:
    [only] = decide([question(log_ratios, schedule, delta)], ALPHA)
    return only


def noise(seed: int, n: int, mean: float = 0.0, spread: float = 0.02) -> list[float]:
    return list(mean + spread * np.random.default_rng(seed).standard_normal(n))


class TestSchedule:
    def test_looks_grow_by_a_quarter(self) -> None:
        assert SCHEDULE.sizes == (4, 5, 6, 8, 10, 12, 15, 19, 24, 30, 38, 40)
        assert Schedule(2, 5).sizes == (2, 3, 4, 5)
        assert Schedule(3, 3).sizes == (3,)

    def test_shares_add_up_to_one(self) -> None:
        for schedule in (SCHEDULE, Schedule(2, 9), Schedule(5, 5)):
            assert schedule.share * len(schedule.sizes) == pytest.approx(1)


class TestDecide:
    def test_one_look_is_decided_as_a_fixed_number(self) -> None:
        for seed, mean in ((1, 0.0), (2, 0.08), (3, -0.08)):
            ratios = noise(seed, 10, mean)
            [fixed] = decide([Question(paired_contrast(ratios), "lower", 0.02)], ALPHA)
            assert decision(ratios, Schedule(10, 10)) == fixed

    def test_p_never_grows_with_more_cycles(self) -> None:
        ratios = noise(4, 40, 0.03)
        ps = [decision(ratios[:n]).p for n in range(4, 41)]
        assert ps == sorted(ps, reverse=True)
        assert ps[0] > ps[-1]

    def test_verdict_once_reached_stays(self) -> None:
        early = [0.08, 0.081, 0.079, 0.0805]
        later = [*early, *noise(5, 30, 0.0, 0.1)]
        assert decision(early).verdict == "REGRESSION"
        found = decision(later)
        assert (found.verdict, found.n) == ("REGRESSION", 4)
        assert found.interval == decision(early).interval

    @pytest.mark.parametrize("mean", [0.0, 0.02, 0.1, -0.1])
    def test_verdict_follows_from_the_interval(self, mean: float) -> None:
        for seed in range(20):
            found = decision(noise(seed, 19, mean))
            low, high = found.interval
            assert low <= found.ratio <= high
            inside = high <= 1.02 and low >= 1 / 1.02
            assert found.verdict == (
                "REGRESSION"
                if low > 1.02
                else "IMPROVEMENT"
                if high < 1 / 1.02
                else "SAME"
                if inside
                else "INCONCLUSIVE"
            )

    def test_interval_uses_the_share_of_its_look(self) -> None:
        ratios = noise(6, 6, 0.02)
        test = stats.ttest_1samp(ratios, 0.0).confidence_interval(1 - 2 * ALPHA / 12)
        found = decision(ratios)
        assert found.verdict == "INCONCLUSIVE"
        assert found.interval == pytest.approx((math.exp(test.low), math.exp(test.high)))
        assert found.confidence == pytest.approx(1 - 2 * ALPHA)

    def test_gates_stopped_at_different_numbers_are_one_family(self) -> None:
        ratios = noise(7, 10, 0.045)
        alone, *_ = decide([question(ratios)], ALPHA)
        among = decide([question(noise(8, 4)), question(ratios), question(noise(9, 40))], ALPHA)
        assert among[1].p == pytest.approx(3 * alone.p)
        assert [one.n for one in among if one.verdict == "INCONCLUSIVE"] == [
            len(given)
            for given, one in zip(([0] * 4, [0] * 10, [0] * 40), among, strict=True)
            if one.verdict == "INCONCLUSIVE"
        ]

    def test_answer_holds_when_pending_questions_are_asked(self) -> None:
        clear, open_ratios = [0.08, 0.081, 0.079, 0.0805], noise(8, 4)
        [pending] = decide([question(clear)], ALPHA, pending=2)
        [asked, *_] = decide([question(clear), question(open_ratios), question(open_ratios)], ALPHA)
        assert pending == asked
        assert pending.p == pytest.approx(3 * decision(clear).p)

    def test_values_without_spread_are_decided_at_the_first_look(self) -> None:
        assert decision([0.0] * 4).verdict == "SAME"
        assert decision([0.03] * 5).verdict == "REGRESSION"

    def test_looks_of_a_saved_reference_use_all_its_cycles(self) -> None:
        values = np.exp(noise(10, 6))
        looks = unpaired_looks(list(values), [1.0, 1.01, 0.99], SCHEDULE)
        assert [(look.contrast.n, look.contrast.n_reference) for look in looks] == [(4, 3), (5, 3), (6, 3)]

    def test_too_few_cycles_for_a_look_raise(self) -> None:
        with pytest.raises(UndecidableError, match=r"at least 4 cycles \(3 so far\)"):
            paired_looks([0.1] * 3, SCHEDULE)

    def test_cycles_to_decide_is_beyond_the_last_look(self) -> None:
        found = decision(noise(11, 4, 0.05, 0.03))
        assert found.verdict == "INCONCLUSIVE"
        assert found.cycles_to_decide is not None
        assert found.cycles_to_decide > 4
        single = dataclasses.replace(question(noise(11, 4, 0.05, 0.03)), looks=())
        [fixed] = decide([single], ALPHA)
        assert fixed.cycles_to_decide is not None
        assert fixed.cycles_to_decide < found.cycles_to_decide


@pytest.mark.parametrize(("ratio", "false"), [(1.0, ("worse", "better")), (1.02, ("worse", "same"))])
def test_false_alarms_stay_below_alpha_despite_looking(ratio: float, false: tuple[str, ...]) -> None:
    """A small version of ``tests/benchmarks/sequential.py``, with white noise and 2,000 families of 12 gates."""
    random = np.random.default_rng(20261129)
    ratios = math.log(ratio) + 0.02 * random.standard_normal((2000, 12, 40))
    run = until_decided(ratios, SCHEDULE, delta=0.02, alpha=ALPHA)
    assert isinstance(run, Run)
    for direction in false:
        found = getattr(run, direction)
        per_family = found.all(axis=-1) if direction == "same" else found.any(axis=-1)
        assert per_family.mean() <= ALPHA
        assert found.mean() <= ALPHA


class TestCyclesNeeded:
    @pytest.mark.parametrize("spread", [0.005, 0.01, 0.02])
    @pytest.mark.parametrize(("delta", "change"), [(0.01, 0.03), (0.02, 0.05), (0.02, 0.2), (0.02, 0.0)])
    @pytest.mark.parametrize("family", [1, 12])
    def test_rule_is_within_half_of_theory(self, spread: float, delta: float, change: float, family: int) -> None:
        found = cycles_needed(spread, delta=delta, change=change, alpha=ALPHA, schedule=SCHEDULE, family=family)
        assert found.fixed is not None
        assert found.sequential <= 1.5 * found.fixed

    def test_fixed_number_matches_noncentral_t(self) -> None:
        needed = cycles_needed(0.02, delta=0.02, change=0.05, alpha=ALPHA, schedule=SCHEDULE).fixed
        assert needed is not None
        distance = math.log(1.05 / 1.02) / 0.02
        powers = [
            stats.nct.sf(stats.t.isf(ALPHA, n - 1), n - 1, distance * math.sqrt(n)) for n in (needed - 1, needed)
        ]
        assert powers[0] < 0.9 <= powers[1]

    def test_change_of_delta_itself_is_never_decided(self) -> None:
        found = cycles_needed(0.02, delta=0.02, change=0.02, alpha=ALPHA, schedule=Schedule(4, 10))
        assert found.fixed is None
        assert found.sequential > 9.5
        assert isinstance(found, CyclesNeeded)

    def test_plan_expects_the_mean_of_pairs_of_two_noisy_cycles(self, tmp_path: Path) -> None:
        (tmp_path / "study.yaml").write_text(
            "model: m\nexecution: {n_cycles: auto, max_cycles: 40}\ngates: {metrics: [seconds]}\n"
        )
        lines = expected_cycles(load_study(tmp_path / "study.yaml"), None)
        (planned,) = re.findall(r"no change: (\d+) cycles if cycles vary by 2.0% \(typical", "\n".join(lines))
        candidate, reference = 0.02 * np.random.default_rng(13).standard_normal((2, 2000, 1, 40))
        run = until_decided(candidate - reference, SCHEDULE, delta=0.02, alpha=ALPHA, metrics=1)
        assert float(planned) == pytest.approx(run.cycles.mean(), rel=0.05)


class TestPrecision:
    def test_mean_of_stopped_cycles_is_covered_as_stated(self) -> None:
        random = np.random.default_rng(12)
        covered = []
        for _ in range(1500):
            values = list(1 + 0.028 * random.standard_normal(40))  # the spread with the lowest coverage
            n = next((n for n in range(3, 41) if is_precise(values[:n], 0.02)), 40)
            interval = mean_interval(values[:n], STOPPED_CONFIDENCE)[2]
            assert interval is not None
            covered.append(interval[0] <= 1 <= interval[1])
        assert np.mean(covered) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1500)

    def test_two_cycles_are_not_precise(self) -> None:
        assert not is_precise([1.0, 1.0], 0.1)

    def test_negative_mean_is_precise_as_its_mirror_image(self) -> None:
        assert is_precise([-1.0, -1.01, -0.99, -1.0], 0.05)
        assert not is_precise([-1.0, -1.01, -0.99, -1.0], 0.001)


@pytest.mark.parametrize("cycles", [[1, 2, 3], [1, 2, 3, 5]], ids=["too few", "too few in common"])
def test_gate_with_too_few_pairs_so_far_counts_in_the_family(cycles: list[int]) -> None:
    protocol = {"n_cycles": "auto", "min_cycles": 4, "max_cycles": 20}
    candidate, reference = (
        study_result(
            point({"a": 1}, seconds=[1.0 * factor, 1.01 * factor, 1.0 * factor, 1.01 * factor]),
            point({"a": 2}, seconds=[1.0] * len(of_other), cycles=of_other),
            measurement_protocol=protocol,
            name=name,
        )
        for name, factor, of_other in (("candidate", 2.0, cycles), ("reference", 1.0, [1, 2, 3, 4]))
    )
    found = compare(candidate, reference, GatesConfig(metrics=["seconds"]), name="reference", paired=True)
    assert [one.verdict for one in found.verdicts] == ["REGRESSION", "INCONCLUSIVE"]
    assert found.record.family == 2


def due_of(completed: dict[str, tuple[int, int]], looked: dict[str, int], order: str) -> dict[str, int]:
    """Return the points to look at. Of each, *completed* cycles ended, and failed ones, are given."""
    entries = [
        ManifestEntry(
            experiment_id=f"{name}-{cycle}",
            config_hash=name,
            config_summary=name,
            cycle=cycle,
            status="completed" if cycle <= done else "failed",
        )
        for name, (done, failed) in completed.items()
        for cycle in range(1, done + failed + 1)
    ]
    execution = SimpleNamespace(min_cycles=4, max_cycles=12, cycle_order=order)
    points = [SimpleNamespace(id=name, config_hash=name) for name in completed]
    run: Any = SimpleNamespace(study=SimpleNamespace(execution=execution, points=points), entries=entries)
    shared_state = SimpleNamespace(read=lambda *_: None)
    config: Any = SimpleNamespace(stash={SHARED_STATE: shared_state})
    plugin = UntilDecided(config, SimpleNamespace(runs={}))  # type: ignore[arg-type]
    plugin._looked = {("s.yaml", name): n for name, n in looked.items()}
    return plugin._due("s.yaml", run)


@pytest.mark.parametrize(
    ("completed", "looked", "order", "expected"),
    [
        ({"a": (4, 0), "b": (4, 0)}, {}, "interleaved", {"a": 4, "b": 4}),
        ({"a": (5, 0), "b": (4, 0)}, {"a": 4, "b": 4}, "interleaved", {}),
        ({"a": (9, 0), "b": (5, 0)}, {"a": 4, "b": 4}, "interleaved", {"a": 5, "b": 5}),  # a worker is ahead
        ({"a": (9, 0), "b": (7, 0)}, {"a": 5, "b": 5}, "interleaved", {"a": 6, "b": 6}),  # 6 was passed over
        ({"a": (5, 0), "b": (4, 1)}, {}, "interleaved", {"a": 5, "b": 4}),  # a failed cycle counts as ended
        ({"a": (3, 0), "b": (0, 0)}, {}, "interleaved", {}),
        ({"a": (4, 0), "b": (0, 0)}, {}, "sequential", {"a": 4}),
    ],
)
def test_points_are_looked_at_once_all_have_ended_so_many_cycles(
    completed: dict[str, tuple[int, int]], looked: dict[str, int], order: str, expected: dict[str, int]
) -> None:
    assert due_of(completed, looked, order) == expected
