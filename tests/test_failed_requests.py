"""Failed requests and those without a token are counted and warned of; their window is not judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.regression import compare
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.measurement.requests import BEFORE_WINDOW, MAX_ERROR, Requests
from pytest_llem.results.csv_files import read_csv
from pytest_llem.results.cycles import summarise
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.points import PointResult
from pytest_llem.results.quality_warnings import QualityWarning, worst
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.gates import Budget, GatesConfig
from tests.conftest import NOOP_STUDY, Results, WriteStudy
from tests.support.marks import slow
from tests.support.measured import output_ids, record
from tests.support.study_results import H100, study_result
from tests.support.warned import texts

NATURAL = {"min_window_seconds": 0, "length_mode": "natural"}

#: Ways in which a request fails.
Failing = Callable[[RequestRecord], RequestRecord]


def _empty(request: RequestRecord) -> RequestRecord:
    return replace(request, output_ids=[], token_times=[], first_token=None)


def _error(request: RequestRecord) -> RequestRecord:
    one = output_ids(request)[:1]
    return replace(request, output_ids=one, token_times=[], last_token=None, error="out of\nmemory")


def _requests(fail: Failing, *served: bool) -> Requests:
    """Return the requests of a pass, the unanswered ones created by *fail*."""
    answered = record(4, [7, 7, 7], ttft_s=0.01, itl_s=[0.002, 0.002], e2e_s=0.014)
    return Requests([[answered if one else fail(answered) for one in served]])


@pytest.fixture
def measured(noop_engine: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExperimentResult]:
    """Run an experiment of 4 requests in this process, every second of which fails."""

    def run(fail: Failing | None, every: int = 2, **changes: Any) -> ExperimentResult:
        import noop_engine

        answer = noop_engine.NoopEngine.requests

        def requests(self: Any, batch: Any, generated: Any) -> list[RequestRecord]:
            records: list[RequestRecord] = answer(self, batch, generated)
            if fail is None:
                return records
            return [fail(one) if at % every == every - 1 else one for at, one in enumerate(records)]

        with monkeypatch.context() as patch:
            patch.setattr(noop_engine.NoopEngine, "requests", requests)
            fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
            options = {"n": 4, "baseline": {"enabled": False}, "measurement": NATURAL, "noop": {"size": 4}}
            config = ExperimentConfig.model_validate({**fields, **options, **changes})
            return ExperimentOrchestrator(config).run().result

    return run


class TestCounted:
    @pytest.mark.parametrize("fail", [_empty, _error])
    def test_throughput_counts_answered_requests(self, measured: Any, fail: Failing) -> None:
        result = measured(fail)
        passes, seconds = result.window.passes, result.window.window_seconds
        assert (result.tokens.requests, result.tokens.failed_requests) == (4 * passes, 2 * passes)
        assert result.metrics["requests_per_second"].value == pytest.approx(2 * passes / seconds)
        energy, each = result.metrics["energy_j"].value, result.metrics["energy_per_request_j"].value
        assert each == pytest.approx(energy / 2)

    def test_without_answers_metrics_per_request_are_unavailable(self, measured: Any) -> None:
        result = measured(_empty, every=1)
        for name in ("requests_per_second", "energy_per_request_j", "wh_per_1000_requests"):
            assert (result.metrics[name].value, result.metrics[name].reason) == (None, "no request was answered")
        for name in ("output_tokens_per_second", "energy_per_output_token_j", "tokens_per_joule"):
            assert (result.metrics[name].value, result.metrics[name].reason) == (None, "nothing was generated")

    def test_latencies_are_those_of_answered_requests(self) -> None:
        found = _requests(
            lambda one: replace(one, token_times=[], first_token=9.0, error="too late"), True, False
        ).latency_metrics()
        assert found["ttft_p99_ms"].value == pytest.approx(10)

    def test_failed_request_is_not_a_different_output(self) -> None:
        same, failed = (_requests(_error, True, one).passes[0] for one in (True, False))
        assert Requests([same, same]).deterministic is True
        assert Requests([same, failed]).deterministic is None
        assert Requests([same, _requests(_empty, True, False).passes[0]]).deterministic is None

    def test_outputs_after_a_failed_request_are_written(self) -> None:
        rows = [*read_csv(_requests(_error, True, False, True).outputs_to_csv().splitlines(keepends=True))]
        assert [(row["request"], row["output_ids"]) for row in rows] == [("0", "7 7 7"), ("2", "7 7 7")]

    def test_unknown_token_counts_are_the_reason_for_a_missing_latency(self) -> None:
        answered = RequestRecord(4, sent=0.0, token_times=[1.0, 1.5, 2.0])
        found = Requests([[answered] * 4]).latency_metrics()
        assert found["ttft_p50_ms"].value == 1000
        assert found["itl_p50_ms"].reason == "the number of output tokens is unknown"

    def test_no_request_failed_if_all_are_answered(self, measured: Any) -> None:
        result = measured(None)
        assert result.tokens.failed_requests == 0
        assert not [one for one in result.metrics.values() if "failed" in (one.not_judged or "")]
        assert not [line for line in texts(result.warnings) if "failed" in line]

    def test_fixed_length_is_checked_for_answers_only(self, measured: Any) -> None:
        fixed = {"min_window_seconds": 0, "length_mode": "fixed"}
        assert measured(_error, measurement=fixed).tokens.failed_requests > 0
        with pytest.raises(ValueError, match="the engine generated 0 tokens where exactly 3 were asked for"):
            measured(_empty, measurement=fixed)


class TestReported:
    def test_long_error_is_cut_to_one_line(self) -> None:
        requests = _requests(lambda one: replace(one, error="<p>\r\n" + "\ud800" * 140_000), False, True)
        (failed, answered) = read_csv(requests.to_csv(None).splitlines(keepends=True))
        assert failed["error"].startswith("<p> \\ud800\\ud800")
        assert len(failed["error"]) < 6 * MAX_ERROR
        assert (answered["error"], answered["ttft_ms"]) == ("", "10.0000")
        assert len(requests.not_judged or "") < 6 * MAX_ERROR + 100

    def test_failed_requests_are_the_first_warning(self, measured: Any) -> None:
        result = measured(_error)
        warning = result.warnings[0]
        assert "requests failed or returned no token: out of memory; no gate judges" in warning.text
        others = [QualityWarning.of("drift", "drift"), QualityWarning.of("throttled", "throttled")]
        assert worst([*others, warning], 1) == [warning]

    def test_failed_and_impossibly_fast_requests_are_two_warnings(self) -> None:
        requests = replace(_requests(_error, True, False), too_fast_reason="1 µs for each token")
        assert [one.code for one in requests.warnings()] == ["requests_failed", "impossibly_fast"]
        assert (requests.not_judged or "").startswith("1 of 2 requests failed")

    def test_every_metric_of_the_window_is_not_judged(self, measured: Any) -> None:
        result = measured(_empty)
        unmarked = {name for name, one in result.metrics.items() if one.not_judged is None}
        assert unmarked == BEFORE_WINDOW


def _point(result: ExperimentResult, cycles: int = 3) -> PointResult:
    """Return a point whose cycles all have these requests."""
    config = {**result.effective_config, "energy": {"allow_estimated": True}}
    return PointResult(
        id="p",
        axes={},
        config=config,
        config_hash="0" * 16,
        cycles=list(range(1, cycles + 1)),
        metrics=summarise([result] * cycles),
        testbed=H100,
    )


class TestJudged:
    @pytest.mark.parametrize(
        "metric",
        [
            "requests_per_second",
            slow("ttft_p50_ms"),
            "energy_j",
            *map(slow, ("seconds", "energy_per_output_token_j", "itl_p50_ms")),
        ],
    )
    def test_budget_over_failed_requests_is_not_judged(self, measured: Any, metric: str) -> None:
        budget = Budget("b", metric, "p", 1e9, None, 1)
        assert judge_budget(budget, _point(measured(None)), file=None).verdict == "WITHIN"
        for fail, every in ((_empty, 2), (_empty, 1), (_error, 2)):
            found = judge_budget(budget, _point(measured(fail, every)), file=None)
            assert (found.verdict, found.outcome) == ("NOT JUDGED", "failed")
            assert found.reason is not None
            assert "requests failed or returned no token" in found.reason

    def test_metric_from_before_the_window_is_judged(self, measured: Any) -> None:
        budget = Budget("b", "load_seconds", "p", 1e9, None, 1)
        assert judge_budget(budget, _point(measured(_empty)), file=None).verdict == "WITHIN"

    @pytest.mark.parametrize("metrics", [None, ["requests_per_second"]])
    def test_comparison_is_not_judged_if_candidate_or_reference_failed(
        self, measured: Any, metrics: list[str] | None
    ) -> None:
        whole, failing = _point(measured(None)), _point(measured(_empty))
        for candidate, reference, side in ((failing, whole, "candidate"), (whole, failing, "reference")):
            settings = GatesConfig(metrics=metrics)
            found = compare(study_result(candidate), study_result(reference), settings, name="main")
            for verdict in found.verdicts:
                assert (verdict.verdict, verdict.outcome) == ("NOT JUDGED", "failed")
                assert verdict.reason is not None
                assert verdict.reason.startswith(f"in the {side}: ")

    def test_comparison_without_any_answers_does_not_pass(self, measured: Any) -> None:
        side = _point(measured(_empty, every=1))
        found = compare(study_result(side), study_result(side), GatesConfig(), name="main")
        assert {one.outcome for one in found.verdicts} == {"failed"}

    def test_failed_requests_of_one_cycle_suffice(self, measured: Any) -> None:
        whole = measured(None)
        found = summarise([whole, measured(_empty), whole])["seconds"]
        assert found.n == 3
        assert found.not_judged is not None


def test_study_with_failed_requests_fails(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """A real case: every second record was empty, and both budgets were WITHIN."""
    pytester.makepyfile(
        empty_engine="""
        from dataclasses import replace

        from noop_engine import NoopEngine

        class Engine(NoopEngine):
            def requests(self, batch, generated):
                first, second = super().requests(batch, generated)
                return [first, replace(second, output_ids=[], token_times=[])]
        """
    )
    write_study(
        backend="empty_engine:Engine",
        measurement=NATURAL,
        sweep={"n": [2]},
        execution={"n_cycles": 1},
        budgets={"ttft_p50_ms": 1e6, "requests_per_second": {"min": 0}},
        **{"empty_engine:Engine": {"size": 2}},
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-start-method=forkserver", "-v")
    run.assert_outcomes(passed=1, failed=2)
    run.stdout.fnmatch_lines(
        [
            "*not judged: 1 of 2 requests failed or returned no token*",
            "*cannot be judged: 1 of 2 requests failed or returned no token",
            "warning: 1 of 2 requests failed or returned no token; no gate judges what was measured over them",
        ]
    )
    (point,) = StudyResult.load(results.directory).points
    assert [one.verdict for one in point.verdicts] == ["NOT JUDGED"] * 2
