"""``--llem-resume``: completed experiments are replayed, the others run, mismatches are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.planning.preflight import Preflight
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.processes import wait_until


class Study:
    """A study in whose first run two of four points failed."""

    def __init__(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, run: RunPytest
    ) -> None:
        self.pytester, self._write, self.results, self.run = pytester, write_study, results, run
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

    def popen(self) -> subprocess.Popen[bytes]:
        """Run the study in a process that can be ended."""
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def repair(self) -> None:
        (self.pytester.path / "broken").unlink()

    def started(self) -> int:
        """Return the number of experiments started so far."""
        return len(list(self.notes.iterdir()))

    def directories(self) -> list[Path]:
        """Return the results directories, oldest first."""
        found = [path for path in self.results.root.iterdir() if path.is_dir()]
        return sorted(found, key=lambda path: str(_manifest(path)["started_at"]))

    def measured(self) -> list[str]:
        """Return the experiments of the newest run that were not replayed."""
        entries = _manifest(self.directories()[-1])["experiments"]
        return [one["experiment_id"] for one in entries if one["replayed_from"] is None]


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: WriteStudy, results: Results, run_pytest: RunPytest) -> Study:
    return Study(pytester, write_study, results, run_pytest)


@pytest.fixture
def finished(study: Study, write_study: WriteStudy, finished_results: Path) -> Path:
    """Results directory of a study with eight completed experiments."""
    write_study()
    directory = study.results.root / finished_results.name
    shutil.copytree(finished_results, directory)
    return directory


def _manifest(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return manifest


class TestReplays:
    def test_completed_results_are_replayed_and_the_rest_runs(
        self, study: Study, workers: tuple[str, ...]
    ) -> None:
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

    @pytest.mark.slow
    def test_hook_is_called_for_replayed_experiments(self, study: Study) -> None:
        study.write()
        study.run()
        study.pytester.makeconftest(
            "def pytest_llem_experiment_finished(result): print('finished', result.identity.experiment_id)"
        )
        run = study.run("--llem-resume", "-s")
        assert run.stdout.str().count("finished n=") == 2

    @pytest.mark.slow
    def test_replayed_results_can_be_replayed_again(self, study: Study) -> None:
        """A run contains the results that it replayed, so that the earlier run is no longer needed."""
        study.write()
        study.run()
        study.run("--llem-resume").assert_outcomes(passed=2, failed=2)
        study.repair()
        study.run("--llem-resume").assert_outcomes(passed=4)
        study.run("--llem-resume").assert_outcomes(passed=4)
        assert study.started() == 4 + 2 + 2

    @pytest.mark.slow
    def test_resume_from_a_named_older_run(self, study: Study) -> None:
        study.write()
        study.run("--llem-run-id=first")
        study.repair()
        study.run("--llem-run-id=second").assert_outcomes(passed=4)
        study.run("--llem-resume-from", "results/noop_first").assert_outcomes(passed=4)
        assert study.started() == 4 + 4 + 2

    @pytest.mark.slow
    def test_more_cycles_are_added(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        study.run("--llem-resume", "--llem-cycles=3").assert_outcomes(passed=6)
        assert study.started() == 6

    def test_resume_with_a_selection(self, study: Study) -> None:
        study.write()
        study.run()
        run = study.run("--llem-resume", "-k", "n=2 and fault=none")
        run.assert_outcomes(passed=1, deselected=3)
        assert study.started() == 4

    def test_without_earlier_results_all_runs(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(["  resume: there are no results to replay"])

    @pytest.mark.slow
    def test_results_missing_in_a_later_run_come_from_an_earlier(self, study: Study) -> None:
        """After a run with -k or -x, earlier runs have more results than the newest."""
        study.write()
        study.run("--llem-run-id=first")
        study.repair()
        study.run("--llem-resume", "-k", "n=2", "--llem-run-id=second").assert_outcomes(passed=2, deselected=2)
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=4)
        assert study.started() == 4 + 1 + 1
        run.stdout.fnmatch_lines(["  resume: 1 from results/noop_first (*), 2 from results/noop_second (*)"])

    def test_newer_of_two_results_is_replayed(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=first")
        study.run("--llem-run-id=second")
        study.run("--llem-resume").stdout.fnmatch_lines(["  resume: 1 from results/noop_second (*)"])

    def test_own_results_come_before_another_study_of_the_design(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run("--llem-run-id=mine")
        study.write(name="other", sweep={"n": [1]})
        study.run("--llem-run-id=later")
        study.write(sweep={"n": [1]})
        study.run("--llem-resume").stdout.fnmatch_lines(["  resume: 1 from results/noop_mine (*)"])

    def test_damaged_result_is_measured_again(self, study: Study) -> None:
        study.write(sweep={"n": [1, 2]})
        study.run()
        (directory,) = study.directories()
        entries = _manifest(directory)["experiments"]
        with (directory / entries[0]["result_file"]).open("a") as file:
            file.write(" ")  # still valid JSON, but not the recorded file
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=2)
        run.stdout.fnmatch_lines([f"  resume: 1 from results/{directory.name} (*), 1 damaged, measured again"])
        assert study.started() == 3

    def test_manifest_that_cannot_be_read_is_named(self, study: Study) -> None:
        study.write(sweep={"n": [1]})
        study.run()
        (directory,) = study.directories()
        (directory / "manifest.json").write_text("{")
        run = study.run("--llem-resume", "--collect-only")
        why = f"cannot be read: {directory}/manifest.json: not a Manifest: the file: Invalid JSON: *"
        run.stdout.fnmatch_lines([f"  resume: there are no results to replay; {why}"])

    def test_preflight_is_not_asked_for_replayed_experiments(
        self, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study.write(sweep={"n": [1]})
        study.run().assert_outcomes(passed=1)
        monkeypatch.setattr(Preflight, "refusal", lambda *_: "nothing can run here")
        study.run("--llem-resume").assert_outcomes(passed=1)

    def test_plan_names_sources_of_replayed_experiments(self, study: Study) -> None:
        study.write()
        study.run()
        study.run("--llem-resume", "--collect-only", "--llem-plan=plan.json")
        plan = json.loads((study.pytester.path / "plan.json").read_text())
        (directory,) = study.directories()
        sources = [one["replayed_from"] for one in plan["experiments"]]
        assert sources == [directory.name, None, directory.name, None]


class Tampered:
    """A finished run whose first experiment was edited, with a matching hash in the manifest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file, self.other = (str(entry["result_file"]) for entry in _manifest(directory)["experiments"][:2])

    def change(self, file: str, content: bytes | None = None) -> None:
        path = self.directory / file
        if content is not None:
            path.write_bytes(content)
        manifest = _manifest(self.directory)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest["experiments"][0] |= {"result_file": file, "result_sha256": digest}
        (self.directory / "manifest.json").write_text(json.dumps(manifest))


