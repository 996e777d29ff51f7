"""Results are replayed and judged only if code, model and dataset have not changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.engines.models import folder_state
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results import code_state
from pytest_llem.results.experiment import ExperimentResult, InputsRecord
from pytest_llem.results.findings import Findings
from pytest_llem.results.points import PointResult
from pytest_llem.study.loading import load_study
from tests.conftest import NOOP_ENGINE, Results, WriteStudy

ENGINE = """\
import my_kernels
from noop_engine import NoopEngine


class Engine(NoopEngine):
    pass
"""

GOLDEN = Path(__file__).parent / "golden" / "1.0" / "experiments"


class Project:
    """A study of a user's own engine, which imports a module beside it."""

    def __init__(self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results) -> None:
        self.pytester, self._write, self.results = pytester, write_study, results
        self.path = pytester.path
        (self.path / "my_engine.py").write_text(ENGINE)
        (self.path / "my_kernels.py").write_text("TILE = 16\n")
        (self.path / "README.md").write_text("An engine.\n")
        self.write()

    def write(self, **changes: Any) -> None:
        fields = {
            "backend": "my_engine:Engine",
            "sweep": {"n": [1, 2]},
            "execution": {"n_cycles": 1, "cycle_order": "sequential"},
        }
        self._write(**fields | changes)

    def run(self, *options: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(
            "study.yaml", "-p", "llem", "--llem-start-method=forkserver", "--llem-no-gaps", *options
        )

    def plan(self) -> pytest.RunResult:
        """The plan of a resumed run."""
        return self.run("--llem-resume", "--collect-only")

    def changes(self, result: ExperimentResult) -> list[str]:
        """What has changed since the result was measured."""
        study = load_study(self.path / "study.yaml")
        return CurrentInputs(study, [], [self.path]).changes(result, study.points[0].config)

    def entries(self, run_id: str) -> list[dict[str, Any]]:
        manifest = json.loads((self.results.root / f"noop_{run_id}" / "manifest.json").read_text())
        assert isinstance(manifest["experiments"], list)
        return manifest["experiments"]


@pytest.fixture
def project(pytester: pytest.Pytester, write_study: WriteStudy, results: Results) -> Project:
    return Project(pytester, write_study, results)


@pytest.mark.slow
def test_edited_code_is_measured_again(project: Project) -> None:
    project.run("--llem-run-id=first").assert_outcomes(passed=2)
    (project.path / "README.md").write_text("An engine, described.\n")
    project.plan().stdout.fnmatch_lines(["  resume: 2 from results/noop_first (measured *"])

    (project.path / "my_kernels.py").write_text("TILE = 32\n")
    project.plan().stdout.fnmatch_lines(
        ["  resume: nothing is replayed", "  resume, measured again: n=1 and 1 more: code has changed: my_kernels"]
    )
    project.run("--llem-resume", "--llem-run-id=second").assert_outcomes(passed=2)
    assert [entry["replayed_from"] for entry in project.entries("second")] == [None, None]


def test_no_gate_judges_replayed_results_of_other_code(project: Project) -> None:
    project.write(budgets={"output_tokens_per_second": {"min": 0}})
    project.run("--llem-run-id=first").assert_outcomes(passed=4)
    project.run("-k", "budget").assert_outcomes(passed=2, deselected=2)

    (project.path / "my_kernels.py").unlink()
    (project.path / "my_engine.py").write_text(ENGINE.replace("import my_kernels\n", ""))
    mismatch = "code has changed: my_engine; code is missing now: my_kernels"
    alone = project.run("-k", "budget")
    alone.assert_outcomes(failed=2, deselected=2)
    alone.stdout.fnmatch_lines([f"*measured before, and since then {mismatch}: measure it again*"])

    replayed = project.run("--llem-resume", "--llem-resume-mismatch", "--llem-run-id=second")
    replayed.assert_outcomes(passed=2, failed=2)
    replayed.stdout.fnmatch_lines([f"*measured before, and since then {mismatch}: measure it again*"])
    assert [entry["replay_mismatch"] for entry in project.entries("second")] == [mismatch, mismatch]


def test_changed_prompts_and_weights_are_measured_again(project: Project) -> None:
    prompts, weights = project.path / "prompts.txt", project.path / "weights" / "model.bin"
    prompts.write_text("one prompt\n")
    weights.parent.mkdir()
    weights.write_bytes(b"1234")
    project.write(sweep={"n": [1]}, dataset="prompts.txt", model="weights")
    project.run("--llem-run-id=first").assert_outcomes(passed=1)
    prompts.write_text("another prompt\n")
    project.plan().stdout.fnmatch_lines(["  resume, measured again: n=1: dataset 'prompts.txt' has changed"])
    prompts.write_text("one prompt\n")
    weights.write_bytes(b"5678")
    project.plan().stdout.fnmatch_lines(
        ["  resume, measured again: n=1: the folder of model 'weights' has changed"]
    )


@pytest.mark.slow
def test_resume_uses_the_newest_run_and_its_sources(project: Project) -> None:
    """Results of an independent run of the same design are not used."""
    project.run("--llem-run-id=unrelated").assert_outcomes(passed=2)
    project.run("--llem-run-id=first", "-k", "n=1").assert_outcomes(passed=1, deselected=1)
    run = project.run("--llem-resume", "--llem-run-id=second", "-k", "n=2")
    run.assert_outcomes(passed=1, deselected=1)
    assert [entry["replayed_from"] for entry in project.entries("second")] == [None, None]
    day = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9] [0-9][0-9]:[0-9][0-9]"
    sources = [f"1 from results/noop_{name} (measured {day} UTC)" for name in ("first", "second")]
    project.plan().stdout.fnmatch_lines([f"  resume: {', '.join(sources)}"])


