"""Gates as test items: collection, selection, judgement after all experiments, and reports."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from tests.conftest import OTHER_PLUGINS, Results, RunPytest, WriteStudy
from tests.support import figures
from tests.support.study_results import saved_file

ENERGY, SPEED = "energy_per_output_token_j", "output_tokens_per_second"

#: A factor that alternates by ±0.5 % between cycles.
WOBBLE = "(1 + 0.005 * (-1) ** cycle)"


class Study:
    """A study of two points whose experiments take no time and return values that the test sets."""

    def __init__(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, run: RunPytest
    ) -> None:
        self.pytester, self._write, self.results, self.run = pytester, write_study, results, run
        self.root = pytester.path

    def write(self, figures_: dict[str, str] | None = None, method: str = "measured", **changes: Any) -> None:
        self.pytester.makeconftest(figures.conftest(method))
        self.figures(figures_ or {ENERGY: f"0.1 * size * {WOBBLE}", SPEED: f"100 * {WOBBLE}"})
        self._write(**{"sweep": {"noop.size": [1, 2]}, "execution": {"n_cycles": 4}, **changes})

    def figures(self, wanted: dict[str, str]) -> None:
        (self.root / "figures.json").write_text(json.dumps(wanted))

    def extend_conftest(self, text: str) -> None:
        with (self.root / "conftest.py").open("a") as file:
            file.write(textwrap.dedent(text))

    def mark_last_item(self, mark: str) -> None:
        self.extend_conftest(
            f"""
            def pytest_collection_modifyitems(items):
                items[-1].add_marker(pytest.mark.{mark})
            """
        )

    def directories(self) -> list[Path]:
        return [path for path in self.results.root.iterdir() if path.is_dir()]

    def newest(self) -> StudyResult:
        def started(path: Path) -> str:
            return str(json.loads((path / "manifest.json").read_text())["started_at"])

        return StudyResult.load(max(self.directories(), key=started))


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: WriteStudy, results: Results, run_pytest: RunPytest) -> Study:
    return Study(pytester, write_study, results, run_pytest)


@pytest.fixture
def saved(study: Study) -> Study:
    """A study whose baseline ``main`` is saved."""
    study.write()
    study.run("--llem-save", "main").assert_outcomes(passed=8)
    return study


class TestBudgets:
    def test_budgets_are_reported_as_items(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 0.15})
        run = study.run(*workers, "-rA", "-v", "--junitxml=report.xml")
        run.assert_outcomes(passed=8 + 1, failed=1)
        assert run.ret == 1
        run.stdout.fnmatch_lines(
            [
                f"*PASSED study.yaml::budget[[]{ENERGY}-size=1[]]*",
                f"*FAILED study.yaml::budget[[]{ENERGY}-size=2[]] - 0.200 J*",
            ]
        )
        shares = [int(line.rpartition("[")[2].rstrip("%]")) for line in run.outlines if line.endswith("%]")]
        assert (shares, shares[-1]) == (sorted(shares), 100)

        cases = {case.get("name"): case for case in ET.parse(study.root / "report.xml").iter("testcase")}
        assert len(cases) == 10
        assert cases[f"budget[{ENERGY}-size=1]"].find("failure") is None
        failed = cases[f"budget[{ENERGY}-size=2]"]
        failure = failed.find("failure")
        assert failure is not None
        assert failure.attrib["message"].startswith("0.200 J is beyond 0.15 J ")
        assert str(failure.text).startswith(f"size=2: {ENERGY}: 0.200 J is beyond 0.15 J ")
        properties = {one.attrib["name"]: one.attrib["value"] for one in failed.iter("property")}
        assert properties["llem_verdict"] == "BEYOND"
        assert float(properties["llem_mean"]) == pytest.approx(0.2)

        assert [[one.verdict for one in point.verdicts] for point in study.newest().points] == [
            ["WITHIN"],
            ["BEYOND"],
        ]
        manifest = study.results.manifest  # a failed gate is not a failed experiment
        assert (manifest["status"], manifest["completed"], manifest["failed"]) == ("completed", 8, 0)

    def test_budgets_are_selected_as_other_items(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15, SPEED: {"min": 50}})
        listed = study.run("--collect-only", "-q").outlines
        assert [line for line in listed if "::budget[" in line] == [
            f"study.yaml::budget[{metric}-size={size}]" for size in (1, 2) for metric in (ENERGY, SPEED)
        ]
        study.run("-k", "size=1").assert_outcomes(passed=4 + 2, deselected=6)
        study.run("-k", "size=1 and not budget").assert_outcomes(passed=4, deselected=8)
        study.run("-k", "cycle=1").assert_outcomes(passed=2, deselected=10)
        study.run("--deselect", f"study.yaml::budget[{ENERGY}-size=2]").assert_outcomes(passed=11, deselected=1)

    def test_budget_alone_judges_newest_result(
        self, study: Study, run_pytest: RunPytest, workers: tuple[str, ...]
    ) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run()
        run = run_pytest(*workers, files=[f"study.yaml::budget[{ENERGY}-size=2]"])
        run.assert_outcomes(failed=1)
        assert len(study.directories()) == 1, "nothing was run"
        run.stdout.fnmatch_lines(
            ["*measured in an earlier run, noop_*", "llem: 1 gate judged results of an earlier run: *"]
        )
        if not workers:
            study.run("--lf").assert_outcomes(failed=1, deselected=9)

    def test_result_without_its_experiments_is_not_judged(self, study: Study) -> None:
        study.write(budgets={ENERGY: 10.0})
        study.run()
        for file in study.results.root.glob("*/experiments/*-c1.json"):
            file.unlink()
        run = study.run("-k", "budget and size=1")
        run.assert_outcomes(failed=1, deselected=9)
        run.stdout.fnmatch_lines(
            ["*cannot be judged: measured before, and since then experiments/*-c1.json is missing*"]
        )

    def test_skipped_budget_alone_judges_no_result(self, study: Study) -> None:
        study.write(budgets={ENERGY: 10.0})
        study.run()
        study.mark_last_item("skip(reason='not now')")
        run = study.run("-k", "budget")
        run.assert_outcomes(passed=1, skipped=1, deselected=8)
        run.stdout.fnmatch_lines(["llem: 1 gate judged results of an earlier run: *"])

    def test_budget_alone_without_a_result_is_not_judged(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        run = study.run("-k", "budget and size=1")
        run.assert_outcomes(failed=1, deselected=9)
        run.stdout.fnmatch_lines(["*cannot be judged: *no completed cycle*"])

    def test_gates_of_a_point_never_measured_are_not_judged(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run("--llem-save", "main")
        for directory in study.directories():
            shutil.rmtree(directory)
        study.run("-k", "experiment and size=1").assert_outcomes(passed=4, deselected=6)
        run = study.run("--llem-baseline", "main", "-k", "size=2 and not experiment")
        run.assert_outcomes(failed=1 + 3, deselected=4 + 4 + 4)
        run.stdout.fnmatch_lines(
            ["*cannot be judged: *no experiment of the point was selected, nor measured in an earlier run"] * 4
        )
        run.stdout.no_fnmatch_line("missing: *")

    def test_gates_are_not_judged_after_dash_x(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(sweep={"noop.size": [1]}, budgets={ENERGY: 0.15})
        study.extend_conftest(
            """
            from pytest_llem.results.manifest_records import ErrorRecord

            def run(job, **options):
                return Outcome(error=ErrorRecord(kind="crash", type="X", message="no"))
            """
        )
        run = study.run("-x", *workers)
        assert run.parseoutcomes()["failed"] >= 1  # workers are a little ahead
        assert "passed" not in run.parseoutcomes()
        run.stdout.fnmatch_lines(["*1 gate not judged: the run was stopped first*"])

    def test_dash_x_stops_at_a_failed_gate(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.05})
        run = study.run("-x")
        run.assert_outcomes(passed=8, failed=1)
        run.stdout.fnmatch_lines(["*1 gate not judged: the run was stopped first*"])

    def test_marks_apply_to_budgets(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(
            budgets={ENERGY: 0.05},
            sweep={"noop.size": [1, 2, 3]},
            skip=[{"where": {"noop.size": 1}, "reason": "no memory"}],
            xfail=[{"where": {"noop.size": 2}, "reason": "known"}],
        )
        study.extend_conftest(
            """
            def pytest_collection_modifyitems(items):
                for item in items:
                    if "size=3" in item.name and "budget" in item.name:
                        item.add_marker(pytest.mark.skip(reason="not this one"))
            """
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
    def test_condition_of_a_mark_decides_for_a_budget(self, study: Study, mark: str, outcome: str) -> None:
        study.write(budgets={ENERGY: 0.05}, sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        study.mark_last_item(mark)
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
    def test_xpassed_budget_fails_where_xfail_is_strict(
        self, study: Study, mark: str, options: list[str], outcome: str
    ) -> None:
        study.write(budgets={ENERGY: 1.0}, sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        study.mark_last_item(mark)
        study.run(*options).assert_outcomes(passed=1, **{outcome: 1})

    def test_xfail_of_the_study_applies_to_its_budgets(self, study: Study) -> None:
        limits = [{"metric": ENERGY, "max": 0.15, "where": {"noop.size": 1}}, {"metric": SPEED, "max": 1}]
        study.write(budgets=limits, xfail=[{"where": {"noop.size": 1}, "reason": "known"}])
        # The experiments and the first budget of size 1 are expected to fail, but pass.
        study.run().assert_outcomes(passed=4, xpassed=4 + 1, xfailed=1, failed=1)
        study.run("--runxfail").assert_outcomes(passed=8 + 1, failed=2)
        run = study.run("-o", "xfail_strict=true", "--llem-cycles=1", "-k", "budget or size=1")
        run.assert_outcomes(failed=1 + 1 + 1, xfailed=1, deselected=1)
        run.stdout.fnmatch_lines(["*XPASS(strict)*known*"])

    def test_parametrized_fixture_multiplies_budgets(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.extend_conftest(
            """
            @pytest.fixture(autouse=True, params=["a", "b"])
            def twice(request): pass
            """
        )
        study.run("--llem-cycles=1").assert_outcomes(passed=4 + 2, failed=2)

    def test_budgets_are_judged_after_reruns(
        self, study: Study, workers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the last attempt counts; a failed gate is not rerun."""
        pytest.importorskip("pytest_rerunfailures")
        others = " ".join(f"-p no:{name}" for name in OTHER_PLUGINS if name != "rerunfailures")
        monkeypatch.setenv("PYTEST_ADDOPTS", others)
        study.write({ENERGY: "0.1 * size"}, budgets={ENERGY: 0.15})
        study.extend_conftest(
            """
            from pytest_llem.results.manifest_records import ErrorRecord

            def run(job, **options):
                tried = Path(__file__).with_name(job.identity["experiment_id"])
                if tried.exists():
                    return _done(job, **options)
                tried.touch()
                return Outcome(error=ErrorRecord(kind="crash", type="X", message="no"))
            """
        )
        run = study.run("--reruns", "2", "-v", *workers)
        assert run.parseoutcomes() == {"passed": 8 + 1, "failed": 1, "rerun": 8}
        assert [point.metrics[ENERGY].n for point in study.newest().points] == [4, 4]
        shares = [int(share) for share in re.findall(r"\[ *(\d+)%\]", run.stdout.str())]
        assert (shares, shares[-1]) == (sorted(shares), 100)

    def test_estimated_energy_is_judged_only_if_allowed(self, study: Study) -> None:
        study.write(method="estimated", budgets={ENERGY: 0.15})
        run = study.run("-k", "size=1")
        run.assert_outcomes(passed=4, failed=1, deselected=5)
        run.stdout.fnmatch_lines(["*cannot be judged: *estimated*energy.allow_estimated: true*"])
        study.write(
            method="estimated", budgets={ENERGY: 0.15}, energy={"backend": "estimate", "allow_estimated": True}
        )
        study.run("-k", "size=1").assert_outcomes(passed=5, deselected=5)

    def test_failed_budget_with_tb_line_and_without_terminal(self, study: Study) -> None:
        study.write(budgets={ENERGY: 0.15})
        study.run("--tb=line").stdout.fnmatch_lines(["*study.yaml:*: *is beyond 0.15 J*"])
        assert study.run("-p", "no:terminal").ret == 1


