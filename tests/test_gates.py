"""Gates as test items: collected, selected, judged by the controller once all has run, reported as any test."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from tests.conftest import Results
from tests.support import figures

ENERGY, SPEED = "energy_per_output_token_j", "output_tokens_per_second"

#: Half a percent up and down from cycle to cycle.
WOBBLE = "(1 + 0.005 * (-1) ** cycle)"


class Study:
    """A study of two points whose experiments are done at once, with the figures that a test wants."""

    def __init__(self, pytester: pytest.Pytester, write_study: Any, results: Any) -> None:
        self.pytester, self._write, self.results = pytester, write_study, results
        self.root = pytester.path

    def write(self, figures_: Any = None, method: str = "measured", **changes: Any) -> None:
        self.pytester.makeconftest(figures.conftest(method))
        self.figures(figures_ or {ENERGY: f"0.1 * size * {WOBBLE}", SPEED: f"100 * {WOBBLE}"})
        self._write(**{"sweep": {"noop.size": [1, 2]}, "execution": {"n_cycles": 4}, **changes})

    def figures(self, wanted: Any) -> None:
        (self.root / "figures.json").write_text(json.dumps(wanted))

    def run(self, *options: Any) -> Any:
        return self.pytester.runpytest_subprocess("study.yaml", "-p", "llem", *options)

    def newest(self) -> Any:
        found = [path for path in self.results.root.iterdir() if path.is_dir()]
        return StudyResult.load(
            max(found, key=lambda path: json.loads((path / "manifest.json").read_text())["started_at"])
        )


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results) -> Study:
    return Study(pytester, write_study, results)


@pytest.fixture(params=[(), ("-n", "2")], ids=["serial", "xdist"])
def workers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


class TestBudgets:
    def test_they_are_items_of_their_own(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 0.15})
        run = study.run(*workers, "-rA", "--junitxml=report.xml")
        run.assert_outcomes(passed=8 + 1, failed=1)
        assert run.ret == 1
        run.stdout.fnmatch_lines(
            [
                f"*PASSED study.yaml::budget[[]{ENERGY}-size=1[]]*",
                f"*FAILED study.yaml::budget[[]{ENERGY}-size=2[]] - 0.200 J*",
            ]
        )
        assert "%]" not in run.stdout.str() or "[100%]" in run.stdout.str()
        cases = {case.get("name"): case for case in ET.parse(study.root / "report.xml").iter("testcase")}
        assert len(cases) == 10
        failed = cases[f"budget[{ENERGY}-size=2]"]
        assert "is beyond 0.15 J" in failed.find("failure").get("message")
        figures_ = {one.get("name"): one.get("value") for one in failed.iter("property")}
        assert figures_["llem_verdict"] == "BEYOND"
        assert float(figures_["llem_mean"]) == pytest.approx(0.2)
        assert cases[f"budget[{ENERGY}-size=1]"].find("failure") is None
        first, second = study.newest().points
        assert [one.verdict for one in first.verdicts] == ["WITHIN"]
        assert [one.verdict for one in second.verdicts] == ["BEYOND"]

    def test_a_failed_gate_is_no_failed_experiment(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run()
        manifest = study.results.manifest
        assert (manifest["status"], manifest["completed"], manifest["failed"]) == ("completed", 8, 0)

    def test_progress_ends_at_100_percent(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 0.15})
        run = study.run(*workers, "-v")
        shares = [int(line.rpartition("[")[2].rstrip("%]")) for line in run.outlines if line.endswith("%]")]
        assert shares
        assert shares == sorted(shares)
        assert shares[-1] == 100

    def test_they_are_collected_and_can_be_selected(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15, SPEED: {"min": 50}})
        listed = study.run("--collect-only", "-q").outlines
        assert [line for line in listed if "::budget[" in line] == [
            f"study.yaml::budget[{metric}-size={size}]" for size in (1, 2) for metric in (ENERGY, SPEED)
        ]
        study.run("-k", "size=1").assert_outcomes(passed=4 + 2, deselected=6)
        study.run("-k", "size=1 and not budget").assert_outcomes(passed=4, deselected=8)
        study.run("-k", "cycle=1").assert_outcomes(passed=2, deselected=10)
        study.run("--deselect", f"study.yaml::budget[{ENERGY}-size=2]").assert_outcomes(passed=11, deselected=1)

    def test_one_that_is_selected_alone_judges_the_newest_result(
        self, study: Study, workers: tuple[str, ...]
    ) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run()
        node = f"study.yaml::budget[{ENERGY}-size=2]"
        run = study.pytester.runpytest_subprocess(node, "-p", "llem", *workers)
        run.assert_outcomes(failed=1)
        assert len([path for path in study.results.root.iterdir() if path.is_dir()]) == 1, "nothing was run"
        run.stdout.fnmatch_lines(["*measured before, in noop_*", "llem: 1 gate judged by what was *before: *"])
        last = study.run("--lf", *workers)
        last.assert_outcomes(failed=1, **({} if workers else {"deselected": 9}))

    def test_one_that_is_selected_alone_has_nothing_to_judge_without_a_result(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        run = study.run("-k", "budget and size=1")
        run.assert_outcomes(failed=1, deselected=9)
        run.stdout.fnmatch_lines(["*cannot be judged: *no completed cycle*"])

    def test_one_of_a_point_that_was_never_measured(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run("--llem-save", "main")
        for one in study.results.root.iterdir():
            if one.is_dir():
                shutil.rmtree(one)
        study.run("-k", "experiment and size=1").assert_outcomes(passed=4, deselected=6)
        run = study.run("--llem-baseline", "main", "-k", "size=2 and not experiment")
        run.assert_outcomes(failed=1 + 3, deselected=4 + 4 + 4)
        run.stdout.fnmatch_lines(["cannot be judged: *nothing of it was selected, or measured before"] * 4)
        run.stdout.no_fnmatch_line("missing: *")

    def test_after_x_they_are_left(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(sweep={"noop.size": [1]}, budgets={ENERGY: 0.15})
        (study.root / "conftest.py").write_text(
            "from pytest_llem.collection import experiment\n"
            "from pytest_llem.isolation.outcome import Outcome\n"
            "from pytest_llem.results.models import ErrorRecord\n"
            "error = ErrorRecord(kind='crash', type='X', message='no')\n"
            "experiment.run_isolated = lambda job, **_: Outcome(error=error)\n"
        )
        run = study.run("-x", *workers)
        assert run.parseoutcomes()["failed"] >= 1  # workers are a little ahead
        assert "passed" not in run.parseoutcomes()
        run.stdout.fnmatch_lines(["*1 gate not judged: the run was stopped before*"])

    def test_x_stops_at_a_gate_too(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.05})
        run = study.run("-x")
        run.assert_outcomes(passed=8, failed=1)
        run.stdout.fnmatch_lines(["*1 gate not judged: the run was stopped before*"])

    def test_marks_count(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(
            budgets={ENERGY: 0.05},
            sweep={"noop.size": [1, 2, 3]},
            skip=[{"where": {"noop.size": 1}, "reason": "no memory"}],
            xfail=[{"where": {"noop.size": 2}, "reason": "known"}],
        )
        with (study.root / "conftest.py").open("a") as file:
            file.write(
                "\nimport pytest\ndef pytest_collection_modifyitems(items):\n"
                "    for item in items:\n"
                "        if 'size=3' in item.name and 'budget' in item.name:\n"
                "            item.add_marker(pytest.mark.skip(reason='not this one'))\n"
            )
        run = study.run("-rsx", *workers)
        run.assert_outcomes(passed=4, skipped=4 + 1 + 1, xfailed=1, xpassed=4)
        run.stdout.fnmatch_lines(["SKIPPED*not this one*"])

    @pytest.mark.parametrize(
        ("mark", "outcome"),
        [
            ("xfail(condition=False, reason='no')", "failed"),
            ("xfail(False, reason='no')", "failed"),
            ("xfail(True, reason='yes')", "xfailed"),
            ("xfail(reason='yes')", "xfailed"),
            ("skipif(False, reason='no')", "failed"),
            ("skipif(True, reason='yes')", "skipped"),
        ],
    )
    def test_a_marks_condition_counts(self, study: Study, mark: str, outcome: str) -> None:
        study.write(budgets={ENERGY: 0.05}, sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        with (study.root / "conftest.py").open("a") as file:
            file.write(
                "\nimport pytest\ndef pytest_collection_modifyitems(items):\n"
                f"    items[-1].add_marker(pytest.mark.{mark})\n"
            )
        run = study.run("-rsx")
        run.assert_outcomes(passed=1, **{outcome: 1})
        if outcome != "failed":
            run.stdout.fnmatch_lines(["*yes"])

    @pytest.mark.parametrize(
        ("mark", "options", "outcome"),
        [
            ("xfail(strict=True, reason='x')", [], "failed"),
            ("xfail(reason='x')", ["-o", "xfail_strict=true"], "failed"),
            ("xfail(strict=False, reason='x')", ["-o", "xfail_strict=true"], "xpassed"),
            pytest.param(
                *("xfail(reason='x')", ["-o", "strict=true"], "failed"),
                marks=pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 9 has that key"),
            ),
        ],
    )
    def test_a_gate_that_passes_against_expectation_is_as_strict_as_any_test(
        self, study: Study, mark: str, options: list[Any], outcome: str
    ) -> None:
        study.write(budgets={ENERGY: 1.0}, sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        with (study.root / "conftest.py").open("a") as file:
            file.write(
                "\nimport pytest\ndef pytest_collection_modifyitems(items):\n"
                f"    items[-1].add_marker(pytest.mark.{mark})\n"
            )
        study.run(*options).assert_outcomes(passed=1, **{outcome: 1})

    def test_expected_failures_count_as_pytest_counts_them(self, study: Study) -> None:
        limits = [{"metric": ENERGY, "max": 0.15, "where": {"noop.size": 1}}, {"metric": SPEED, "max": 1}]
        study.write(budgets=limits, xfail=[{"where": {"noop.size": 1}, "reason": "known"}])
        # Of size 1 the experiments and the first budget pass, which nobody expected.
        study.run().assert_outcomes(passed=4, xpassed=4 + 1, xfailed=1, failed=1)
        study.run("--runxfail").assert_outcomes(passed=8 + 1, failed=2)
        run = study.run("-o", "xfail_strict=true", "-k", "budget or (size=1 and cycle=1)")
        run.assert_outcomes(failed=1 + 1 + 1, xfailed=1, deselected=7)
        run.stdout.fnmatch_lines(["*XPASS(strict)*known*"])

    def test_a_fixture_with_parameters_changes_nothing(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 0.15})
        with (study.root / "conftest.py").open("a") as file:
            file.write(
                "\nimport pytest\n@pytest.fixture(autouse=True, params=['a', 'b'])\ndef twice(request): pass\n"
            )
        study.run("-k", "not experiment", *workers).assert_outcomes(failed=4)
        study.run("-k", "budget or cycle=1", *workers).assert_outcomes(passed=4 + 2, failed=2)

    def test_reruns_come_before(
        self, study: Study, workers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What counts is the last attempt; a gate that fails is not run again."""
        pytest.importorskip("pytest_rerunfailures")
        monkeypatch.delenv("PYTEST_ADDOPTS")
        study.write({ENERGY: "0.1 * size"}, budgets={ENERGY: 0.15})
        with (study.root / "conftest.py").open("a") as file:
            file.write(
                "\nfrom pathlib import Path\nfrom pytest_llem.results.models import ErrorRecord\n"
                "def _late(job, **options):\n"
                "    tried = Path(__file__).with_name(job.identity['experiment_id'])\n"
                "    if tried.exists():\n"
                "        return _done(job, **options)\n"
                "    tried.touch()\n"
                "    return Outcome(error=ErrorRecord(kind='crash', type='X', message='no'))\n"
                "experiment.run_isolated = _late\n"
            )
        plugins = ("-p", "no:randomly", "-p", "no:random_order")
        run = study.run(*plugins, "--reruns", "2", "-v", *workers)
        assert run.parseoutcomes() == {"passed": 8 + 1, "failed": 1, "rerun": 8}
        assert [point.metrics[ENERGY].n for point in study.newest().points] == [4, 4]
        shares = [int(share) for share in re.findall(r"\[ *(\d+)%\]", run.stdout.str())]
        assert (shares, shares[-1]) == (sorted(shares), 100)

    def test_estimated_energy_decides_nothing_unless_it_may(self, study: Study) -> None:
        study.write(method="estimated", budgets={ENERGY: 0.15})
        run = study.run("-k", "size=1")
        run.assert_outcomes(passed=4, failed=1, deselected=5)
        run.stdout.fnmatch_lines(["*cannot be judged: *estimated*energy.allow_estimated: true*"])
        study.write(
            method="estimated", budgets={ENERGY: 0.15}, energy={"backend": "estimate", "allow_estimated": True}
        )
        study.run("-k", "size=1").assert_outcomes(passed=5, deselected=5)

    def test_tb_line_and_no_terminal(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run("--tb=line").stdout.fnmatch_lines(["*study.yaml:*: *is beyond 0.15 J*"])
        assert study.run("-p", "no:terminal").ret == 1


class TestOrdinaryTests:
    """Gates are passed over in the loop, and tests of other files come after them."""

    def test_they_are_set_up_as_ever(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 0.15})
        (study.root / "other").mkdir()
        (study.root / "other" / "test_other.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
        run = study.run("other", *workers)
        run.assert_outcomes(passed=9 + 2, failed=1)
        assert run.ret == 1

    def test_fixtures_that_fail_as_they_end_are_errors(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 1})
        with (study.root / "conftest.py").open("a") as file:
            for scope in ("session", "module"):
                file.write(
                    f"\nimport pytest\n@pytest.fixture(scope={scope!r}, autouse=True)\ndef of_{scope}():\n"
                    f"    yield\n    print('output of {scope}')\n    raise RuntimeError('{scope} fails')\n"
                )
        run = study.run(*workers, "--junitxml=report.xml")
        run.assert_outcomes(passed=10, errors=2 if workers else 1)  # every worker has a session
        assert run.ret == 1
        run.stdout.fnmatch_lines(["*RuntimeError: session fails", "*Captured stdout teardown*"])
        run.stdout.no_fnmatch_line("*INTERNALERROR*")
        assert len(list(ET.parse(study.root / "report.xml").iter("error"))) == (2 if workers else 1)

    def test_x_stops_where_such_a_fixture_fails(self, study: Study) -> None:
        study.write(budgets={ENERGY: 1})
        with (study.root / "conftest.py").open("a") as file:
            file.write("\nimport pytest\n@pytest.fixture(scope='module', autouse=True)\ndef one():\n")
            file.write("    yield\n    raise RuntimeError\n")
        run = study.run("-x")
        run.assert_outcomes(passed=8, errors=1)
        run.stdout.fnmatch_lines(["*2 gates not judged: the run was stopped before*"])