class TestTamperedResults:
    @pytest.fixture
    def tampered(self, finished: Path) -> Tampered:
        return Tampered(finished)

    @pytest.mark.parametrize("content", [b"{}", b"\xff\xfe"])
    def test_file_that_is_not_a_result_is_measured_again(
        self, study: Study, tampered: Tampered, content: bytes
    ) -> None:
        tampered.change(tampered.file, content)
        run = study.run("--llem-resume")
        run.assert_outcomes(passed=8)
        assert "INTERNALERROR" not in run.stdout.str()
        assert len(study.measured()) == 1

    def test_result_of_another_experiment_is_measured_again(self, study: Study, tampered: Tampered) -> None:
        tampered.change(tampered.file, (tampered.directory / tampered.other).read_bytes())
        study.run("--llem-resume").assert_outcomes(passed=8)
        assert len(study.measured()) == 1
        tampered.change(tampered.other)
        study.run("--llem-resume-from", str(tampered.directory)).assert_outcomes(passed=8)
        assert len(study.measured()) == 1

    def test_result_file_outside_the_directory_is_not_read(self, study: Study, tampered: Tampered) -> None:
        content = (tampered.directory / tampered.file).read_bytes()
        (study.pytester.path / "secret.json").write_bytes(content)
        tampered.change("../../secret.json")
        study.run("--llem-resume").assert_outcomes(passed=8)
        assert len(study.measured()) == 1

    def test_files_beside_a_result_that_are_not_text_are_ignored(self, study: Study, tampered: Tampered) -> None:
        stem = tampered.directory / tampered.file.removesuffix(".json")
        stem.with_suffix(".folder").mkdir()
        stem.with_suffix(".notes").write_bytes(b"\xff")
        study.run("--llem-resume").assert_outcomes(passed=8)
        assert study.measured() == []

    def test_result_deleted_during_the_run_is_measured_alone(self, study: Study, tampered: Tampered) -> None:
        study.pytester.makeconftest(
            f"""
            import pathlib

            def pytest_runtestloop(session):
                pathlib.Path({str(tampered.directory / tampered.file)!r}).unlink()
            """
        )
        study.run("--llem-resume").assert_outcomes(passed=8)
        newest = study.directories()[-1]
        (measured,) = [one for one in _manifest(newest)["experiments"] if one["replayed_from"] is None]
        result = json.loads((newest / measured["result_file"]).read_text())
        assert result["gap"]["waited_seconds"] is not None, "it had the device"

    def test_study_without_selected_experiments_is_not_refused(
        self, study: Study, run_pytest: RunPytest, finished: Path, write_study: WriteStudy
    ) -> None:
        write_study("other.yaml", name="other", sweep={"noop.size": [1]}, execution={"n_cycles": 1})
        write_study(sweep={"n": [3]}, execution={"n_cycles": 1})
        run = run_pytest("--llem-resume", "-k", "size=1", files=["study.yaml", "other.yaml"])
        run.assert_outcomes(passed=1, deselected=1)


