"""More tokens are no improvement: where answers differ in length, default gates judge per request, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_llem.gates.regression import Comparison, compare
from pytest_llem.gates.verdict_text import verdict_line, verdict_text
from pytest_llem.isolation.launcher import Job
from pytest_llem.reporting.github import write_summary
from pytest_llem.reporting.html import write_report
from pytest_llem.reporting.terminal.comparison import as_json, lines, markdown
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import DEFAULT_FAMILY, GatesConfig
from tests.conftest import WriteStudy
from tests.support import made_up
from tests.support.study_results import point, study_result, summary

COST, SPEED, TTFT = DEFAULT_FAMILY
COST_PER_REQUEST, REQUESTS = "energy_per_request_j", "requests_per_second"

WOBBLE = [1.000, 1.001, 0.999, 1.0005, 0.9995]


def _point(tokens: float, *, n: int = 8, energy: float = 1.0, method: str = "measured") -> PointResult:
    """Return a point whose answers have so many tokens each; time and energy go with these and a prompt's 16."""
    cost = energy * (tokens + 16)
    provenance = {"method": method, "boundary": "gpu_board" if method == "measured" else "cpu_package"}

    def each(name: str, value: float, **more: str) -> Summary:
        return summary(name, [value * one for one in WOBBLE], **more)

    return point(
        {"size": 1},
        config={"n": n, "max_output_tokens": tokens, "energy": {"allow_estimated": False}},
        **{
            COST: each(COST, cost / tokens, **provenance),
            COST_PER_REQUEST: each(COST_PER_REQUEST, cost, **provenance),
            SPEED: each(SPEED, 100 * tokens / (tokens + 16)),
            REQUESTS: each(REQUESTS, 100 / (tokens + 16)),
            TTFT: [10 * one for one in WOBBLE],
            "output_tokens": [tokens * n] * 5,
            "input_tokens": [16.0 * n] * 5,
        },
    )


def _compared(here: PointResult, there: PointResult, **settings: Any) -> Comparison:
    return compare(study_result(here), study_result(there), GatesConfig(**settings), name="main")


def _said(found: Comparison) -> dict[str, tuple[str, str]]:
    return {one.id.removesuffix("-size=1"): (one.metric, one.verdict) for one in found.verdicts}


class TestGates:
    def test_more_tokens_are_a_regression_per_request(self) -> None:
        assert _said(_compared(_point(24), _point(16))) == {
            COST: (COST_PER_REQUEST, "REGRESSION"),
            SPEED: (REQUESTS, "REGRESSION"),
            TTFT: (TTFT, "SAME"),
        }

    def test_without_a_meter_time_per_request_is_judged(self) -> None:
        here, there = _point(24, method="estimated"), _point(16, method="estimated")
        found = _compared(here, there)
        assert _said(found)[COST] == (COST_PER_REQUEST, "NOT JUDGED")
        assert _said(found)[SPEED] == (REQUESTS, "REGRESSION")
        assert [one.outcome for one in found.verdicts] == ["skipped", "failed", "passed"]

    def test_fewer_tokens_are_no_regression(self) -> None:
        assert _said(_compared(_point(16), _point(24)))[COST] == (COST_PER_REQUEST, "IMPROVEMENT")

    def test_where_they_agree_nothing_is_judged_per_request(self) -> None:
        found = _compared(_point(16), _point(16))
        assert _said(found) == {name: (name, "SAME") for name in DEFAULT_FAMILY}
        assert found.record.workload == []
        assert [one.note for one in found.verdicts] == [None] * 3

    def test_more_prompts_of_the_same_length_are_judged_per_token(self) -> None:
        found = _compared(_point(16, n=16), _point(16, n=8))
        assert _said(found)[COST] == (COST, "SAME")
        assert found.record.workload == ["prompts per pass: 16 in the candidate, 8 in the reference"]

    def test_metrics_that_the_study_names_are_judged_as_named(self) -> None:
        found = _compared(_point(24), _point(16), metrics=[COST])
        assert _said(found) == {COST: (COST, "IMPROVEMENT")}
        assert found.record.workload == ["output tokens per request: 24 in the candidate, 16 in the reference"]

    def test_answers_that_end_by_themselves_may_differ_by_little(self) -> None:
        found = _compared(_point(16.001), _point(16))
        assert _said(found)[COST] == (COST_PER_REQUEST, "SAME")
        assert found.record.workload == ["output tokens per request: 16.001 in the candidate, 16 in the reference"]

    def test_the_change_that_does_not_count_is_that_of_the_gate(self) -> None:
        found = _compared(_point(24), _point(16), delta={COST: 0.5})
        assert found.verdicts[0].delta == 0.5
        assert found.verdicts[0].verdict == "SAME"

    def test_an_older_result_without_token_counts_is_judged_per_token(self) -> None:
        there = _point(16)
        del there.metrics["output_tokens"]
        assert _said(_compared(_point(24), there))[COST] == (COST, "IMPROVEMENT")


