"""``n_cycles: auto``: a point gets no more cycles once its gates are decided; and the time budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.execution.stopping import begin_time_budget, elapsed_seconds
from pytest_llem.judging.until_decided import _by_precision
from pytest_llem.results.statistics import Summary
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support import figures

Auto = Callable[..., pytest.RunResult]

#: Metrics of a cycle whose spread is about 0.3 %.
QUIET = "(1 + 0.003 * (-1) ** cycle)"


@pytest.fixture
def auto(pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy) -> Auto:
    """Return a function that runs a study until decided, with an expression for ``seconds``."""
    pytester.makeconftest(figures.conftest())

    def run(seconds: str, *options: str, **execution: Any) -> pytest.RunResult:
        (pytester.path / "figures.json").write_text(json.dumps({"seconds": seconds}))
        write_study(
            sweep={"noop.size": [1, 2]},
            execution={"n_cycles": "auto", "max_cycles": 10, "skip_preflight": True, **execution},
            gates={"metrics": ["seconds"]},
        )
        return run_pytest(*options)

    return run


def cycles(results: Results, run: str) -> dict[str, int]:
    return {point.id: len(point.cycles) for point in StudyResult.load(results.root / f"noop_{run}").points}


class TestComparison:
    def test_decided_point_gets_no_more_cycles(self, auto: Auto, results: Results) -> None:
        """The other point stays undecided to the maximum: its cycles differ by 30 %."""
        noise = "(1 + (0.003 if size == 1 else 0.3) * (-1) ** cycle)"
        auto(noise, "--llem-save=main", "--llem-run-id=main", n_cycles=10).assert_outcomes(passed=20)
        run = auto(f"1.1 * {noise}", "--llem-baseline=main", "--llem-run-id=slower", "-rs")
        assert cycles(results, "slower") == {"size=1": 4, "size=2": 10}
        run.assert_outcomes(passed=4 + 10, skipped=6 + 1, failed=1)
        run.stdout.fnmatch_lines(["*SKIPPED*decided after 4 cycles*"])
        run.stdout.fnmatch_lines(["llem: size=1 after 4 cycles, decided: seconds 1.100 (*) REGRESSION"])
        run.stdout.fnmatch_lines(["llem: size=2 after 5 cycles, seconds * INCONCLUSIVE"])
        run.stdout.no_fnmatch_line("*4 of 10 cycles*")

    def test_equal_points_are_decided_as_the_same(self, auto: Auto, results: Results) -> None:
        auto(QUIET, "--llem-save=main", "--llem-run-id=main", n_cycles=10)
        run = auto(QUIET, "--llem-baseline=main", "--llem-run-id=same")
        run.assert_outcomes(passed=8 + 2, skipped=12)
        assert cycles(results, "same") == {"size=1": 4, "size=2": 4}

    def test_interval_allows_for_several_looks(self, auto: Auto, results: Results) -> None:
        """The same four cycles decide with a wider interval than if their number had been fixed."""
        auto(QUIET, "--llem-save=main", "--llem-run-id=main", n_cycles=10)
        widths = {}
        for name, execution in (("auto", {}), ("fixed", {"n_cycles": 4})):
            auto(f"1.1 * {QUIET}", "--llem-baseline=main", f"--llem-run-id={name}", **execution)
            (verdict, _) = [point.verdicts[0] for point in StudyResult.load(results.root / f"noop_{name}").points]
            assert (verdict.verdict, verdict.n) == ("REGRESSION", 4)
            assert verdict.interval is not None
            widths[name] = verdict.interval[1] - verdict.interval[0]
        assert widths["auto"] > 1.3 * widths["fixed"]

    def test_failed_cycles_do_not_count(self, auto: Auto, pytester: pytest.Pytester, results: Results) -> None:
        auto(QUIET, "--llem-save=main", "--llem-run-id=main", n_cycles=10)
        failing = (
            "def run(job, **options):\n"
            "    if job.identity['cycle'] == 2:\n"
            "        raise ValueError('not this one')\n"
            "    return _done(job, **options)\n"
        )
        pytester.makeconftest(figures.conftest() + failing)
        auto(QUIET, "--llem-baseline=main", "--llem-run-id=failing").assert_outcomes(
            passed=8 + 2, failed=2, skipped=10
        )
        assert cycles(results, "failing") == {"size=1": 4, "size=2": 4}


class TestPrecision:
    def test_precision_is_shown_as_it_was_set(self) -> None:
        result = SimpleNamespace(
            points=[
                SimpleNamespace(id="p", metrics={"seconds": Summary(mean=1.05, n=2, unit="s", values=[1.0, 1.1])})
            ]
        )
        execution = SimpleNamespace(half_width=0.0025)
        study = SimpleNamespace(budgets=(), compared_metrics=lambda point: ["seconds"], execution=execution)
        run: Any = SimpleNamespace(study=study, summarise=lambda: result)
        point: Any = SimpleNamespace(id="p")
        assert _by_precision(run, point) == (None, "not yet within 0.25%: seconds")

    def test_without_comparison_narrow_intervals_end_the_cycles(self, auto: Auto, results: Results) -> None:
        seconds = "1 + (0.003 if size == 1 else 0.3) * (-1) ** cycle"
        run = auto(seconds, "--llem-run-id=alone")
        assert cycles(results, "alone") == {"size=1": 4, "size=2": 10}
        run.stdout.fnmatch_lines(["llem: size=1 after 4 cycles, decided"])
        run.stdout.fnmatch_lines(["llem: size=2 after 5 cycles, not yet within 2%: seconds"])

    @pytest.mark.parametrize(
        ("option", "shown"),
        [("--llem-save=other", "no value of seconds"), ("--llem-baseline=main", "seconds NOT JUDGED")],
    )
    def test_point_that_cannot_be_judged_is_not_called_decided(
        self, auto: Auto, results: Results, option: str, shown: str
    ) -> None:
        auto(QUIET, "--llem-save=main", "--llem-run-id=main", n_cycles=10)
        run = auto("None", option, "--llem-run-id=none", "-rs")
        assert cycles(results, "none") == {"size=1": 4, "size=2": 4}
        run.stdout.fnmatch_lines([f"llem: size=1 after 4 cycles, cannot be judged: {shown}"])
        run.stdout.fnmatch_lines(["SKIPPED [[]12[]] *: cannot be judged after 4 cycles"])
        run.stdout.fnmatch_lines(["* 1  4 of 10  37,801 *"])

    def test_maximum_is_a_whole_run_that_can_be_saved(self, auto: Auto, results: Results) -> None:
        auto(QUIET, "--llem-save=main", "--llem-run-id=alone").assert_outcomes(passed=8, skipped=12)
        run = auto(f"1.1 * {QUIET}", "--llem-baseline=main", "--llem-run-id=slower")
        run.assert_outcomes(passed=8, skipped=12, failed=2)


class TestTimeBudget:
    def test_experiments_that_would_end_too_late_are_skipped(self, auto: Auto, results: Results) -> None:
        run = auto(QUIET, "--llem-time-budget=0.001", "-rs", n_cycles=2)
        run.assert_outcomes(skipped=4)
        run.stdout.fnmatch_lines(["*SKIPPED*time budget of 0 s: *left*"])

    def test_gate_of_skipped_experiments_names_the_time_budget(
        self, run_pytest: RunPytest, write_study: WriteStudy
    ) -> None:
        write_study(sweep={"n": [1]}, budgets={"seconds": {"max": 100}})
        run = run_pytest("--llem-time-budget=0.001")
        run.stdout.fnmatch_lines(["*cannot be judged: no completed cycle; time budget of 0 s: 0 s are left"])

    @pytest.mark.parametrize("given", ["soon", "0", "-1m", "inf", "5w"])
    def test_invalid_budget_is_refused(self, auto: Auto, given: str) -> None:
        run = auto(QUIET, f"--llem-time-budget={given}")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(
            [f"ERROR: --llem-time-budget: must be a time above 0, * 15m, 2h, 30d (got {given!r})"]
        )

    def test_worker_that_starts_later_has_what_is_left(self) -> None:
        config: Any = SimpleNamespace(stash=pytest.Stash(), workerinput={"llem_elapsed": 100.0})
        begin_time_budget(config)
        assert elapsed_seconds(config) >= 100.0


def test_minimum_above_the_maximum_is_refused_at_its_place(auto: Auto) -> None:
    run = auto(QUIET, min_cycles=12)
    run.stdout.fnmatch_lines(["*study.yaml:*min_cycles (12) must be at most max_cycles (10)*"])


def test_unknown_word_for_cycles_is_refused(auto: Auto) -> None:
    auto(QUIET, n_cycles="always").stdout.fnmatch_lines(
        ["*execution.n_cycles: must be 'auto' or a number of cycles, 1 or more (got 'always')*"]
    )
    run = auto(QUIET, "--llem-cycles=always", n_cycles=1)
    run.stderr.fnmatch_lines(["ERROR: --llem-cycles: must be *"])


def test_plan_says_how_many_cycles_are_expected(auto: Auto, pytester: pytest.Pytester) -> None:
    run = auto(QUIET, f"--llem-against={sys.executable}", "--co")
    run.stdout.fnmatch_lines(
        [
            "llem: noop *: 2 points × up to 10 cycles, at most 20 experiments, shuffled, *",
            "  gates: 4 to 10 interleaved cycles, until decided (α 0.01, Holm over 2):",
            "    a change of 20%: 4, a change of 10%: 4, *, no change: * cycles if cycles vary by 0.5% *",
        ]
    )