class TestOrdinaryTests:
    """Gates do not disturb the tests of other files, which run after them."""

    def test_tests_beside_a_study_run_as_without_it(
        self, study: Study, run_pytest: RunPytest, workers: tuple[str, ...]
    ) -> None:
        study.write(budgets={ENERGY: 0.15})
        (study.root / "other").mkdir()
        (study.root / "other" / "test_other.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
        run = run_pytest(*workers, files=["study.yaml", "other"])
        run.assert_outcomes(passed=9 + 2, failed=1)
        assert run.ret == 1

    def test_failing_fixture_teardown_is_an_error(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 1})
        for scope in ("session", "module"):
            study.extend_conftest(
                f"""
                @pytest.fixture(scope={scope!r}, autouse=True)
                def of_{scope}():
                    yield
                    print("output of {scope}")
                    raise RuntimeError("{scope} fails")
                """
            )
        run = study.run(*workers, "--junitxml=report.xml")
        run.assert_outcomes(passed=10, errors=1)
        assert run.ret == 1
        run.stdout.fnmatch_lines(["*RuntimeError: session fails", "*Captured stdout teardown*"])
        run.stdout.no_fnmatch_line("*INTERNALERROR*")
        assert len(list(ET.parse(study.root / "report.xml").iter("error"))) == 1

    def test_dash_x_stops_at_a_failing_module_teardown(self, study: Study) -> None:
        study.write(budgets={ENERGY: 1})
        study.extend_conftest(
            """
            @pytest.fixture(scope="module", autouse=True)
            def one():
                yield
                raise RuntimeError
            """
        )
        run = study.run("-x")
        run.assert_outcomes(passed=8, errors=1)
        run.stdout.fnmatch_lines(["*2 gates not judged: the run was stopped first*"])