class TestText:
    LINE = "workload differs: output tokens per request: 24 in the candidate, 16 in the reference"

    def test_it_is_the_first_line_of_a_comparison(self) -> None:
        found = _compared(_point(24), _point(16))
        assert lines(found, 100)[0] == self.LINE
        assert markdown(found).splitlines()[0].strip() == f"**{self.LINE}**"
        assert '"workload": [' in as_json(found)

    def test_it_is_the_first_line_of_githubs_summary(self, tmp_path: Path) -> None:
        result = study_result(_point(24))
        result.comparison = _compared(_point(24), _point(16)).record
        file = tmp_path / "summary.md"
        assert write_summary([result], {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(file)}) is None
        page = [line for line in file.read_text().splitlines() if line]
        at = next(number for number, line in enumerate(page) if line.startswith("Compared with"))
        assert "workload differs" in page[at - 1]

    def test_it_is_on_the_page(self, tmp_path: Path) -> None:
        result = study_result(_point(24))
        result.comparison = _compared(_point(24), _point(16)).record
        write_report(tmp_path, tmp_path / "report.html", result)
        page = (tmp_path / "report.html").read_text()
        assert "<h4>The workload differs</h4>" in page
        assert "output tokens per request: 24 in the candidate, 16 in the reference" in page

    def test_a_verdict_says_what_it_judges(self) -> None:
        verdict = _compared(_point(24), _point(16)).verdicts[0]
        assert verdict_line(verdict).startswith(f"size=1: {COST_PER_REQUEST}: 1.250 × the reference: REGRESSION")
        assert f"; {COST_PER_REQUEST} in place of {COST}: {self.LINE[18:]};" in verdict_text(verdict)


def test_a_baseline_of_fewer_tokens_turns_red(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind as a user met it: only max_output_tokens has changed, and the exit status was 0."""

    def figures(job: Job) -> dict[str, float]:
        tokens = job.config["max_output_tokens"]
        wobble = 1 + 0.001 * (-1) ** job.identity["cycle"]
        cost = (16 + tokens) * wobble
        return {
            COST: cost / tokens,
            COST_PER_REQUEST: cost,
            SPEED: 100 * tokens / cost,
            REQUESTS: 100 / cost,
            "output_tokens": tokens * job.config["n"],
            "input_tokens": 16 * job.config["n"],
        }

    made_up.experiments(monkeypatch, figures)
    changes: dict[str, Any] = {"sweep": {"noop.size": [1]}, "execution": {"n_cycles": 4}}
    write_study(max_output_tokens=16, **changes)
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-save", "main").assert_outcomes(passed=4)
    write_study(max_output_tokens=24, **changes)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-baseline", "main", "--llem-run-id", "b")
    run.assert_outcomes(passed=4 + 1, failed=2)
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    comparison = run.outlines.index(next(line for line in run.outlines if "noop against main" in line))
    assert run.outlines[comparison + 1] == TestText.LINE
    run.stdout.fnmatch_lines([f"*: 1.250 × the reference: REGRESSION*; {COST_PER_REQUEST} in place of {COST}: *"])
    assert StudyResult.load(pytester.path / "results" / "noop_b").comparison is not None
