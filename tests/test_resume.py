"""``--llem-resume``: what an earlier run has completed is replayed, the rest runs, and nothing else is mixed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from tests.conftest import Results
from tests.support.processes import wait_until


class Study:
    """A study of which the first run went wrong: two points of four failed."""

    def __init__(self, pytester: pytest.Pytester, write_study: Any, results: Any) -> None:
        self.pytester, self._write, self.results = pytester, write_study, results
        self.notes = pytester.path / "notes"
        self.notes.mkdir()
        (pytester.path / "broken").touch()

    def write(self, **changes: Any) -> None:
        self._write(
            **{
                "noop": {"report": str(self.notes), "break": str(self.pytester.path / "broken")},
                "sweep": {"n": [1, 2], "noop.fault": ["none", "raise while broken"]},
                "execution": {"n_cycles": 1, "cycle_order": "sequential"},
                **changes,
            }
        )

    def run(self, *options: Any) -> Any:
        return self.pytester.runpytest_subprocess("study.yaml", "-p", "llem", *options)

    def repair(self) -> None:
        (self.pytester.path / "broken").unlink()

    def started(self) -> Any:
        """How many experiments have had a process so far."""
        return len(list(self.notes.iterdir()))

    def directories(self) -> Any:
        """Return the results directories, the oldest first."""
        found = [path for path in self.results.root.iterdir() if path.is_dir()]
        return sorted(found, key=lambda path: json.loads((path / "manifest.json").read_text())["started_at"])


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results) -> Study:
    return Study(pytester, write_study, results)


@pytest.fixture(params=[(), ("-n", "2")], ids=["serial", "xdist"])
def workers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def _manifest(directory: Any) -> Any:
    return json.loads((directory / "manifest.json").read_text())


class TestReplays:
    def test_what_is_done_stays_and_the_rest_runs(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write()
        study.run().assert_outcomes(passed=2, failed=2)
        study.repair()
        assert study.started() == 4

        run = study.run("--llem-resume", "-v", "--junitxml=junit.xml", *workers)
        run.assert_outcomes(passed=4)
        assert study.started() == 6, "two of four had to be run"
        first, second = study.directories()
        manifest = _manifest(second)
        assert manifest["status"] == "completed"
        replayed = {entry["experiment_id"]: entry["replayed_from"] for entry in manifest["experiments"]}
        assert replayed == {
            "n=1-fault=none": first.name,
            "n=1-fault=raise%20while%20broken": None,
            "n=2-fault=none": first.name,
            "n=2-fault=raise%20while%20broken": None,
        }
        for entry in manifest["experiments"]:
            file = second / entry["result_file"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["result_sha256"]
            assert file.with_suffix(".requests.csv").is_file()
            if entry["replayed_from"]:
                assert file.read_bytes() == (first / entry["result_file"]).read_bytes()

        result = StudyResult.load(second)
        assert (result.summary.completed, result.summary.replayed, result.summary.failed) == (4, 2, 0)
        assert all(point.metrics["seconds"].n == 1 for point in result.points)
        run.stdout.fnmatch_lines(
            [
                "*4 points, 2 replayed, *",
                f"  resume: 2 from results/{first.name} (measured *)",
                "4 of 4 experiments completed (2 of them replayed)",
            ]
        )
        assert run.stdout.str().count("REPLAYED") == 2
        cases = ET.parse(study.pytester.path / "junit.xml").iter("testcase")
        properties = [{one.get("name"): one.get("value") for one in case.iter("property")} for case in cases]
        assert sorted("llem_replayed_from" in one for one in properties) == [False, False, True, True]
        assert all("llem_seconds" in one for one in properties)

    def test_the_hook_is_told_of_each(self, study: Study) -> None:
        study.write()
        study.run()
        study.pytester.makeconftest(
            "def pytest_llem_experiment_finished(result): print('told', result.identity.experiment_id)"
        )
        run = study.run("--llem-resume", "-s")
        assert run.stdout.str().count("told n=") == 2

    def test_again_and_again(self, study: Study) -> None:
        """The newest run holds what it replayed, so that the one before is not needed any more."""
        study.write()
        study.run()
        study.run("--llem-resume").assert_outcomes(passed=2, failed=2)
        study.repair()
        study.run("--llem-resume").assert_outcomes(passed=4)
        study.run("--llem-resume").assert_outcomes(passed=4)
        assert study.started() == 4 + 2 + 2

    def test_an_older_one_by_name(self, study: Study) -> None:
        study.write()
        study.run("--llem-run-id=first")
        study.repair()
        study.run("--llem-run-id=second").assert_outcomes(passed=4)
        study.run("--llem-resume-from", "results/noop_first").assert_outcomes(passed=4)
        assert study.started() == 4 + 4 + 2

    def test_more_cycles_are_added(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        study.run("--llem-resume", "--llem-cycles=3").assert_outcomes(passed=6)
        assert study.started() == 6

    def test_with_a_selection(self, study: Study) -> None:
        study.write()
        study.run()
        run = study.run("--llem-resume", "-k", "n=2 and fault=none")
        run.assert_outcomes(passed=1, deselected=3)
        assert study.started() == 4

    def test_with_nothing_there_all_runs(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(["  resume: nothing is there to replay"])

    def test_what_a_resumed_run_did_not_get_to_is_taken_from_the_one_before(self, study: Study) -> None:
        """After -k or -x the newest results are not all that there is."""
        study.write()
        study.run("--llem-run-id=first")
        study.repair()
        study.run("--llem-resume", "-k", "n=2", "--llem-run-id=second").assert_outcomes(passed=2, deselected=2)
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=4)
        assert study.started() == 4 + 1 + 1
        run.stdout.fnmatch_lines(["  resume: 1 from results/noop_first (*), 2 from results/noop_second (*)"])

    def test_of_results_that_were_measured_twice_the_newer_one_counts(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=first")
        study.run("--llem-run-id=second")
        study.run("--llem-resume").stdout.fnmatch_lines(["  resume: 1 from results/noop_second (*)"])

    def test_another_study_of_the_same_design_comes_second(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=mine")
        study.write(name="other", sweep={"n": [1]})
        study.run("--llem-run-id=later")
        study.write(sweep={"n": [1]})
        study.run("--llem-resume").stdout.fnmatch_lines(["  resume: 1 from results/noop_mine (*)"])

    def test_a_result_that_is_not_whole_is_measured_again(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        (directory,) = study.directories()
        entries = _manifest(directory)["experiments"]
        (directory / entries[0]["result_file"]).write_text("{}")
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=2)
        run.stdout.fnmatch_lines([f"  resume: 1 from results/{directory.name} (*), 1 not whole any more"])
        assert study.started() == 3

    def test_what_preflight_would_refuse_now_is_there_already(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run().assert_outcomes(passed=1)
        study.pytester.makeconftest(
            """
            from pytest_llem.planning.preflight import Preflight

            Preflight.reason = lambda self, point: "nothing can run here"
            """
        )
        study.run("--llem-resume").assert_outcomes(passed=1)

    def test_the_plan_says_so_before(self, study: Study) -> None:
        study.write()
        study.run()
        study.run("--llem-resume", "--collect-only", "--llem-plan=plan.json")
        plan = json.loads((study.pytester.path / "plan.json").read_text())
        (directory,) = study.directories()
        sources = [one["replayed_from"] for one in plan["experiments"]]
        assert sources == [directory.name, None, directory.name, None]


class TestWhatSomebodyTamperedWith:
    @pytest.fixture
    def entry(self, study: Study) -> Callable[..., Any]:
        """Return what changes the entry of the first of two experiments, with a hash that fits."""
        study.write(sweep={"n": [1, 2]})
        study.run()
        (directory,) = study.directories()

        def change(file: Any, content: Any = None) -> Any:
            path = directory / file
            if content is not None:
                path.write_bytes(content)
            manifest = _manifest(directory)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["experiments"][0] |= {"result_file": file, "result_sha256": digest}
            (directory / "manifest.json").write_text(json.dumps(manifest))
            return manifest["experiments"]

        change.directory = directory
        change.file = _manifest(directory)["experiments"][0]["result_file"]
        change.other = _manifest(directory)["experiments"][1]["result_file"]
        return change

    @pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe", b""])
    def test_a_file_that_is_no_result_is_measured_again(
        self, study: Study, entry: Callable[..., Any], content: bytes
    ) -> None:
        entry(entry.file, content)
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=2)
        assert "INTERNALERROR" not in run.stdout.str()
        assert study.started() == 3

    def test_a_result_of_another_experiment_does_not_stand_for_it(
        self, study: Study, entry: Callable[..., Any]
    ) -> None:
        entry(entry.file, (entry.directory / entry.other).read_bytes())
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 3
        entry(entry.other)
        study.run("--llem-resume-from", str(entry.directory)).assert_outcomes(passed=2)
        assert study.started() == 4

    def test_no_file_elsewhere_is_read(self, study: Study, entry: Callable[..., Any]) -> None:
        (study.pytester.path / "secret.json").write_text("{}")
        entry("../../secret.json")
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=2)
        assert study.started() == 3

    def test_what_lies_beside_and_is_no_text_is_left(self, study: Study, entry: Callable[..., Any]) -> None:
        stem = entry.directory / entry.file.removesuffix(".json")
        stem.with_suffix(".folder").mkdir()
        stem.with_suffix(".notes").write_bytes(b"\xff")
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 2

    def test_a_result_that_goes_meanwhile_is_measured_with_the_device_to_itself(
        self, study: Study, entry: Callable[..., Any]
    ) -> None:
        study.pytester.makeconftest(
            f"""
            import pathlib

            def pytest_runtestloop(session):
                pathlib.Path({str(entry.directory / entry.file)!r}).unlink()
            """
        )
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 3
        manifest = _manifest(study.directories()[1])
        (measured,) = [one for one in manifest["experiments"] if one["replayed_from"] is None]
        result = json.loads((study.directories()[1] / measured["result_file"]).read_text())
        assert result["gap"]["waited_seconds"] is not None, "it had the device"

    def test_a_study_of_which_nothing_is_selected_refuses_nothing(
        self, study: Study, entry: Callable[..., Any], write_study: Callable[..., Path]
    ) -> None:
        write_study("other.yaml", name="other", sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        study.write(sweep={"n": [3]})
        run = study.pytester.runpytest_subprocess(
            "study.yaml", "other.yaml", "-p", "llem", "--llem-resume", "-k", "size=1"
        )
        run.assert_outcomes(passed=1, deselected=1)


class TestAfterAKill:
    def test_what_was_running_runs(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(sweep={"noop.fault": ["none", "hang while broken"]})
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: study.started() == 2)
        run.kill()
        run.wait()
        study.repair()
        assert [entry["status"] for entry in _manifest(study.directories()[0])["experiments"]] == [
            "completed",
            "running",
        ]
        study.run("--llem-resume", *workers).assert_outcomes(passed=2)
        assert study.started() == 3
        assert _manifest(study.directories()[1])["completed"] == 2

    def test_what_was_interrupted_runs(self, study: Study) -> None:
        study.write(sweep={"noop.fault": ["none", "hang while broken"]})
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: study.started() == 2)
        run.send_signal(signal.SIGINT)
        run.wait(60)
        study.repair()
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 3


class TestRefusals:
    def _refused(self, run: Any, *lines: Any) -> None:
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines([f"ERROR: {line}" for line in lines])
        assert "INTERNALERROR" not in run.stdout.str() + run.stderr.str()

    def test_another_design(self, study: Study, workers: tuple[str, ...]) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        study.write(sweep={"n": [2, 3, 4]})
        run = study.run("--llem-resume", *workers)
        (directory,) = study.directories()
        self._refused(
            run,
            f"{directory.name} cannot be resumed: the study's design was *, is *: points 2 new (n=3, …), "
            "1 gone (n=1) (--llem-resume-anyway replays what both have)",
        )
        study.run("--llem-resume", "--llem-resume-anyway", *workers).assert_outcomes(passed=3)
        assert study.started() == 4, "the point that both have is replayed"

    def test_the_field_that_differs_is_named(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        study.write(sweep={"n": [1, 2]}, max_output_tokens=5)
        self._refused(
            study.run("--llem-resume"),
            "* cannot be resumed: the study's design was *, is *: n=1 had max_output_tokens: 3 then, 5 now (*",
        )

    def test_of_older_runs_what_was_measured_otherwise_is_left(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        (first,) = study.directories()
        _change_results(first, {"cpu_model": "Another CPU"})
        study.run("-k", "n=1")
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 2 + 1 + 1, "n=2 was measured on another CPU"

    def test_the_newest_of_the_same_design_is_taken_whatever_was_run_since(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run()
        study.write(sweep={"n": [2]})
        study.run()
        study.write(sweep={"n": [1]})
        study.run("--llem-resume").assert_outcomes(passed=1)
        assert study.started() == 2

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"packages": {"torch": "2.0.1"}}, "torch 2.0.1 then, * now"),
            ({"packages": {"pytest-llem": "0.0.1"}}, "pytest-llem 0.0.1 then, * now"),
            ({"cpu_model": "Another CPU"}, "it ran on Another CPU, this is *"),
            (
                {"gpus": [{"name": "NVIDIA A100", "driver": "535.1"}]},
                "it ran on NVIDIA A100, here is no GPU",
            ),
        ],
        ids=["torch", "ourselves", "processor", "gpu"],
    )
    def test_what_determines_the_numbers_has_changed(
        self, study: Study, change: dict[str, Any], told: str
    ) -> None:
        study.write(sweep={"n": [1]})
        study.run()
        (directory,) = study.directories()
        _change_results(directory, change)
        run = study.run("--llem-resume")
        self._refused(run, f"{directory.name} cannot be resumed: {told} (--llem-resume-anyway *)")
        assert study.directories() == [directory], "nothing was written"
        study.run("--llem-resume", "--llem-resume-anyway").assert_outcomes(passed=1)
        assert study.started() == 1

    def test_an_engine_of_another_version(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run()
        (directory,) = study.directories()
        _change_results(directory, {}, versions={"PyYAML": "1.0"})
        self._refused(study.run("--llem-resume"), "* cannot be resumed: PyYAML 1.0 then, * now *")

    def test_no_results_directory(self, study: Study) -> None:
        study.write()
        self._refused(
            study.run("--llem-resume-from", "nowhere"),
            "--llem-resume-from: *nowhere: holds no manifest.json, so no results of a study",
        )

    def test_the_manifest_instead_of_its_directory(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=one")
        run = study.run("--llem-resume-from", "results/noop_one/manifest.json")
        self._refused(run, "--llem-resume-from: *manifest.json: name the directory that holds it")

    def test_results_of_another_study(self, study: Study, write_study: Callable[..., Path]) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=one")
        study.write(name="other", sweep={"n": [2]})
        run = study.run("--llem-resume-from", "results/noop_one")
        self._refused(run, "--llem-resume-from: *noop_one is of none of the collected studies")

    def test_anyway_alone(self, study: Study) -> None:
        study.write()
        self._refused(
            study.run("--llem-resume-anyway"), "--llem-resume-anyway: needs --llem-resume or --llem-resume-from"
        )


def _change_results(directory: Any, environment: Any, versions: Any = None) -> None:
    """Have the results of a run say that they were measured elsewhere."""
    manifest = _manifest(directory)
    for entry in manifest["experiments"]:
        file = directory / entry["result_file"]
        result = json.loads(file.read_text())
        packages = result["environment"]["packages"] | environment.get("packages", {})
        result["environment"] |= environment | {"packages": packages}
        result["engine"]["versions"] |= versions or {}
        file.write_text(json.dumps(result))
        entry["result_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))
