"""Results that share measurements are not compared, since a result always agrees with itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem import StudyResult, cli
from pytest_llem.gates.baselines import load
from pytest_llem.gates.regression import compare
from pytest_llem.gates.saving import save
from pytest_llem.results.points import PointResult
from pytest_llem.study.gates import GatesConfig
from tests.conftest import WriteStudy
from tests.support import made_up
from tests.support.study_results import point, study_result

SECONDS = GatesConfig(metrics=["seconds"])


def _point(*digests: str) -> PointResult:
    return point({"n": 1}, seconds=[1.0, 1.001, 0.999], result_digests=list(digests))


class TestPoints:
    def test_shared_cycle_is_not_judged(self) -> None:
        here, there = _point("a", "b", "c"), _point("d", "b", "e")
        (found,) = compare(study_result(here), study_result(there), SECONDS, name="main").verdicts
        assert (found.verdict, found.outcome) == ("NOT JUDGED", "failed")
        assert found.reason is not None
        assert found.reason.startswith("not independent: the reference has the same measurement of cycle 2; ")

    @pytest.mark.parametrize("paired", [False, True])
    def test_independent_measurements_are_judged(self, paired: bool) -> None:
        here, there = _point("a", "b", "c"), _point("d", "e", "f")
        (found,) = compare(study_result(here), study_result(there), SECONDS, name="main", paired=paired).verdicts
        assert found.verdict == "SAME"

    def test_older_results_of_one_session_are_not_judged(self) -> None:
        here, there = (study_result(_point(), started_at="2026-11-28T10:00:00.000Z") for _ in range(2))
        (found,) = compare(here, there, SECONDS, name="main").verdicts
        assert found.reason is not None
        assert found.reason.startswith("not independent: both are results of the run that began at 2026-11-28")
        later = study_result(_point(), started_at="2026-11-28T11:00:00.000Z")
        assert compare(later, there, SECONDS, name="main").verdicts[0].verdict == "SAME"


@pytest.fixture
def run(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run a study of one point and three cycles in this process; its experiments take no time."""
    made_up.experiments(monkeypatch, lambda job: {"seconds": 1 + 0.001 * job.identity["cycle"]})
    write_study(
        sweep={"noop.size": [1]},
        execution={"n_cycles": 3, "skip_preflight": True},
        gates={"metrics": ["seconds"]},
    )

    def once(name: str, *options: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-run-id", name, *options)

    return once


NOT_INDEPENDENT = "*cannot be judged: not independent: *measure one of the two again*"


class TestRuns:
    def test_an_unchanged_study_measured_again_is_judged(self, run: Callable[..., pytest.RunResult]) -> None:
        run("a", "--llem-save", "main").assert_outcomes(passed=3)
        run("b", "--llem-baseline", "main").assert_outcomes(passed=3 + 1)

    def test_replayed_results_are_not_compared_with_their_own_baseline(
        self, run: Callable[..., pytest.RunResult]
    ) -> None:
        run("a", "--llem-save", "main")
        found = run("b", "--llem-resume", "--llem-resume-mismatch", "--llem-baseline", "main")
        found.assert_outcomes(passed=3, failed=1)
        found.stdout.fnmatch_lines([NOT_INDEPENDENT])

    def test_a_gate_alone_does_not_compare_a_run_with_itself(self, run: Callable[..., pytest.RunResult]) -> None:
        run("a")
        found = run("b", "--llem-baseline=results/noop_a", "-k", "regression")
        found.assert_outcomes(failed=1, deselected=3)
        found.stdout.fnmatch_lines([NOT_INDEPENDENT])

    def test_saved_baseline_keeps_the_digests(
        self, run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
    ) -> None:
        run("a", "--llem-save", "main")
        whole = StudyResult.load(pytester.path / "results" / "noop_a")
        saved = load("main", pytester.path / ".llem/baselines")
        (one,), (other,) = whole.points, saved.points
        assert one.result_digests == other.result_digests
        assert len(set(one.result_digests)) == 3
        assert one.result_digests == [
            entry.result_sha256 for entry in sorted(whole.experiments, key=lambda e: e.cycle)
        ]


class TestCommands:
    @pytest.mark.parametrize("sides", [("main", "main"), ("main", "results/noop_a"), ("results/noop_a", "copy")])
    def test_llem_compare_refuses_a_result_and_itself(
        self,
        run: Callable[..., pytest.RunResult],
        pytester: pytest.Pytester,
        capsys: pytest.CaptureFixture[str],
        sides: tuple[str, str],
    ) -> None:
        run("a", "--llem-save", "main")
        shutil.copytree("results/noop_a", "copy")
        capsys.readouterr()
        status = cli.main(["compare", *sides])
        out, error = capsys.readouterr()
        assert (status, out) == (2, "")
        assert f"{sides[1]} and {sides[0]}: not independent: both have the same measurement of 3 exp" in error

    def test_llem_compare_accepts_two_runs(
        self, run: Callable[..., pytest.RunResult], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("a")
        run("b")
        capsys.readouterr()
        assert cli.main(["compare", "results/noop_a", "results/noop_b"]) == 0

    def test_llem_aa_refuses_the_same_session_in_two_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        one = save(study_result(_point("a", "b", "c")), "one", tmp_path)
        other = save(study_result(_point("c", "d", "e")), "other", tmp_path)
        assert cli.main(["aa", str(one), str(other), "--metric", "seconds"]) == 2
        assert "not independent: both have the same measurement of 1 experiment; " in capsys.readouterr().err

    def test_llem_compare_refuses_an_older_result_and_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save(study_result(_point()), "old", tmp_path)
        assert cli.main(["compare", "old", "old"]) == 2
        assert "old and old: not independent: both are the same result; " in capsys.readouterr().err
