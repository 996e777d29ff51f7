"""The library interface: run_study, StudyResult.load, ExperimentConfig."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pytest_llem import ExperimentConfig, StudyError, StudyResult, run_experiment, run_study
from pytest_llem.api import StudyRunError
from pytest_llem.engines.protocol import PreflightError
from tests.conftest import Results, WriteStudy
from tests.support.processes import wait_until


def test_run_study_returns_the_result_of_the_selection(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    path = write_study()
    result = run_study(path, select="size=2", results_dir=pytester.path / "out", quiet=True)
    assert isinstance(result, StudyResult)
    assert (result.summary.total, result.summary.completed) == (4, 4)
    assert list((pytester.path / "out").glob("noop_*/study_result.json"))


@pytest.mark.slow
def test_run_study_in_a_test_of_a_suite(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makepyfile(
        """
        from pytest_llem import run_study

        def test_cost():
            point = run_study("study.yaml").points[0]
            assert point.metrics["energy_per_output_token_j"].mean < 1e6
        """
    )
    pytester.runpytest_subprocess("-p", "llem").assert_outcomes(passed=1)


@pytest.mark.slow
def test_failed_experiments_are_in_the_result(write_study: WriteStudy) -> None:
    path = write_study(sweep={"noop.fault": ["raise", "none"]}, execution={"n_cycles": 1})
    result = run_study(path, quiet=True)
    assert (result.summary.completed, result.summary.failed) == (1, 1)
    assert [entry.error.message for entry in result.experiments if entry.error] == ["the engine says no"]


def test_wrong_study_is_reported_before_pytest_starts(pytester: pytest.Pytester) -> None:
    (pytester.path / "bad.yaml").write_text("modle: x\n")
    with pytest.raises(StudyError, match=r"bad\.yaml:1:1: modle: unknown key \(did you mean 'model'\?\)"):
        run_study("bad.yaml")


def test_run_without_a_result_raises_with_output_of_pytest(write_study: WriteStudy) -> None:
    path = write_study()
    with pytest.raises(StudyRunError, match=r"(?s)status 4.*no collected study has an axis nothing"):
        run_study(path, select="nothing=1", quiet=True)


@pytest.mark.parametrize(
    ("send", "number", "status"), [(os.killpg, signal.SIGINT, -signal.SIGINT), (os.kill, signal.SIGTERM, 3)]
)
def test_interrupted_run_study_leaves_the_result_of_the_study(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    send: Callable[[int, int], None],
    number: int,
    status: int,
) -> None:
    """Ctrl-C reaches pytest itself. It has to be interrupted if another exception ends the call."""
    (notes := pytester.path / "notes").mkdir()
    write_study(noop={"report": str(notes)}, sweep={"noop.fault": ["hang"]}, execution={"n_cycles": 1})
    code = (
        "import signal, sys, pytest_llem; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
        "pytest_llem.run_study('study.yaml', quiet=True)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(notes.iterdir()))
    send(run.pid, number)
    assert run.wait(timeout=300) == status
    assert results.study_result["status"] == "interrupted"


def test_arguments_of_pytest_in_one_string_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a list of arguments: \['-x', '-q'\] \(got '-x -q'\)"):
        run_study("study.yaml", pytest_args="-x -q")


def test_home_folder_in_paths_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bad.yaml").write_text("modle: x\n")
    with pytest.raises(StudyError, match="modle: unknown key"):
        run_study("~/bad.yaml")
    for given in ("~/models", ["~/models"]):
        with pytest.raises(PreflightError, match=rf"{tmp_path}/models\)"):
            run_experiment({"model": "owner/name", "n": 1}, model_path=given)


def test_model_path_reaches_the_experiment(pytester: pytest.Pytester) -> None:
    (pytester.path / "study.yaml").write_text("model: owner/name\nexecution: {n_cycles: 1}\n")
    result = run_study("study.yaml", model_path=["a b", "c's"], quiet=True)
    error = result.experiments[0].error
    assert error is not None
    assert f"({pytester.path / 'a b'}, {pytester.path}/c's)" in error.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a StudyResult: pytest_llem_version: Field required"),
        ("not json", "not a StudyResult: the file: Invalid JSON"),
        (None, "schema version 3.0 cannot be read"),
    ],
)
def test_load_refuses_files_that_are_not_study_results(
    tmp_path: Path, finished_results: Path, content: str | None, message: str
) -> None:
    if content is None:
        written = json.loads((finished_results / "study_result.json").read_text())
        content = json.dumps({**written, "schema_version": "3.0"})
    (tmp_path / "study_result.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        StudyResult.load(tmp_path)


def test_load_reads_a_newer_minor_version(tmp_path: Path, finished_results: Path) -> None:
    written = json.loads((finished_results / "study_result.json").read_text())
    newer = {**written, "schema_version": "2.9", "something_new": 1}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    assert StudyResult.load(tmp_path / "newer.json").name == "noop"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_ouput_tokens": 5}, "unknown key 'max_ouput_tokens'"),
        ({"backend": "my", "my": 5}, r"section 'my' is not a mapping \(got 5\)"),
    ],
)
def test_wrong_keys_of_a_configuration_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExperimentConfig.model_validate({"model": "m", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passthrough_kwargs": {"typical_p": math.nan}}, r"passthrough_kwargs\.typical_p must be .*\(got nan\)"),
        ({"passthrough_kwargs": {"a": [{"b": math.inf}]}}, r"passthrough_kwargs\.a\[0\]\.b must be .*\(got inf\)"),
        (
            {"backend": "other", "other": {"level": -math.inf}},
            r"other\.level must be .*\(got -inf\)",
        ),
        ({"backend": "vllm", "vllm": {"engine": {"x": math.nan}}}, r"vllm\.engine\.x must be a finite number"),
    ],
)
def test_non_finite_numbers_in_a_configuration_are_refused(changes: dict[str, Any], message: str) -> None:
    """A study file cannot hold such a number, but code can."""
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.model_validate({"model": "m", **changes})