class TestBaselines:
    def test_what_is_saved_is_what_is_compared_with(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write()
        run = study.run("--llem-save", "main", *workers)
        run.assert_outcomes(passed=8)
        file = study.root / ".llem" / "baselines" / "main" / "noop.json"
        assert file.is_file()
        run.stdout.fnmatch_lines(["*baseline: .llem/baselines/main/noop.json"])
        run = study.run("--llem-baseline", "main", *workers)
        # Energy and speed of two points; TTFT is that of the engine's golden result, the same in all cycles.
        run.assert_outcomes(passed=8 + 6)
        assert study.newest().comparison.family == 6

    def test_a_regression_fails(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.figures({ENERGY: f"0.1 * size * {WOBBLE} * (1.2 if size == 2 else 1)", SPEED: f"100 * {WOBBLE}"})
        run = study.run("--llem-baseline", "main", *workers)
        run.assert_outcomes(passed=8 + 5, failed=1)
        run.stdout.fnmatch_lines(["REGRESSION: 1.2*", f"FAILED study.yaml::regression[[]{ENERGY}-size=2[]]*"])
        (verdict,) = [one for one in study.newest().points[1].verdicts if one.metric == ENERGY]
        assert verdict.verdict == "REGRESSION"
        assert verdict.ratio == pytest.approx(1.2)
        assert (verdict.n, verdict.reference_n) == (4, 4)

    def test_gates_that_were_not_selected_fail_nothing(self, study: Study) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.figures({ENERGY: f"0.12 * size * {WOBBLE}", SPEED: f"100 * {WOBBLE}"})
        with (study.root / "study.yaml").open("a") as file:
            file.write(f"budgets: {{{ENERGY}: 1}}\n")
        run = study.run(
            "--llem-baseline", "main", "--deselect", f"study.yaml::regression[{ENERGY}-size=1]", "-k", "not ttft"
        )
        run.assert_outcomes(passed=8 + 2 + 2, failed=1, deselected=3)
        run.stdout.fnmatch_lines(["2 REGRESSION, 4 SAME: 1 gate failed (1 more not selected, or expected to)"])

    def test_what_cannot_be_decided_is_skipped_or_fails(self, study: Study) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.figures({ENERGY: "0.1 * size * (1 + 0.05 * (-1) ** cycle)", SPEED: f"100 * {WOBBLE}"})
        run = study.run("--llem-baseline", "main", "-rs")
        run.assert_outcomes(passed=8 + 4, skipped=2)
        run.stdout.fnmatch_lines(["SKIPPED*INCONCLUSIVE*cycles would decide*"])
        study.run("--llem-baseline", "main", "--llem-fail-on", "inconclusive").assert_outcomes(passed=12, failed=2)

    def test_missing_and_new_points(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.write(sweep={"noop.size": [2, 3]})
        run = study.run("--llem-baseline", "main", *workers, "-rs")
        run.assert_outcomes(passed=8 + 3, failed=1, skipped=3)
        run.stdout.fnmatch_lines(["cannot be judged: *", "SKIPPED*new: not in the reference"])

    def test_a_partial_run_is_not_saved_unless_asked(self, study: Study) -> None:
        study.write()
        run = study.run("--llem-save", "main", "-k", "size=1")
        assert run.ret == 1
        run.stdout.fnmatch_lines(["*--llem-save: experiments not run: 4, *--llem-save-partial*"])
        assert not (study.root / ".llem").exists()
        assert study.run("--llem-save", "main", "--llem-save-partial", "-k", "size=1").ret == 0
        assert (study.root / ".llem" / "baselines" / "main" / "noop.json").is_file()

    def test_there_is_nothing_to_save_of_gates_alone(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 1})
        study.run()
        run = study.run("--llem-save", "main", "-k", "budget", *workers)
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["ERROR: --llem-save: no experiment is selected, so there is nothing to save"])

    def test_two_studies_of_one_name_are_not_saved_as_one(
        self, study: Study, write_study: Callable[..., Path]
    ) -> None:
        study.write()
        write_study("second.yaml", sweep={"noop.size": [3]})
        run = study.run("second.yaml", "--llem-save", "main")
        assert run.ret == 1
        run.stdout.fnmatch_lines(["noop: --llem-save: 2 studies of this run have that name, *"])
        assert not (study.root / ".llem").exists()

    def test_an_item_that_is_of_no_gate_does_not_go_unnoticed(self, study: Study) -> None:
        study.write(sweep={"noop.size": [1, 2, 3]})
        study.run("--llem-save", "main")
        file = study.root / ".llem" / "baselines" / "main" / "noop.json"
        # pytest tells two of one name apart by a number behind each.
        file.write_text(file.read_text().replace('"id": "size=3"', '"id": "size=2"'))
        study.write(sweep={"noop.size": [1]})
        run = study.run("--llem-baseline", "main")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["ERROR: study.yaml::regression[[]missing-size=2*: *has no such gate"])
        assert study.newest().summary.completed == 4

    def test_another_bench(self, study: Study) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.write(measurement={"length_mode": "natural", "min_window_seconds": 0})
        run = study.run("--llem-baseline", "main")
        run.assert_outcomes(passed=8, failed=6)
        run.stdout.fnmatch_lines(["*length mode*--llem-compare-anyway*"])
        run = study.run("--llem-baseline", "main", "--llem-compare-anyway")
        run.assert_outcomes(passed=8 + 6)
        assert study.newest().comparison.compared_anyway

    def test_the_plan_says_what_will_be_seen(self, study: Study) -> None:
        study.write()
        study.run("--llem-save", "main")
        run = study.run("--llem-baseline", "main", "--collect-only")
        run.stdout.fnmatch_lines(
            [
                "  gates: 4 cycles against 4 find *(*Holm over 6):",
                f"    *% of {ENERGY} where *vary by 0.6%",
            ]
        )
        run = study.run("--llem-baseline", "main", "--llem-cycles", "1")
        run.stdout.fnmatch_lines(
            ["  gates: one cycle here decides nothing: every comparison will be INCONCLUSIVE *"]
        )
        run.assert_outcomes(passed=2, skipped=6)

    def test_what_fails_may_be_said_in_the_ini_file(self, study: Study) -> None:
        study.write()
        study.run("--llem-save", "main")
        study.pytester.makeini("[pytest]\nllem_fail_on = inconclusive\n")
        study.run("--llem-baseline", "main", "--llem-cycles", "1").assert_outcomes(passed=2, failed=6)

    def test_a_saved_result_may_be_named(self, study: Study) -> None:
        study.write()
        study.run("--llem-run-id", "first")
        run = study.run("--llem-baseline=results/noop_first")
        run.assert_outcomes(passed=8 + 6)
        run.stdout.fnmatch_lines(["*llem: noop against results/noop_first*"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--llem-baseline", "nothing"), "*--llem-baseline: *nothing*"),
            (("--llem-baseline", ""), "ERROR: --llem-baseline: must not be empty"),
            (("--llem-save", "a/b"), "ERROR: --llem-save: must be a name without path separators (got 'a/b')"),
            (("--llem-save-partial",), "ERROR: --llem-save-partial: needs --llem-save"),
            (("--llem-compare-anyway",), "ERROR: --llem-compare-anyway: needs --llem-baseline or --llem-against"),
            (
                ("--llem-fail-on", "never"),
                "ERROR: --llem-fail-on: must be one of regression, inconclusive (got 'never')",
            ),
            (("--llem-against", "nowhere"), "ERROR: --llem-against: must be a Python interpreter (got 'nowhere')"),
        ],
    )
    def test_bad_options(self, study: Study, options: tuple[str, ...], message: str) -> None:
        study.write()
        run = study.run(*options)
        assert run.ret != 0
        lines = [*run.outlines, *run.errlines]
        pytest.LineMatcher(lines).fnmatch_lines([message])
        assert not study.results.root.exists()


def test_what_github_shows(study: Study, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(study.root / "summary.md"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(study.root))
    study.write(budgets={ENERGY: 0.15})
    run = study.run(*workers)
    line = (study.root / "study.yaml").read_text().splitlines().index(f"  {ENERGY}: 0.15") + 1
    run.stdout.fnmatch_lines([f"::error file=study.yaml,line={line},title=budget[[]{ENERGY}-size=2[]]::*0.15*"])
    assert f"budget[{ENERGY}-size=1]" not in "".join(one for one in run.outlines if one.startswith("::"))
    page = (study.root / "summary.md").read_text()
    assert "size=2" in page
    assert "BEYOND" in page