def _result(modules: dict[str, str | None] | None, cycle: int = 1) -> ExperimentResult:
    result = ExperimentResult.model_validate_json(min(GOLDEN.glob("*.json")).read_text())
    result.identity.experiment_id = f"one-cycle={cycle}"
    result.inputs = None if modules is None else InputsRecord(modules=modules, distributions={})
    return result


def test_result_without_code_record_counts_as_changed(project: Project) -> None:
    (changes,) = project.changes(_result(None))
    assert changes == "pytest-llem 0.1.0 did not record the code that ran"


def test_code_edited_during_the_run_counts_as_changed(project: Project) -> None:
    assert project.changes(_result({"json": None})) == ["code was edited while it ran: json"]


def test_edit_during_the_study_is_a_warning() -> None:
    found = Findings()
    point = PointResult(id="one", axes={}, config={}, config_hash="0", metrics={})
    for cycle, digest in enumerate(("aa", "aa", "bb"), start=1):
        found.add(_result({"mine": digest, "other": "cc"}, cycle), point)
    found.warn_of_edits()
    assert "code was edited while the study ran: mine (one-cycle=3)" in map(str, found.study_warnings())


class TestCodeState:
    def _imported(self, path: Path, code: str) -> Any:
        code = f"from pytest_llem.results import code_state; {code}"
        code += "; import json; print(json.dumps(code_state.imported()))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(path)},
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    def test_code_state_has_user_modules_and_imported_packages(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "__init__.py").write_text("import yaml\n")
        (tmp_path / "mine" / "inner.py").write_text("ONE = 1\n")
        (tmp_path / "other.py").write_text("")
        found = self._imported(tmp_path, "import mine.inner")
        own = {name for name in found["modules"] if not name.startswith("pytest_llem")}
        assert own == {"mine", "mine.inner"}
        assert "PyYAML" in found["distributions"]
        assert "pytest" not in found["distributions"], "it was not imported"
        assert str(tmp_path) not in json.dumps(found), "no path is in a result"
        names = found["modules"], found["distributions"]
        assert code_state.current(*names, [str(tmp_path), *sys.path]) == found

    def test_file_changed_after_the_start_is_unknown(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("")
        edit = f"import mine, pathlib, time; time.sleep(0.02); pathlib.Path({str(tmp_path)!r}, 'mine.py').touch()"
        assert self._imported(tmp_path, edit)["modules"]["mine"] is None

    def test_shadowing_module_is_a_change(self, tmp_path: Path) -> None:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        (tmp_path / "second" / "mine.py").write_text("ONE = 1\n")
        path = [str(tmp_path / "first"), str(tmp_path / "second")]
        before = code_state.current(["mine"], [], path)
        (tmp_path / "first" / "mine.py").write_text("ONE = 2\n")
        assert code_state.current(["mine"], [], path) != before

    def test_same_version_with_other_local_files_is_a_change(self, tmp_path: Path) -> None:
        folder = tmp_path / "site-packages"
        info = folder / "mine-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {}}')
        (folder / "mine.py").write_text("ONE = 1\n")
        (info / "RECORD").write_text("mine.py,sha256=aaaa,8\nmine-1.0.dist-info/RECORD,,\n")
        before = self._imported(folder, "import mine")["distributions"]["mine"]
        (info / "RECORD").write_text("mine.py,sha256=bbbb,8\nmine-1.0.dist-info/RECORD,,\n")
        after = self._imported(folder, "import mine")["distributions"]["mine"]
        assert before.startswith("1.0 ")
        assert before != after
        (info / "direct_url.json").unlink()
        assert self._imported(folder, "import mine")["distributions"]["mine"] == "1.0"

    def test_other_interpreter_reports_its_own_code_state(self, tmp_path: Path, noop_engine: None) -> None:
        question = tmp_path / "question.json"
        question.write_text(
            json.dumps(
                {"modules": ["noop_engine", "none.such"], "packages": ["pytest"], "path": [str(NOOP_ENGINE)]}
            )
        )
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest_llem.results.code_state", str(question)],
            stdout=subprocess.PIPE,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found == code_state.current(["noop_engine", "none.such"], ["pytest"], sys.path)
        assert found["modules"]["none.such"] is None


def test_state_of_a_model_folder_changes_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    before = folder_state("mine", [tmp_path / "models"])
    assert before == folder_state(str(folder), [])
    os.utime(folder / "config.json", ns=(time.time_ns(), time.time_ns() + 1_000_000))
    assert folder_state("mine", [tmp_path / "models"]) != before
    assert folder_state("mine", []) is None
