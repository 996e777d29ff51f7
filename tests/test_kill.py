"""Kill pytest with SIGKILL: measured results are kept, and the manifest is correct."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llem import StudyResult, run_study
from pytest_llem.api import StudyRunError
from tests.conftest import WriteStudy
from tests.support.kills import kills, write_study


@pytest.mark.slow
def test_kill_at_any_moment_loses_no_finished_experiment(tmp_path: Path) -> None:
    write_study(tmp_path, points=10)
    seen = list(kills(tmp_path, 10, saved=4, longest=0.4, seed=1))
    assert len(seen) == 10
    assert max(one["completed"] for one in seen) >= 4
    assert sum(one["failed"] for one in seen) >= 4


@pytest.mark.slow
def test_kill_while_writing_loses_no_finished_experiment(tmp_path: Path) -> None:
    """The experiments take no time, so most kills hit pytest while it writes."""
    write_study(tmp_path, points=200, at_once=True)
    seen = list(kills(tmp_path, 4, saved=60, longest=0.1, seed=2))
    assert len(seen) == 4
    assert max(one["completed"] for one in seen) >= 50


def test_killed_run_is_an_error_and_can_be_loaded(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    path = write_study(execution={"n_cycles": 1, "cycle_order": "sequential"})
    pytester.makeconftest(
        """
        import os, signal

        def pytest_runtest_call(item):
            if "bf16-size=2" in item.name:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    with pytest.raises(StudyRunError, match="status -9 and left no result"):
        run_study(path, results_dir="out", quiet=True)
    (directory,) = pytester.path.glob("out/noop_*")
    result = StudyResult.load(directory)
    assert result.status == "interrupted"
    assert [entry.status for entry in result.experiments] == ["completed", "failed", "pending", "pending"]
    assert [point.metrics["seconds"].n for point in result.points] == [1, 0, 0, 0]
    assert result.points[1].axes == {"precision": "bf16", "noop.size": 2}
    assert result.points[1].metrics["seconds"].reason == "no completed cycle"
    assert (result.summary.total, result.summary.completed, result.summary.failed) == (4, 1, 1)
    assert result.measurement_protocol["n_cycles"] == 1


@pytest.mark.slow
def test_concurrent_runs_have_their_own_directories(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    path = write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    command = [sys.executable, "-m", "pytest", str(path), "-p", "llem", "--llem-run-id", "same"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 2, outputs
    root = pytester.path / "results"
    directories = sorted(path for path in root.iterdir() if path.is_dir())
    assert [one.name for one in directories] == ["noop_same", "noop_same-2"]
    assert (root / ".gitignore").read_text() == "*\n"
    for directory in directories:
        result = StudyResult.load(directory)
        assert (result.status, result.summary.completed) == ("completed", 1)
        names = sorted(path.name for path in directory.iterdir())
        written = ["manifest.json", "study.yaml", "study_result.json", "summary.csv"]
        assert names == ["experiments", "experiments.csv", *written]
        assert len(list((directory / "experiments").iterdir())) == 3, "the result, its requests and its outputs"
