"""``pytest RESULT.json --llem-budgets``: budgets of results that another tool wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from pytest_llem.cli import main
from tests.support.imports import GOLDEN, write_vllm

BUDGETS = "budgets:\n  ttft_p50_ms: 800\n  output_tokens_per_second: {min: 115}\n"

Judge = Callable[..., pytest.RunResult]


@pytest.fixture
def judge(pytester: pytest.Pytester) -> Judge:
    """Return a function that judges files of GOLDEN, copied to the current folder, by budgets."""

    def run(*arguments: str, budgets: str = BUDGETS) -> pytest.RunResult:
        (pytester.path / "budgets.yaml").write_text(budgets)
        for name in arguments:
            if (GOLDEN / name).is_file():
                shutil.copy(GOLDEN / name, pytester.path)
        return pytester.runpytest_subprocess("-p", "llem", "--llem-budgets=budgets.yaml", *arguments)

    return run


def test_each_budget_of_a_result_is_a_test(judge: Judge) -> None:
    done = judge("vllm_0.32.0.json", "-v")
    done.assert_outcomes(passed=2)
    done.stdout.fnmatch_lines(["*vllm_0.32.0.json::budget[[]ttft_p50_ms-model=smol] PASSED*"])


def test_exceeded_budget_fails_with_its_value_and_place(judge: Judge, pytester: pytest.Pytester) -> None:
    done = judge("vllm_0.32.0.json", "--junit-xml=junit.xml", budgets="budgets:\n  ttft_p50_ms: 700\n")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "732 ms is beyond 700 ms *",
            "FAILED vllm_0.32.0.json::budget[[]ttft_p50_ms-model=smol] - Failed: 732 *",
        ]
    )
    [case] = ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    assert case.get("name") == "budget[ttft_p50_ms-model=smol]"
    assert {one.get("name"): one.get("value") for one in case.iter("property")}["llem_verdict"] == "BEYOND"


def test_metric_that_the_file_does_not_have_fails_with_the_reason(judge: Judge) -> None:
    done = judge("vllm_0.32.0.json", budgets="budgets: {energy_j: 5}\n")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*not in vllm_0.32.0.json of vllm bench serve*"])


def test_budgets_may_be_for_some_points(judge: Judge) -> None:
    limits = "budgets:\n- {metric: seconds, max: 10, where: {n_prompt: 64}}\n"
    judge("llama-bench_b11434.json", budgets=limits).assert_outcomes(passed=1)
    done = judge("llama-bench_b11434.json", budgets=limits.replace("n_prompt", "n_promt"))
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(
        ["budgets.yaml:2:*n_promt: is not an axis of the results (did you mean 'n_prompt'?)"]
    )


def test_budgets_of_imported_results_are_judged(judge: Judge, pytester: pytest.Pytester) -> None:
    main(["import", str(GOLDEN / "guidellm_0.8.1.json"), "-o", str(pytester.path / "out")])
    judge("out/study_result.json").assert_outcomes(passed=2)


def test_records_beside_an_export_of_aiperf_are_read(judge: Judge, pytester: pytest.Pytester) -> None:
    for name, ending in (("profile_export_aiperf", "json"), ("profile_export", "jsonl")):
        shutil.copy(GOLDEN / f"aiperf_0.13.0.{ending}", pytester.path / f"{name}.{ending}")
    judge("profile_export_aiperf.json", budgets="budgets: {itl_p50_ms: 12}\n").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("budgets: {ttft_p5_ms: 1}\n", "budgets.yaml:1:11: budgets.ttft_p5_ms: no metric of that name (did you"),
        ("ttft_p50_ms: 1\n", "budgets.yaml:1:1: has no key 'budgets', as a study has it"),
        ("- 1\n", "budgets.yaml:1:1: has no key 'budgets', as a study has it"),
    ],
)
def test_mistake_in_the_budgets_is_located(budgets: str, message: str, judge: Judge) -> None:
    done = judge("vllm_0.32.0.json", budgets=budgets)
    done.assert_outcomes(errors=1)
    assert message in done.stdout.str()


def test_bad_result_is_an_error_of_collection(judge: Judge, pytester: pytest.Pytester) -> None:
    (pytester.path / "bad.json").write_text("{")
    done = judge("bad.json")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*bad.json: ends in the middle of its JSON*"])


def test_results_are_collected_only_if_named_and_with_budgets(judge: Judge, pytester: pytest.Pytester) -> None:
    write_vllm(pytester.path / "folder" / "result.json")
    done = judge("folder")
    assert done.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    done.stdout.fnmatch_lines(["llem: no result file was named, so that --llem-budgets had no effect*"])