class TestAfterAKill:
    def test_experiment_running_at_a_kill_is_measured_again(self, study: Study) -> None:
        study.write(sweep={"noop.fault": ["none", "hang while broken"]})
        run = study.popen()
        wait_until(lambda: study.started() == 2)
        run.kill()
        run.wait()
        study.repair()
        assert [entry["status"] for entry in _manifest(study.directories()[0])["experiments"]] == [
            "completed",
            "running",
        ]
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 3
        assert _manifest(study.directories()[1])["completed"] == 2

    @pytest.mark.slow
    def test_interrupted_experiment_is_measured_again(self, study: Study) -> None:
        study.write(sweep={"noop.fault": ["none", "hang while broken"]})
        run = study.popen()
        wait_until(lambda: study.started() == 2)
        run.send_signal(signal.SIGINT)
        run.wait(60)
        study.repair()
        study.run("--llem-resume").assert_outcomes(passed=2)
        assert study.started() == 3


class TestRefusals:
    def _refused(self, run: pytest.RunResult, *lines: str) -> None:
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines([f"ERROR: {line}" for line in lines])
        assert "INTERNALERROR" not in run.stdout.str() + run.stderr.str()

    def test_other_design_is_refused_unless_forced(
        self, study: Study, finished: Path, write_study: WriteStudy, workers: tuple[str, ...]
    ) -> None:
        write_study(sweep={"precision": ["bf16", "fp32"], "noop.size": [2, 3, 4]})
        self._refused(
            study.run("--llem-resume", *workers),
            f"{finished.name} cannot be resumed: the study's design was *, is * now: points 4 new "
            "(precision=bf16-size=3, …), 2 removed (precision=bf16-size=1, …) "
            "(--llem-resume-mismatch replays the common results)",
        )
        if not workers:
            study.run("--llem-resume", "--llem-resume-mismatch").assert_outcomes(passed=12)
            assert len(study.measured()) == 8, "the common points are replayed"

    def test_refusal_names_the_field_that_differs(
        self, study: Study, finished: Path, write_study: WriteStudy
    ) -> None:
        write_study(max_output_tokens=5)
        self._refused(
            study.run("--llem-resume"),
            "* cannot be resumed: the study's design was *, is * now: in precision=bf16-size=1, "
            "max_output_tokens was 3, is 5 now (*",
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_output_tokens": 5}, "in precision=bf16-size=1, max_output_tokens was 3, is 5 now (*"),
            ({"sweep": {"precision": ["bf16", "fp32"], "noop.size": [2]}}, "points 2 removed (*"),
        ],
    )
    def test_unused_field_is_not_named_as_a_difference(
        self, study: Study, finished: Path, write_study: WriteStudy, changes: dict[str, Any], message: str
    ) -> None:
        file = finished / "study_result.json"
        result = json.loads(file.read_text())
        for point in result["points"]:
            point["config"]["precision"] = None
        file.write_text(json.dumps(result))
        write_study(**changes)
        expected = f"* cannot be resumed: the study's design was *, is * now: {message}"
        self._refused(study.run("--llem-resume"), expected)

    @pytest.mark.slow
    def test_older_run_measured_elsewhere_is_not_replayed(self, study: Study, finished: Path) -> None:
        _change_results(finished, {"cpu_model": "Another CPU"})
        study.run("-k", "size=1")
        study.run("--llem-resume").assert_outcomes(passed=8)
        assert len(study.measured()) == 4
        assert all("size=2" in one for one in study.measured()), "those were measured on another CPU"

    def test_newest_run_of_the_same_design_is_replayed(
        self, study: Study, finished: Path, write_study: WriteStudy
    ) -> None:
        write_study(sweep={"n": [2]}, execution={"n_cycles": 1})
        study.run().assert_outcomes(passed=1)
        write_study()
        study.run("--llem-resume").assert_outcomes(passed=8)
        assert study.measured() == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"packages": {"torch": "2.0.1"}}, "torch was 2.0.1, is * now"),
            ({"packages": {"pytest-llem": "0.0.1"}}, "pytest-llem was 0.0.1, is * now"),
            ({"cpu_model": "Another CPU"}, "it ran on Another CPU, this machine has *"),
            (
                {"gpus": [{"uuid": "GPU-a", "name": "NVIDIA A100", "driver": "535.1"}]},
                "it ran on NVIDIA A100, this machine has no GPU",
            ),
        ],
        ids=["torch", "pytest-llem", "processor", "gpu"],
    )
    def test_other_environment_is_refused_unless_forced(
        self, study: Study, finished: Path, change: dict[str, Any], message: str
    ) -> None:
        _change_results(finished, change)
        run = study.run("--llem-resume")
        self._refused(run, f"{finished.name} cannot be resumed: {message} (--llem-resume-mismatch *)")
        assert study.directories() == [finished], "nothing was written"
        study.run("--llem-resume", "--llem-resume-mismatch").assert_outcomes(passed=8)
        assert study.measured() == []

    def test_engine_of_another_version_is_refused(self, study: Study, finished: Path) -> None:
        _change_results(finished, {}, versions={"PyYAML": "1.0"})
        self._refused(study.run("--llem-resume"), "* cannot be resumed: PyYAML was 1.0, is * *")

    def test_directory_without_results_is_refused(self, study: Study) -> None:
        study.write()
        self._refused(
            study.run("--llem-resume-from", "nowhere"),
            "--llem-resume-from: *nowhere: no such file or folder",
        )

    def test_manifest_in_place_of_its_directory_is_refused(self, study: Study, finished: Path) -> None:
        run = study.run("--llem-resume-from", f"results/{finished.name}/manifest.json")
        self._refused(run, "--llem-resume-from: *manifest.json: name the directory that holds it")

    def test_results_of_another_study_are_refused(
        self, study: Study, finished: Path, write_study: WriteStudy
    ) -> None:
        write_study(name="other", sweep={"n": [2]})
        run = study.run("--llem-resume-from", f"results/{finished.name}")
        self._refused(run, f"--llem-resume-from: *{finished.name} holds no results of the collected studies")

    def test_resume_mismatch_without_resume_is_refused(self, study: Study) -> None:
        study.write()
        self._refused(
            study.run("--llem-resume-mismatch"),
            "--llem-resume-mismatch: needs --llem-resume or --llem-resume-from",
        )


def _change_results(directory: Path, environment: dict[str, Any], versions: dict[str, str] | None = None) -> None:
    """Edit the environment in the results of a run."""
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
