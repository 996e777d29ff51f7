"""The outcome of a run of pytest: items, manifest, results, table, exit status."""

from __future__ import annotations

import hashlib
import json
import os
import re
import xml.etree.ElementTree as ET

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.terminal import summary as terminal
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.marks import slow


def test_every_experiment_is_an_item_and_is_recorded(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    workers: tuple[str, ...],
) -> None:
    write_study()
    run = run_pytest(*workers)
    run.assert_outcomes(passed=8)
    assert run.ret == 0

    manifest = results.manifest
    assert manifest["status"] == "completed"
    assert (manifest["total_experiments"], manifest["completed"], manifest["pending"]) == (8, 8, 0)
    assert manifest["environment"]["python"]
    for entry in manifest["experiments"]:
        file = results.directory / entry["result_file"]
        assert file.name == f"{entry['config_hash']}-c{entry['cycle']}.json"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["result_sha256"]
        assert entry["started_at"] <= entry["completed_at"]
        assert entry["attempt"] == 1
        assert (entry["worker"] is None) == (not workers)
        experiment = ExperimentResult.model_validate_json(file.read_text())
        assert experiment.identity.experiment_id == entry["experiment_id"]
        assert set(experiment.metrics) == set(CATALOGUE)
        assert file.with_suffix(".requests.csv").read_text().count("\n") == 1 + 2 * (experiment.window.passes or 0)

    result = StudyResult.load(results.directory)
    assert [point.id for point in result.points] == [
        f"precision={precision}-size={size}" for precision in ("bf16", "fp32") for size in (1, 2)
    ]
    assert all(point.metrics["seconds"].n == 2 for point in result.points)
    assert result.summary.completed == 8
    assert result.summary.method == "estimated"
    assert len(result.result_files) == 8
    assert (results.directory / "study.yaml").read_text() == (pytester.path / "study.yaml").read_text()
    assert (results.root / ".gitignore").read_text() == "*\n"


