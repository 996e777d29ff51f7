"""Wrong verdicts that users of other benchmark tools have reported, reproduced as tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.gates.regression import compare
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.experiment import ExperimentResult, InputsRecord
from pytest_llem.results.facts import sut_facts
from pytest_llem.study.gates import GatesConfig
from tests.conftest import RunPytest, WriteStudy
from tests.support.measured import record
from tests.support.study_results import point, saved_file, study_result

RECORD = record(4, [7, 7, 7], ttft_s=0.01, itl_s=[0.002, 0.002], e2e_s=0.014)


class TestLatencies:
    @pytest.mark.parametrize(
        ("kind", "also_null", "other", "reason"),
        [
            ("ttft", ["itl", "tpot"], record(4, [7, 7, 7], e2e_s=0.014), "the engine reported only 1 of 2 values"),
            ("itl", [], record(4, [7, 7, 7], ttft_s=0.01, e2e_s=0.014), "the engine reported only 2 of 4 values"),
            ("e2e", ["itl", "tpot"], record(4, [7, 7, 7], ttft_s=0.01), "the engine reported only 1 of 2 values"),
        ],
    )
    def test_latency_of_some_requests_only_is_not_reported_as_of_all(
        self, kind: str, also_null: list[str], other: RequestRecord, reason: str
    ) -> None:
        found = Requests([[RECORD, other]]).latency_metrics()
        assert {name for name, one in found.items() if one.value is None} == {
            f"{name}_p{p}_ms" for name in (kind, *also_null, "queue") for p in (50, 90, 95, 99)
        }
        assert (found[f"{kind}_p50_ms"].reason or "").startswith(reason)

    def test_single_token_answers_have_no_inter_token_latency(self) -> None:
        one = record(4, [7], ttft_s=0.01)
        assert Requests([[RECORD, one]]).latency_metrics()["itl_p50_ms"].value == pytest.approx(2)
        alone = Requests([[one]]).latency_metrics()
        assert alone["itl_p50_ms"].reason == "no request has a second token with a time"

    @pytest.mark.parametrize(("p", "wanted"), [(90, 10), (95, 20), (99, 100)])
    def test_tail_percentile_needs_a_value_beyond_it(self, p: int, wanted: int) -> None:
        few = Requests([[RECORD] * (wanted - 1)]).latency_metrics()
        assert few[f"ttft_p{p}_ms"].value == pytest.approx(10)
        assert (few[f"ttft_p{p}_ms"].not_judged or "").startswith(
            f"percentile {p} of {wanted - 1} values, and a gate needs {wanted}: "
        )
        assert few["ttft_p50_ms"].not_judged is None
        assert Requests([[RECORD] * wanted]).latency_metrics()[f"ttft_p{p}_ms"].not_judged is None

    def test_budget_on_tail_of_few_requests_is_not_judged(
        self, write_study: WriteStudy, run_pytest: RunPytest
    ) -> None:
        limits = {"ttft_p50_ms": 1000, "ttft_p99_ms": 1000}
        write_study(sweep={"n": [2]}, execution={"n_cycles": 1}, budgets=limits)
        run = run_pytest("-rA")
        run.assert_outcomes(passed=2, failed=1)
        run.stdout.fnmatch_lines(["*cannot be judged: percentile 99 of 2 values, and a gate needs 100: *"])


class TestBaseline:
    @pytest.mark.slow
    def test_failed_comparison_does_not_replace_its_baseline(
        self, write_study: WriteStudy, run_pytest: RunPytest, pytester: pytest.Pytester
    ) -> None:
        """A regression that replaced its own baseline would fail only once, and pass in every later run."""
        study = {"sweep": {"n": [2]}, "execution": {"n_cycles": 3}, "gates": {"metrics": ["seconds"]}}
        write_study(**study, noop={"seconds": 0.01})
        run_pytest("--llem-save=main").assert_outcomes(passed=3)
        saved = saved_file(pytester.path, "main", "noop")
        before = saved.read_text()

        write_study(**study, noop={"seconds": 0.2})
        for given in ("main", str(saved)):
            run = run_pytest(f"--llem-baseline={given}", "--llem-save=main")
            run.assert_outcomes(passed=3, failed=1)
            run.stdout.fnmatch_lines(
                [
                    "noop: --llem-save: the run fails the comparison with this baseline: REGRESSION seconds-n=2 "
                    "(--llem-save-force saves it despite this)"
                ]
            )
            assert saved.read_text() == before
        run_pytest("--llem-baseline=main", "--llem-save=slower").assert_outcomes(passed=3, failed=1)
        assert saved.read_text() == before
        assert (pytester.path / ".llem/baselines/slower").is_dir()
        run_pytest("--llem-baseline=main", "--llem-save=main", "--llem-save-force")
        assert saved.read_text() != before

    def test_comparison_without_selected_gates_is_reported(
        self, write_study: WriteStudy, run_pytest: RunPytest
    ) -> None:
        """Without a message, such a run would pass whatever the baseline holds."""
        write_study(sweep={"n": [2]}, execution={"n_cycles": 2}, gates={"metrics": ["seconds"]})
        message = "llem: nothing was compared with main: no gate of the comparison is selected"
        assert message not in run_pytest("--llem-save=main").outlines
        assert message in run_pytest("--llem-baseline=main", "-k", "cycle=1").outlines
        assert message not in run_pytest("--llem-baseline=main", "-k", "regression").outlines

    def test_run_without_a_point_does_not_replace_its_baseline(
        self, write_study: WriteStudy, run_pytest: RunPytest, pytester: pytest.Pytester
    ) -> None:
        study = {"execution": {"n_cycles": 1}, "gates": {"metrics": ["seconds"]}}
        write_study(**study, sweep={"n": [2, 3]})
        run_pytest("--llem-save=main")
        write_study(**study, sweep={"n": [2]})
        run = run_pytest("--llem-baseline=main", "--llem-save=main")
        assert run.ret == pytest.ExitCode.TESTS_FAILED
        run.stdout.fnmatch_lines(["noop: --llem-save: the run fails the comparison *: missing n=3 *"])
        assert '"n=3"' in saved_file(pytester.path, "main", "noop").read_text()


class TestSameCode:
    """Two commits are to be compared but both sides run the same one, so that there is never a change."""

    @pytest.mark.parametrize(
        ("candidate", "reference", "paired", "warned"),
        [
            ({"code": "a"}, {"code": "a"}, True, True),
            ({"code": "a", "commit": "1"}, {"code": "a", "commit": "2", "uncommitted_changes": True}, True, True),
            ({"code": "a"}, {"code": "a"}, False, False),
            ({"code": "a"}, {"code": "b"}, True, False),
            ({"code": "a"}, {"code": "a", "variables.OMP_NUM_THREADS": "1"}, True, False),
            ({}, {}, True, False),
        ],
        ids=["same", "other-commit", "two-sessions", "other-code", "other-variables", "unknown"],
    )
    def test_comparison_of_the_same_code_causes_a_warning(
        self, candidate: dict[str, str], reference: dict[str, str], paired: bool, warned: bool
    ) -> None:
        one, other = (
            study_result(point({"n": 1}, seconds=[1, 1.1, 1.2], sut=it)) for it in (candidate, reference)
        )
        record = compare(one, other, GatesConfig(metrics=["seconds"]), name="python", paired=paired).record
        assert [line for line in record.warnings if "same code" in line] == record.warnings
        assert bool(record.warnings) == warned
        assert not [line for line in record.sut if line.startswith("code")]

    def test_code_is_known_by_all_modules_and_packages(self) -> None:
        path = min((Path(__file__).parent / "golden" / "1.0" / "experiments").glob("*.json"))
        result = ExperimentResult.model_validate_json(path.read_text())

        def code(modules: dict[str, str | None], **packages: str | None) -> object:
            inputs = InputsRecord(modules=modules, distributions=packages)
            return sut_facts([result.model_copy(update={"inputs": inputs})]).get("code")

        assert code({"m": "1"}, torch="2") == code({"m": "1"}, torch="2") is not None
        assert len({code({"m": "1"}, torch="2"), code({"m": "2"}, torch="2"), code({"m": "1"}, torch="3")}) == 3
        assert code({"m": None}, torch="2") is None
        assert "code" not in sut_facts([result])


class TestPartOfAPoint:
    @pytest.mark.slow
    def test_retry_of_a_failed_cycle_does_not_make_its_gates_pass(
        self,
        write_study: WriteStudy,
        run_pytest: RunPytest,
        pytester: pytest.Pytester,
    ) -> None:
        """``--lf`` runs the crashed cycle and the failed gates, but one cycle cannot show a regression."""
        study = {"sweep": {"n": [2]}, "execution": {"n_cycles": 3}, "gates": {"metrics": ["seconds"]}}
        write_study(**study, noop={"seconds": 0.01})
        run_pytest("--llem-save=main").assert_outcomes(passed=3)

        once = pytester.path / "once"
        slow = {"seconds": 0.2, "fail_once": str(once)}
        write_study(**study, noop=slow, budgets={"requests_per_second": {"min": 1e-9}})
        run_pytest("--llem-baseline=main").assert_outcomes(passed=2 + 1, failed=1 + 1)
        run = run_pytest("--llem-baseline=main", "--lf")
        run.assert_outcomes(passed=1, failed=1, deselected=3)
        run.stdout.fnmatch_lines(["*cannot be judged: 1 of 3 cycles selected: *"])
        run_pytest("--llem-baseline=main", "-k", "cycle=1 or budget").assert_outcomes(
            passed=1, failed=1, deselected=3
        )
        run = run_pytest("--llem-baseline=main", "--llem-resume")
        run.stdout.fnmatch_lines(["FAILED *::regression[[]seconds-n=2[]] - * the reference*"])
        run.assert_outcomes(passed=3 + 1, failed=1)

    @pytest.mark.slow
    def test_gate_alone_judges_the_last_run_despite_a_failed_cycle(
        self, write_study: WriteStudy, run_pytest: RunPytest, pytester: pytest.Pytester
    ) -> None:
        """An older run is complete and passes."""
        flag = pytester.path / "broken"
        study = {"sweep": {"n": [2]}, "execution": {"n_cycles": 2}, "budgets": {"seconds": 1e6}}
        write_study(**study, noop={"fault": "raise while broken", "break": str(flag)})
        run_pytest("--llem-run-id=whole").assert_outcomes(passed=3)
        flag.touch()
        run_pytest("--llem-run-id=broken").assert_outcomes(failed=3)
        run = run_pytest("-k", "budget")
        run.assert_outcomes(failed=1, deselected=2)
        run.stdout.fnmatch_lines(["*: no completed cycle; measured in an earlier run, noop_broken"])
        flag.unlink()
        run_pytest("--llem-run-id=part", "-k", "cycle=1").assert_outcomes(passed=1, deselected=2)
        run = run_pytest("-k", "budget")
        run.stdout.fnmatch_lines(["*: no completed cycle; measured in an earlier run, noop_broken"])