class TestBaselines:
    def test_unchanged_code_passes_against_its_baseline(self, study: Study) -> None:
        study.write()
        run = study.run("--llem-save", "main")
        run.assert_outcomes(passed=8)
        assert saved_file(study.root, "main", "noop").is_file()
        run.stdout.fnmatch_lines(["*baseline: .llem/baselines/main/*-cpus/noop.json"])
        run = study.run("--llem-baseline", "main")
        # Energy and speed of two points; TTFT is the golden result's, the same in all cycles.
        run.assert_outcomes(passed=8 + 6)
        comparison = study.newest().comparison
        assert comparison is not None
        assert comparison.family == 6

    def test_regression_fails(self, saved: Study, workers: tuple[str, ...]) -> None:
        saved.figures({ENERGY: f"0.1 * size * {WOBBLE} * (1.2 if size == 2 else 1)", SPEED: f"100 * {WOBBLE}"})
        run = saved.run("--llem-baseline", "main", "--llem-save", "slower", *workers)
        run.assert_outcomes(passed=8 + 5, failed=1)
        assert saved_file(saved.root, "slower", "noop").is_file()
        run.stdout.fnmatch_lines(
            [
                f"size=2: {ENERGY}: 1.200 × the reference: REGRESSION (δ = 2 %, *",
                f"FAILED study.yaml::regression[[]{ENERGY}-size=2[]] - 1.2*",
            ]
        )
        (verdict,) = [one for one in saved.newest().points[1].verdicts if one.metric == ENERGY]
        assert verdict.verdict == "REGRESSION"
        assert verdict.ratio == pytest.approx(1.2)
        assert (verdict.n, verdict.reference_n) == (4, 4)
        line = 1 + (saved.root / "study.yaml").read_text().splitlines().index("sweep:")  # it has no gates:
        assert (verdict.file, verdict.line) == ("study.yaml", line)

    def test_gates_not_selected_fail_nothing(self, saved: Study) -> None:
        saved.figures({ENERGY: f"0.12 * size * {WOBBLE}", SPEED: f"100 * {WOBBLE}"})
        with (saved.root / "study.yaml").open("a") as file:
            file.write(f"budgets: {{{ENERGY}: 1}}\n")
        run = saved.run(
            "--llem-baseline", "main", "--deselect", f"study.yaml::regression[{ENERGY}-size=1]", "-k", "not ttft"
        )
        run.assert_outcomes(passed=8 + 2 + 2, failed=1, deselected=3)
        run.stdout.fnmatch_lines(
            ["2 REGRESSION, 4 SAME: 1 gate failed (1 more not selected, or expected to fail)"]
        )

    def test_inconclusive_is_skipped_unless_fail_on_inconclusive(self, saved: Study) -> None:
        saved.figures({ENERGY: "0.1 * size * (1 + 0.05 * (-1) ** cycle)", SPEED: f"100 * {WOBBLE}"})
        run = saved.run("--llem-baseline", "main", "-rs")
        run.assert_outcomes(passed=8 + 4, skipped=2)
        run.stdout.fnmatch_lines(["SKIPPED*INCONCLUSIVE*cycles would decide*"])
        saved.run("--llem-baseline", "main", "--llem-fail-on", "inconclusive").assert_outcomes(passed=12, failed=2)
        saved.pytester.makeini("[pytest]\nllem_fail_on = inconclusive\n")
        saved.run("--llem-baseline", "main").assert_outcomes(passed=12, failed=2)

    def test_missing_point_fails_and_new_point_is_skipped(self, saved: Study) -> None:
        saved.write(sweep={"noop.size": [2, 3]})
        run = saved.run("--llem-baseline", "main", "-rs")
        run.assert_outcomes(passed=8 + 3, failed=1, skipped=3)
        run.stdout.fnmatch_lines(["*cannot be judged: *", "SKIPPED*new: not in the reference"])

    def test_partial_run_is_saved_only_if_asked(self, study: Study) -> None:
        study.write()
        run = study.run("--llem-save", "main", "-k", "size=1")
        assert run.ret == 1
        run.stdout.fnmatch_lines(["*--llem-save: experiments not run: 4: *--llem-save-partial*"])
        assert not (study.root / ".llem").exists()
        assert study.run("--llem-save", "main", "--llem-save-partial", "-k", "size=1").ret == 0
        assert saved_file(study.root, "main", "noop").is_file()

    def test_save_without_experiments_is_refused(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(budgets={ENERGY: 1})
        run = study.run("--llem-save", "main", "-k", "budget", *workers)
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["ERROR: --llem-save: no experiment is selected, so there is nothing to save"])

    def test_two_studies_of_one_name_are_not_saved(
        self, study: Study, run_pytest: RunPytest, write_study: WriteStudy
    ) -> None:
        study.write()
        write_study("second.yaml", sweep={"noop.size": [3]})
        run = run_pytest("--llem-save", "main", files=["study.yaml", "second.yaml"])
        assert run.ret == 1
        run.stdout.fnmatch_lines(["noop: --llem-save: 2 studies have this name, *"])
        assert not (study.root / ".llem").exists()

    def test_item_without_a_gate_is_an_error(self, study: Study) -> None:
        study.write(sweep={"noop.size": [1, 2, 3]})
        study.run("--llem-save", "main")
        file = saved_file(study.root, "main", "noop")
        # pytest appends a number to the ids of items with the same name.
        file.write_text(file.read_text().replace('"id": "size=3"', '"id": "size=2"'))
        study.write(sweep={"noop.size": [1]})
        run = study.run("--llem-baseline", "main")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(
            ["ERROR: study.yaml::regression[[]missing-size=2*: neither the study nor its reference has *"]
        )
        assert study.newest().summary.completed == 4

    def test_different_workload_is_compared_only_if_asked(self, saved: Study) -> None:
        saved.write(measurement={"length_mode": "natural", "min_window_seconds": 0})
        run = saved.run("--llem-baseline", "main")
        run.assert_outcomes(passed=8, failed=6)
        run.stdout.fnmatch_lines(["*length mode*--llem-compare-mismatch*"])
        run = saved.run("--llem-baseline", "main", "--llem-compare-mismatch")
        run.assert_outcomes(passed=8 + 6)
        comparison = saved.newest().comparison
        assert comparison is not None
        assert comparison.compared_despite_mismatch

    def test_plan_shows_minimum_detectable_effect(self, saved: Study) -> None:
        run = saved.run("--llem-baseline", "main", "--collect-only")
        run.stdout.fnmatch_lines(
            [
                "  gates: 4 cycles against 4 detect *(*Holm over 6):",
                f"    *% of {ENERGY} if *vary by 0.6%",
            ]
        )
        run = saved.run("--llem-baseline", "main", "--llem-cycles", "auto", "--collect-only")
        run.stdout.fnmatch_lines(["  gates: up to 20 cycles against 4, judged 9 times, detect *(*Holm over 6):"])
        run = saved.run("--llem-baseline", "main", "--llem-cycles", "1")
        run.stdout.fnmatch_lines(
            ["  gates: no comparison can be decided: that needs 2 cycles, and the candidate has 1 (*"]
        )
        run.assert_outcomes(passed=2, skipped=6)

    def test_results_directory_serves_as_baseline(self, study: Study) -> None:
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
            (
                ("--llem-compare-mismatch",),
                "ERROR: --llem-compare-mismatch: needs --llem-baseline or --llem-against",
            ),
            (
                ("--llem-fail-on", "never"),
                "ERROR: --llem-fail-on: must be one of regression, inconclusive (got 'never')",
            ),
            (
                ("--llem-against", "nowhere"),
                "ERROR: --llem-against: must be git:REVISION or a Python interpreter (got 'nowhere')",
            ),
        ],
    )
    def test_invalid_options_are_refused(self, study: Study, options: tuple[str, ...], message: str) -> None:
        study.write()
        run = study.run(*options)
        assert run.ret != 0
        lines = [*run.outlines, *run.errlines]
        pytest.LineMatcher(lines).fnmatch_lines([message])
        assert not study.results.root.exists()


def test_github_annotation_and_summary_of_a_failed_budget(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(study.root / "summary.md"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(study.root))
    study.write(budgets={ENERGY: 0.15})
    run = study.run()
    line = (study.root / "study.yaml").read_text().splitlines().index(f"  {ENERGY}: 0.15") + 1
    run.stdout.fnmatch_lines([f"::error file=study.yaml,line={line},title=budget[[]{ENERGY}-size=2[]]::*0.15*"])
    assert f"budget[{ENERGY}-size=1]" not in "".join(one for one in run.outlines if one.startswith("::"))
    page = (study.root / "summary.md").read_text()
    assert "size=2" in page
    assert "BEYOND" in page