def test_table_shows_results_and_their_directory(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study()
    run = run_pytest()
    run.stdout.fnmatch_lines(
        [
            "llem: noop [[]????????????????[]]: 4 points × 2 cycles = 8 experiments, shuffled, *",
            "*= llem: noop =*",
            "*TTFT p50*J/out token*",
            "*precision * size * n *out tok/s*ms*estimated*",
            "*bf16 * 1 * 2 *",
            "8 of 8 experiments completed",
            "note: energy is estimated from CPU time, not measured",
            f"results: results/{results.directory.name}",
        ]
    )
    table = run.outlines[next(at for at, line in enumerate(run.outlines) if "= llem: noop =" in line) :]
    assert max(map(len, table)) <= 80


def test_failed_experiment_is_recorded_and_the_rest_runs(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results, workers: tuple[str, ...]
) -> None:
    write_study(sweep={"noop.fault": ["raise", "none", "kill"]}, execution={"n_cycles": 1})
    run = run_pytest(*workers)
    run.assert_outcomes(passed=1, failed=2)
    assert run.ret == 1
    assert results.manifest["status"] == "completed"
    assert results.statuses() == {"fault=raise": "failed", "fault=none": "completed", "fault=kill": "failed"}
    errors = {entry["experiment_id"]: entry["error"] for entry in results.manifest["experiments"]}
    assert errors["fault=raise"]["kind"] == "exception"
    assert errors["fault=raise"]["type"] == "ValueError"
    assert errors["fault=kill"]["kind"] == "crash"
    assert errors["fault=kill"]["type"] == "SIGKILL"
    assert results.study_result["summary"]["failed"] == 2
    failed = [point for point in results.study_result["points"] if point["id"] == "fault=raise"]
    assert failed[0]["metrics"]["seconds"] | {"unit": "s"} == {
        **dict.fromkeys(
            ("mean", "sd", "cv", "ci95", "method", "boundary", "covers_engine", "invalid", "not_judged")
        ),
        "n": 0,
        "unit": "s",
        "shared": False,
        "reason": "no completed cycle",
        "values": [],
    }
    run.stdout.fnmatch_lines(["*exception while measuring: ValueError: the engine says no*"])
    run.stdout.fnmatch_lines(["raise * 0 of 1 * - *"])


def test_manifest_is_current_while_the_study_runs(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(execution={"n_cycles": 1, "cycle_order": "sequential"})
    pytester.makeconftest(
        """
        import json, pathlib
        seen = []

        def pytest_runtest_call(item):
            (manifest,) = pathlib.Path("results").glob("*/manifest.json")
            seen.append([entry["status"] for entry in json.loads(manifest.read_text())["experiments"]])

        def pytest_llem_experiment_finished(result):
            seen.append(result.identity.experiment_id)

        def pytest_llem_study_finished(study_result, directory):
            seen.append([study_result.name, (directory / "study_result.json").is_file()])
            pathlib.Path("seen.json").write_text(json.dumps(seen))
        """
    )
    run_pytest().assert_outcomes(passed=4)
    ids = [f"precision={precision}-size={size}" for precision in ("bf16", "fp32") for size in (1, 2)]
    expected = []
    for index, one in enumerate(ids):
        expected += [["completed"] * index + ["running"] + ["pending"] * (3 - index), one]
    assert json.loads((pytester.path / "seen.json").read_text()) == [*expected, ["noop", True]]


def test_deselected_experiments_are_recorded_as_deselected(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results, workers: tuple[str, ...]
) -> None:
    write_study()
    run = run_pytest("-k", "size=2 and cycle=1", *workers)
    run.assert_outcomes(passed=2, deselected=0 if workers else 6)
    statuses = results.statuses()
    assert sorted(statuses.values()) == ["completed"] * 2 + ["deselected"] * 6
    assert all("size=2-cycle=1" in one for one, status in statuses.items() if status == "completed")
    assert results.study_result["summary"]["total"] == 2
    table = run.stdout.str().partition("= llem: noop =")[2]
    assert re.findall(r"^(?:[P~] +)?(bf16|fp32) +1 ", table, re.MULTILINE) == ["bf16", "fp32"]


def test_junit_holds_metrics(pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy) -> None:
    write_study(execution={"n_cycles": 1})
    run_pytest("--junitxml=junit.xml").assert_outcomes(passed=4)
    case = ET.parse(pytester.path / "junit.xml").find(".//testcase")
    assert case is not None
    properties = {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
    assert float(properties["llem_output_tokens_per_second"]) > 0
    assert properties["llem_energy_method"] == "estimated"


def test_two_studies_and_an_ordinary_test_run_together(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study("a.yaml", name="a")
    write_study("b.yaml", name="b", sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makepyfile(test_plain="def test_plain(): pass")
    run = run_pytest(files=["a.yaml", "test_plain.py", "b.yaml"])
    run.assert_outcomes(passed=10)
    names = sorted(path.name.partition("_")[0] for path in results.root.iterdir() if path.is_dir())
    assert names == ["a", "b"]


def test_runs_of_the_same_id_get_directories_of_their_own(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    for _ in range(2):
        run = run_pytest("--llem-run-id", "same")
        run.assert_outcomes(passed=1)
    names = sorted(path.name for path in results.root.iterdir() if path.is_dir())
    assert names == ["noop_same", "noop_same-2"]


def test_results_directory_from_ini_and_option(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeini("[pytest]\nllem_results_dir = from-ini")
    run_pytest().assert_outcomes(passed=1)
    assert list((pytester.path / "from-ini").glob("noop_*/study_result.json"))
    run_pytest("--llem-results-dir=given").assert_outcomes(passed=1)
    assert list((pytester.path / "given").glob("noop_*/study_result.json"))


@pytest.mark.parametrize("run_id", ["../up", "a/b", "", ".."])
def test_run_id_with_path_separators_is_refused(
    run_pytest: RunPytest, write_study: WriteStudy, run_id: str
) -> None:
    write_study()
    run = run_pytest(f"--llem-run-id={run_id}")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: --llem-run-id: must be a name without path separators (got {run_id!r})"])


def test_unusable_results_directory_is_refused_before_the_run(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study()
    (pytester.path / "results").write_text("a file in the way")
    run = run_pytest()
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["ERROR: *results: results cannot be written: *"])


def test_run_that_cannot_start_leaves_nothing_to_resume(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    fields = {"sweep": {"n": [1]}, "execution": {"n_cycles": 1}}
    write_study("a.yaml", name="a", **fields)
    write_study("b.yaml", name="b", output_dir="file/x", **fields)
    (pytester.path / "file").touch()
    assert run_pytest(files=["a.yaml"]).ret == 0
    assert run_pytest(files=["a.yaml", "b.yaml"]).ret == pytest.ExitCode.USAGE_ERROR
    assert results.directory.is_dir(), "the only one"
    run_pytest("--llem-resume", "-v", files=["a.yaml"]).stdout.fnmatch_lines(["*REPLAYED*"])


def test_result_that_cannot_be_saved_is_a_failure(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1, "cycle_order": "sequential"})
    pytester.makeconftest(
        """
        import pathlib

        def pytest_runtest_call(item):
            (manifest,) = pathlib.Path("results").glob("*/manifest.json")
            blocker = manifest.parent / "experiments"
            if "n=1" in item.name:
                blocker.write_text("a file in the way")
            else:
                blocker.unlink()
        """
    )
    run = run_pytest()
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["*the result could not be saved: *"])
    assert results.statuses() == {"n=1": "failed", "n=2": "completed"}
    assert results.manifest["experiments"][0]["result_file"] is None


@pytest.mark.parametrize("change", ["path.unlink()", "path.write_text(path.read_text() + ' ')"])
def test_result_changed_during_the_run_is_reported_as_lost(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    change: str,
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1, "cycle_order": "sequential"})
    pytester.makeconftest(
        """
        import pathlib

        def pytest_llem_experiment_finished(result):
            if result.identity.experiment_id == "n=1":
                for path in pathlib.Path("results").glob("*/experiments/*.json"):
                    CHANGE
        """.replace("CHANGE", change)
    )
    run = run_pytest()
    assert results.statuses() == {"n=1": "failed", "n=2": "completed"}
    entry = results.manifest["experiments"][0]
    assert (entry["error"]["type"], entry["result_file"]) == ("ResultLost", None)
    assert len(results.study_result["result_files"]) == 1
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    run.stdout.fnmatch_lines(["1 of 2 experiments completed, 1 failed", "noop: experiments/* is missing, or*"])


def test_deleted_results_directory_fails_the_run(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import shutil

        def pytest_runtest_call(item):
            shutil.rmtree("results", ignore_errors=True)
        """
    )
    run = run_pytest()
    run.assert_outcomes(failed=2)
    assert run.ret == 1
    assert "INTERNALERROR" not in run.stdout.str()
    run.stdout.fnmatch_lines(["noop: the study's result could not be saved: *"])


@pytest.mark.parametrize(
    ("gate", "workers"),
    [
        ("pytest.fail('too dear')", ()),
        ("raise ValueError('too dear')", ()),
        slow("raise ValueError('too dear')", ("-n", "1")),
    ],
    ids=["fail", "raise", "raise-xdist"],
)
def test_hook_may_fail_an_item(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    gate: str,
    workers: tuple[str, ...],
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        f"""
        import pytest

        def pytest_llem_experiment_finished(result):
            if result.identity.axes["n"] == 2:
                {gate}
        """
    )
    run = run_pytest(*workers)
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["pytest_llem_experiment_finished: *too dear"])
    assert set(results.statuses().values()) == {"completed"}, "a failed gate is not a failed experiment"


def test_hook_failure_fails_the_run_despite_xfail(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, workers: tuple[str, ...]
) -> None:
    write_study(
        sweep={"n": [1, 2]},
        execution={"n_cycles": 1},
        xfail=[{"where": {"n": 2}, "reason": "known"}],
    )
    pytester.makeconftest(
        """
        import pytest

        def pytest_llem_experiment_finished(result):
            if result.identity.axes["n"] == 2:
                pytest.fail("too dear")
        """
    )
    run = run_pytest(*workers)
    run.assert_outcomes(passed=1, failed=1)
    assert run.ret == pytest.ExitCode.TESTS_FAILED


def test_failing_hook_keeps_another_exit_status(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pytest

        def pytest_llem_experiment_finished(result):
            pytest.exit("enough", 7)

        def pytest_llem_study_finished(study_result):
            pytest.fail("too dear")
        """
    )
    run = run_pytest()
    run.stdout.fnmatch_lines(["noop: pytest_llem_study_finished: too dear"])
    assert run.ret == 7


def test_hook_may_fail_the_run(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest("def pytest_llem_study_finished(study_result, directory): raise ValueError('too dear')")
    run = run_pytest()
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    run.stdout.fnmatch_lines(
        ["1 of 1 experiment completed", "noop: pytest_llem_study_finished: ValueError: too dear"]
    )


def test_warning_names_the_experiments_it_concerns(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    warmup = {"n_warmup": 1, "max_prompts": 3, "window_size": 2, "min_prompts": 2, "cv_threshold": 1e-9}
    write_study(sweep={"warmup.enabled": [False, True], "n": [1, 2]}, warmup=warmup, execution={"n_cycles": 1})
    run_pytest().assert_outcomes(passed=4)
    unsettled, estimated = StudyResult.load(results.directory).warnings
    assert (unsettled.code, estimated.code) == ("warmup_not_converged", "energy_estimated"), (
        "the worst comes first"
    )
    assert str(estimated) == "energy is estimated from CPU time, not measured"
    assert str(unsettled).startswith("warm-up stopped after 3 runs before latencies settled (enabled=true-n=")
    assert str(unsettled).endswith(" and 1 more)")
    assert len(unsettled.experiments) == 2


def test_experiment_is_identified_independently_of_item_name(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(autouse=True, params=["a", "b"])
        def twice(request): pass
        """
    )
    run = run_pytest()
    run.assert_outcomes(passed=4)
    assert results.statuses() == {"n=1": "completed", "n=2": "completed"}
    run.stdout.fnmatch_lines(["2 of 2 experiments completed"])


def test_ordinary_test_of_the_same_name_is_not_an_experiment(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    workers: tuple[str, ...],
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makepyfile(test_e="import pytest\n@pytest.mark.parametrize('x', [1, 2])\ndef experiment(x): pass")
    options = ("-o", "python_functions=experiment", *workers)
    if not workers:
        run_pytest(*options, files=["test_e.py"]).assert_outcomes(passed=2)
    run_pytest(*options, files=["test_e.py", "study.yaml"]).assert_outcomes(passed=3)
    assert results.manifest["status"] == "completed"


def test_study_in_a_directory_with_colons(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study("s.study.yaml", sweep={"n": [1]}, execution={"n_cycles": 1})
    (pytester.path / "a::b").mkdir()
    (pytester.path / "s.study.yaml").rename(pytester.path / "a::b" / "s.study.yaml")
    run_pytest(files=[]).assert_outcomes(passed=1)
    assert results.manifest["completed"] == 1


def test_nan_metric_fails_only_its_experiment(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.fault": ["nan", "none"]}, execution={"n_cycles": 1})
    run = run_pytest()
    run.assert_outcomes(passed=1, failed=1)
    assert results.statuses() == {"fault=nan": "failed", "fault=none": "completed"}


def test_existing_results_directory_gets_no_gitignore(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    run = run_pytest("--llem-results-dir=.")
    run.assert_outcomes(passed=1)
    assert not (pytester.path / ".gitignore").exists()


@pytest.mark.parametrize("option", ["--setup-plan", "--setup-only"])
def test_setup_plan_and_setup_only_record_nothing(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, option: str
) -> None:
    write_study()
    run_pytest(option)
    assert not (pytester.path / "results").exists()


def test_user_properties_of_other_plugins_are_kept(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(autouse=True)
        def host(request):
            request.node.user_properties.append(("mine", "kept"))
        """
    )
    run_pytest("--junitxml=junit.xml").assert_outcomes(passed=1)
    names = [one.get("name") for one in ET.parse(pytester.path / "junit.xml").iter("property")]
    assert "mine" in names
    assert "llem_seconds" in names


def test_failing_fixture_is_recorded_as_the_experiments_error(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(autouse=True)
        def broken(): raise RuntimeError("setup boom")
        """
    )
    run_pytest().assert_outcomes(errors=1)
    error = results.manifest["experiments"][0]["error"]
    assert (error["kind"], error["message"], error["phase"]) == ("exception", "RuntimeError: setup boom", "setup")


@pytest.mark.slow
def test_study_changed_while_xdist_starts_is_a_usage_error(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study()
    pytester.makeconftest(
        """
        import pathlib

        def pytest_collection_finish(session):
            if hasattr(session.config, "workerinput"):
                pathlib.Path("study.yaml").write_text("garbage: [")
        """
    )
    # In a process of its own, where the controller takes longer to start than the worker to collect.
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-n", "1")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert "INTERNALERROR" not in run.stdout.str() + run.stderr.str()
    run.stderr.fnmatch_lines(["ERROR: *study.yaml:1:11: not valid YAML: *"])


@pytest.mark.slow
def test_table_on_a_terminal_without_unicode(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_study(execution={"n_cycles": 1})
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-start-method=forkserver")
    run.assert_outcomes(passed=4)
    assert max(map(len, run.outlines[-10:])) <= 100


def test_collect_only_runs_and_writes_nothing(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(execution={"n_cycles": 1, "cycle_order": "sequential"})
    run = run_pytest("--collect-only", "-q")
    assert run.outlines[:4] == [
        f"study.yaml::experiment[precision={precision}-size={size}]"
        for precision in ("bf16", "fp32")
        for size in (1, 2)
    ]
    assert not (pytester.path / "results").exists()


def test_results_contain_no_host_user_or_token(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    run_pytest().assert_outcomes(passed=1)
    everything = "".join(path.read_text() for path in results.directory.rglob("*.json"))
    for private in ("hf_secret_of_mine", os.uname().nodename, str(pytester.path)):
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", everything)


def test_long_table_is_cut_and_keeps_completed_points(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    monkeypatch: pytest.MonkeyPatch,
    write_study: WriteStudy,
) -> None:
    write_study(sweep={"noop.fault": ["raise", "memory", "none"]}, execution={"n_cycles": 1})
    monkeypatch.setattr(terminal, "MAX_POINTS", 1)
    run = run_pytest()
    table = run.stdout.str().partition("= llem: noop =")[2].partition("more points")[0]
    assert "\nnone " in table
    assert "\nraise " not in table
    run.stdout.fnmatch_lines(["2 more points in summary.csv", "1 of 3 experiments completed, 2 failed"])


@pytest.mark.parametrize(
    ("option", "kept"), [("-rfE", False), slow("-ra", False), ("-rP", True), slow("-rA", True)]
)
def test_output_of_passed_experiments_is_kept_only_if_shown(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, option: str, kept: bool
) -> None:
    write_study(sweep={"noop.fault": ["shout"]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pathlib

        def pytest_runtest_logreport(report):
            if report.when == "call":
                kept = sum("experiment output" in name for name, _ in report.sections)
                pathlib.Path("kept").write_text(str(kept))
        """
    )
    run = run_pytest(option)
    run.assert_outcomes(passed=1)
    assert (pytester.path / "kept").read_text() == str(int(kept))
    assert ("the last words" in run.stdout.str()) == kept


@pytest.mark.parametrize(
    ("ending", "options"),
    [("assert 0", ()), ("pytest.skip('later')", ()), slow("os.kill(os.getpid(), 9)", ("-n", "1"))],
    ids=["error", "skip", "killed worker"],
)
def test_failing_teardown_keeps_the_result_or_error(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    ending: str,
    options: tuple[str, ...],
) -> None:
    write_study(sweep={"noop.fault": ["none", "raise"]}, execution={"n_cycles": 1, "max_consecutive_failures": 2})
    pytester.makeconftest(
        f"""
        import os
        import pytest

        @pytest.fixture(autouse=True)
        def fixture():
            yield
            {ending}
        """
    )
    run = run_pytest(*options)
    assert results.statuses() == {"fault=none": "completed", "fault=raise": "failed"}
    assert len(results.study_result["result_files"]) == 1
    assert [one["error"]["type"] for one in results.manifest["experiments"] if one["error"]] == ["ValueError"]
    assert len([line for line in run.outlines if re.search(r"llem: \d/2 ", line)]) == 2, "one line each"
    assert "experiments in a row failed" not in run.stdout.str(), "one failure is counted once"


@pytest.mark.parametrize(
    "hook", ["pytest_llem_experiment_finished(result)", "pytest_llem_study_finished(study_result)"]
)
@pytest.mark.parametrize("raised", ["pytest.skip('no')", slow("raise SystemExit('no')")])
def test_session_continues_after_any_exception_of_a_hook(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    hook: str,
    raised: str,
) -> None:
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.makeconftest(f"import pytest\n\ndef {hook}:\n    {raised}\n")
    run = run_pytest()
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in run.stdout.str()
    assert results.manifest["completed"] == 2


@pytest.mark.parametrize(
    "plugin", ["debugging", *map(slow, ("setuponly", "setupplan", "capture", "junitxml", "skipping"))]
)
def test_run_without_one_of_pytests_own_plugins(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results, plugin: str
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    run = run_pytest("-p", f"no:{plugin}")
    run.assert_outcomes(passed=1)
