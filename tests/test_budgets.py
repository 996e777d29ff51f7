"""Judgement of budgets, and the text of verdicts."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.merged import judge_budgets
from pytest_llem.gates.verdict_text import rounded, verdict_line, verdict_text
from pytest_llem.results.carbon import Carbon
from pytest_llem.results.cycles import _NO_METRICS, summarise
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary, mean_interval
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import Budget
from tests.conftest import NOOP_STUDY
from tests.support.study_results import study_result

COST = "energy_per_output_token_j"
SPEED = "output_tokens_per_second"

ESTIMATED = "energy is estimated, not measured: set energy.allow_estimated: true to let it decide"
NOISE = "within noise: the 95 % interval straddles the limit"


def budget(metric: str = COST, maximum: float | None = None, minimum: float | None = None) -> Budget:
    return Budget(f"{metric}-n=1", metric, "n=1", maximum, minimum, 7)


def point(metric: str, *values: float | None, allow: bool = False, **provenance: Any) -> PointResult:
    """Return a point with one metric and a completed cycle for each of *values*."""
    known = [value for value in values if value is not None]
    mean, _, interval = mean_interval(known) if known else (None, None, None)
    if CATALOGUE[metric].unit == "J" and known:
        provenance = {"method": "measured", "boundary": "gpu_board", "covers_engine": True, **provenance}
    summary = Summary(
        mean=mean, ci95=interval, n=len(known), unit=CATALOGUE[metric].unit, values=[*values], **provenance
    )
    config = {"energy": {"backend": "auto", "allow_estimated": allow}}
    cycles = list(range(1, len(values) + 1))
    return PointResult(id="n=1", axes={}, config=config, config_hash="0", cycles=cycles, metrics={metric: summary})


def judge(limit: Budget, found: PointResult | None) -> GateVerdict:
    return judge_budget(limit, found, file="studies/x.yaml")


class TestJudging:
    @pytest.mark.parametrize(
        ("maximum", "minimum", "verdict"),
        [
            (2.01, None, "WITHIN"),
            (2.0, None, "WITHIN"),  # at the limit is not beyond it
            (1.99, None, "BEYOND"),
            (None, 1.99, "WITHIN"),
            (None, 2.0, "WITHIN"),
            (None, 2.01, "BEYOND"),
            (2.5, 1.5, "WITHIN"),
            (2.0, 2.0, "WITHIN"),
            (1.9, 1.5, "BEYOND"),
            (2.5, 2.1, "BEYOND"),
        ],
    )
    def test_budget_fails_only_if_mean_is_beyond(
        self, maximum: float | None, minimum: float | None, verdict: str
    ) -> None:
        found = judge(budget(maximum=maximum, minimum=minimum), point(COST, 1.0, 2.0, 3.0))
        assert (found.verdict, found.outcome) == (verdict, "failed" if verdict == "BEYOND" else "passed")
        assert (found.maximum, found.minimum) == (maximum, minimum)

    def test_budget_verdict_has_all_fields(self) -> None:
        found = judge(budget(maximum=0.45), point(COST, 0.5, 0.51, 0.52))
        assert found.ci95 is not None
        low, high = found.ci95
        assert [low, high] == pytest.approx([0.51 - 0.0248414, 0.51 + 0.0248414])
        assert found.model_dump(exclude_defaults=True) == {
            "gate": "budget",
            "id": f"{COST}-n=1",
            "metric": COST,
            "point": "n=1",
            "verdict": "BEYOND",
            "outcome": "failed",
            "unit": "J",
            "method": "measured",
            "mean": pytest.approx(0.51),
            "ci95": (low, high),
            "n": 3,
            "maximum": 0.45,
            "file": "studies/x.yaml",
            "line": 7,
        }

    def test_budget_of_a_signed_metric(self) -> None:
        found = point("active_energy_j", -3.0, -1.0)
        assert judge(budget("active_energy_j", maximum=-1), found).verdict == "WITHIN"
        assert judge(budget("active_energy_j", maximum=-2.5), found).verdict == "BEYOND"
        assert judge(budget("active_energy_j", minimum=-1), found).verdict == "BEYOND"

    @pytest.mark.parametrize(
        ("maximum", "verdict", "noisy"),
        [(10.0, "WITHIN", False), (2.5, "WITHIN", True), (1.5, "BEYOND", True), (-1.0, "BEYOND", False)],
    )
    def test_within_noise_if_interval_straddles_the_limit(self, maximum: float, verdict: str, noisy: bool) -> None:
        """The interval of 1, 2, 3 is 2 ± 2.48."""
        found = judge(budget("active_energy_j", maximum=maximum), point("active_energy_j", 1.0, 2.0, 3.0))
        assert (found.verdict, found.within_noise) == (verdict, noisy)
        assert found.reason == (NOISE if noisy else None)

    def test_one_cycle_is_judged_without_an_interval(self) -> None:
        found = judge(budget(maximum=1), point(COST, 1.0001))
        assert (found.verdict, found.ci95, found.n, found.within_noise) == ("BEYOND", None, 1, False)

    def test_cycles_without_a_value_are_counted_in_the_reason(self) -> None:
        found = judge(budget(maximum=10), point(COST, 1.0, None, 2.0, 30.0))
        assert (found.verdict, found.mean, found.n) == ("BEYOND", 11.0, 3)
        assert found.reason == f"{NOISE}; 3 of 4 cycles have a value"


class TestNotJudged:
    @pytest.mark.parametrize(
        ("found", "reason"),
        [
            (None, "no completed cycle"),
            (point(COST, None, reason="GPU is lost"), "GPU is lost"),
            (point(COST, None), "it has no value"),
            (point(SPEED, 1.0), "the result does not have this metric"),
            (point(COST, 1.0, method="estimated"), ESTIMATED),
            (point(COST, 1.0, 1.0, boundary=None), "its cycles differ in what their energy covers"),
        ],
    )
    def test_budget_not_judged_fails_with_the_reason(self, found: PointResult | None, reason: str) -> None:
        verdict = judge(budget(maximum=100), found)
        assert (verdict.verdict, verdict.outcome, verdict.reason) == ("NOT JUDGED", "failed", reason)
        assert verdict_text(verdict) == f"cannot be judged: {reason}"

    def test_energy_window_of_few_ticks_is_not_judged(self) -> None:
        found = point(COST, 1.0, 2.0)
        found.testbed["energy_ticks"] = 20.0
        assert judge(budget(maximum=10), found).verdict == "WITHIN"
        found.testbed["energy_ticks"] = 12.5
        assert judge(budget(maximum=10), found).reason == (
            "a window holds 12.5 ticks of the energy counter, and a gate needs 20: "
            "raise measurement.min_window_seconds"
        )

    @pytest.mark.parametrize("metrics", [{}, _NO_METRICS])
    def test_point_without_results_is_not_judged(self, metrics: dict[str, Any]) -> None:
        nothing = PointResult(id="n=1", axes={}, config={}, config_hash="0", metrics=metrics)
        assert judge(budget(maximum=1), nothing).reason == "no completed cycle"

    def test_estimate_is_judged_if_allowed(self) -> None:
        found = judge(budget(maximum=0.4), point(COST, 0.5, 0.5, 0.5, method="estimated", allow=True))
        assert (found.verdict, found.method) == ("BEYOND", "estimated")
        assert verdict_text(found) == "0.500 J is beyond 0.4 J (estimated, 0.500–0.500, n = 3)"

    def test_estimated_energy_does_not_affect_time(self) -> None:
        assert judge(budget(SPEED, minimum=1), point(SPEED, 2.0)).verdict == "WITHIN"

    @pytest.mark.usefixtures("noop_engine")
    def test_metrics_derived_from_an_estimate_are_estimates(self) -> None:
        """Metrics derived from energy keep its method, so that no budget on an estimate is judged unasked."""
        fields = {key: one for key, one in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
        config = ExperimentConfig.model_validate({**fields, "baseline": {"enabled": False}})
        result = ExperimentOrchestrator(config, carbon=Carbon(400)).run().result
        found = PointResult(
            id="n=1",
            axes={},
            config=config.model_dump(mode="json"),
            config_hash="0",
            cycles=[1],
            metrics=summarise([result]),
        )
        reasons = {name: judge(budget(name, maximum=1e9), found).reason for name in CATALOGUE}
        estimated = {name for name, reason in reasons.items() if reason == ESTIMATED}
        assert estimated == {
            *("energy_j", "energy_per_request_j", "energy_per_output_token_j", "wh_per_1000_requests"),
            *(
                "tokens_per_joule",
                "energy_per_total_token_j",
                "edp_js",
                "mean_power_w",
                "cpu_energy_j",
                "load_energy_j",
                "gco2e_g",
            ),
        }
        assert {name for name, reason in reasons.items() if reason is None} >= {"seconds", SPEED, "ttft_p50_ms"}


def gate(**fields: Any) -> GateVerdict:
    return GateVerdict.model_validate(
        {
            "gate": "regression",
            "id": f"{SPEED}-n=1",
            "metric": SPEED,
            "point": "n=1",
            "verdict": "SAME",
            "outcome": "passed",
            "unit": "1/s",
            "ratio": 0.9134,
            "interval": (0.8981, 0.9289),
            "confidence": 0.98,
            "n": 5,
            "reference_n": 4,
            "p": 0.00041,
            "alpha": 0.01,
            "delta": 0.02,
            **fields,
        }
    )


RATIO = "0.913 × the reference"
BASIS = "(δ = 2 %, 98 % interval 0.898–0.929, n = 5 against 4, p = 0.00041)"


class TestVerdictText:
    @pytest.mark.parametrize(
        ("limits", "values", "text"),
        [
            ((0.45, None), (0.508, 0.512, 0.516), "0.512 J is beyond 0.45 J (0.502–0.522, n = 3)"),
            ((0.6, None), (0.508, 0.512, 0.516), "0.512 J is within 0.6 J (0.502–0.522, n = 3)"),
            ((None, 0.6), (0.508, 0.512, 0.516), "0.512 J is below 0.6 J (0.502–0.522, n = 3)"),
            ((None, 0.4), (0.508, 0.512, 0.516), "0.512 J is not below 0.4 J (0.502–0.522, n = 3)"),
            ((0.6, 0.4), (0.508, 0.512, 0.516), "0.512 J is within 0.4–0.6 J (0.502–0.522, n = 3)"),
            ((0.45, 0.4), (0.5,), "0.500 J is beyond 0.45 J (n = 1)"),
            ((0.5, None), (0.3, 0.5, 0.4), f"0.400 J is within 0.5 J (0.152–0.648, n = 3); {NOISE}"),
            ((0.5, None), (0.4, 0.5), "0.450 J is within 0.5 J (n = 2)"),
            ((1e-9, None), (1.234e-8,), "1.23e-08 J is beyond 1e-09 J (n = 1)"),
            ((2e6, None), (12345.6,), "12,346 J is within 2,000,000 J (n = 1)"),
            ((0, None), (0.0,), "0 J is within 0 J (n = 1)"),
        ],
    )
    def test_text_of_a_budget_verdict(self, limits: tuple[Any, ...], values: tuple[float, ...], text: str) -> None:
        found = judge(budget("energy_j", *limits), point("energy_j", *values))
        assert verdict_text(found) == text

    def test_text_of_a_ratio_has_no_unit(self) -> None:
        assert verdict_text(judge(budget("mfu", minimum=0.5), point("mfu", 0.25))) == "0.250 is below 0.5 (n = 1)"

    def test_mean_near_its_limit_has_enough_digits(self) -> None:
        """With three digits it would be shown as 95.3, which is not below the limit."""
        found = judge(budget(SPEED, minimum=95.2704), point(SPEED, 95.2701))
        assert verdict_text(found) == "95.27 1/s is below 95.2704 1/s (n = 1)"

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(
        mean=st.floats(-1e9, 1e9),
        limit=st.floats(-1e9, 1e9) | st.sampled_from([0.0, 999.9999999999999, 1e-5, 0.1]),
        step=st.sampled_from([0, 1, -1]),
    )
    def test_text_never_contradicts_the_verdict(self, mean: Any, limit: Any, step: Any) -> None:
        if step:
            mean = math.nextafter(limit, step * math.inf)
        found = judge(budget("active_energy_j", maximum=limit), point("active_energy_j", mean))
        parts = re.fullmatch(r"(\S+) J is (\w+) (\S+) J \(n = 1\)", verdict_text(found))
        assert parts
        shown, limit_shown = (float(parts[index].replace(",", "")) for index in (1, 3))
        assert limit_shown == pytest.approx(limit, rel=1e-14)
        assert (shown > limit) == (mean > limit) == (parts[2] == "beyond")

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({}, f"{RATIO}: SAME {BASIS}"),
            ({"verdict": "REGRESSION", "outcome": "failed"}, f"{RATIO}: REGRESSION {BASIS}"),
            ({"verdict": "IMPROVEMENT", "reason": "why"}, f"{RATIO}: IMPROVEMENT {BASIS}; why"),
            (
                {"verdict": "INCONCLUSIVE", "cycles_to_decide": 12, "reason": "about 12 cycles"},
                f"{RATIO}: INCONCLUSIVE {BASIS}; about 12 cycles would decide",
            ),
            (
                {"verdict": "INCONCLUSIVE"},
                f"{RATIO}: INCONCLUSIVE {BASIS}; no number of cycles up to 1,000 would decide",
            ),
            (
                {"verdict": "INCONCLUSIVE", "ratio": None, "interval": None, "reason": "two cycles are needed"},
                "INCONCLUSIVE: two cycles are needed",
            ),
            (
                {"verdict": "INCONCLUSIVE", "interval": None, "reason": "two cycles are needed"},
                "INCONCLUSIVE: two cycles are needed",
            ),
            (
                {"paired": True, "reference_n": 5, "p": 1e-9, "delta": 0.015, "method": "estimated"},
                "0.913 × the reference: SAME (δ = 1.5 %, estimated, 98 % interval 0.898–0.929, n = 5 against 5, "
                "paired, p < 0.0001)",
            ),
            (
                {"p": None, "delta": None, "confidence": None, "ratio": 12.34, "interval": (0.05, 123.4)},
                "12.3 × the reference: SAME (interval 0.0500–123, n = 5 against 4)",
            ),
            ({"verdict": "NOT JUDGED", "reason": "boundaries differ"}, "cannot be judged: boundaries differ"),
            ({"verdict": "NOT JUDGED"}, "cannot be judged"),
        ],
    )
    def test_text_of_a_comparison_verdict(self, fields: dict[str, Any], text: str) -> None:
        assert verdict_text(gate(**fields)) == text

    def test_text_of_a_verdict_on_a_whole_point(self) -> None:
        missing = gate(metric="", verdict="NOT JUDGED", reason="it is gone")
        assert verdict_line(missing) == "n=1: cannot be judged: it is gone"
        assert verdict_line(gate(verdict="NOT JUDGED")) == f"n=1: {SPEED}: cannot be judged"

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            *((0.0, "0"), (0.5, "0.500"), (-0.0123456, "-0.0123"), (122.4, "122"), (28.06, "28.1")),
            *((1616.2, "1,616"), (123456.7, "123,457"), (1.5e9, "1.5e+09"), (1.234e-7, "1.23e-07")),
        ],
    )  # fmt: skip
    def test_numbers_in_texts_have_meaningful_digits(self, value: float, text: str) -> None:
        assert rounded(value) == text


def test_budget_of_cycles_on_different_hosts_is_not_judged() -> None:
    found = point("ttft_p50_ms", 10.0, 11.0)
    found.testbed = {"cpu": ["One CPU", "Another CPU"]}
    verdict = judge(budget("ttft_p50_ms", maximum=20.0), found)
    assert (verdict.verdict, verdict.outcome) == ("NOT JUDGED", "failed")
    assert verdict.reason == "its cycles ran on different CPUs: One CPU, Another CPU; use hosts of one kind"


def test_budget_of_a_point_that_merged_results_lack_is_not_judged() -> None:
    other = replace(budget("seconds", maximum=1.0), point="n=2")
    result = study_result(point("seconds", 1.0), measurement_protocol={"budgets": [asdict(other)]})
    (verdict,) = judge_budgets(result)
    assert (verdict.verdict, verdict.outcome, verdict.reason) == ("NOT JUDGED", "failed", "no completed cycle")
