"""The disk fills up, becomes read-only or loses files while a study runs: only that experiment fails."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.results import manifest
from pytest_llem.results.manifest import read_manifest, stored_result
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.marks import slow

#: Runs code when the second of three experiments ends, before its result is written, and when the third starts.
CONFTEST = """
import errno, pathlib, resource, shutil, subprocess, pytest

results = pathlib.Path("results")

def fill():
    with open("results/filler", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC

def run_directory():
    (found,) = results.glob("noop_*")
    return found

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call" and "n=2" in item.name:
        SECOND
    if call.when == "setup" and "n=3" in item.name:
        THIRD
    return (yield)
"""


@pytest.fixture
def run(
    pytester: pytest.Pytester, write_study: WriteStudy, run_pytest: RunPytest
) -> Callable[..., pytest.RunResult]:
    """Run the study with Python code that runs at its second and third experiment."""

    def run(second: str, third: str = "pass") -> pytest.RunResult:
        write_study(sweep={"n": [1, 2, 3]}, execution={"n_cycles": 1, "cycle_order": "sequential"})
        conftest = CONFTEST.replace("SECOND", second).replace("THIRD", third)
        pytester.makeconftest(conftest)
        ran = run_pytest("-q")
        output = ran.stdout.str() + ran.stderr.str()
        assert "INTERNALERROR" not in output
        assert "Traceback" not in output
        return ran

    return run


@pytest.fixture
def disk(pytester: pytest.Pytester) -> Iterator[Path]:
    """A file system of 1 MB of its own under ``results``."""
    directory = pytester.path / "results"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no command mount")
    if made.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def _read(results: Results) -> list[str]:
    """Return the statuses that a reader finds, in order, and check that completed results are whole."""
    found = read_manifest(results.directory)
    for entry in found.experiments:
        assert (stored_result(results.directory, entry) is not None) == (entry.status == "completed")
    return [entry.status for entry in found.experiments]


def test_full_disk_fails_one_experiment(
    run: Callable[..., pytest.RunResult], disk: Path, results: Results
) -> None:
    ran = run("fill()", "(results / 'filler').unlink()")
    ran.assert_outcomes(passed=2, failed=1)
    ran.stdout.fnmatch_lines(["the result could not be saved: *No space left on device*"])
    assert _read(results) == ["completed", "failed", "completed"]
    result = StudyResult.load(results.directory)
    assert (result.status, result.experiments[1].result_file) == ("completed", None)
    error = result.experiments[1].error
    assert error is not None
    assert "No space left on device" in error.message


def test_disk_that_stays_full_fails_the_rest(
    run: Callable[..., pytest.RunResult], disk: Path, results: Results
) -> None:
    ran = run("fill()")
    ran.assert_outcomes(passed=1, failed=2)
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines(["noop: the study's result could not be saved: *No space left on device*"])
    assert _read(results)[0] == "completed"
    assert "completed" not in _read(results)[1:]
    assert StudyResult.load(results.directory).summary.completed == 1


@pytest.mark.parametrize("again", [True, False], ids=["for one experiment", "to the end"])
def test_read_only_file_system_fails_experiments(
    run: Callable[..., pytest.RunResult], disk: Path, results: Results, again: bool
) -> None:
    remount = f"subprocess.run('mount -o remount,{{}} ' + {shlex.quote(str(disk))!r}, shell=True, check=True)"
    ran = run(remount.format("ro"), remount.format("rw") if again else "pass")
    ran.assert_outcomes(passed=1 + again, failed=2 - again)
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines(["the result could not be saved: *Read-only file system*"])
    if again:
        assert _read(results) == ["completed", "failed", "completed"]
    else:
        assert _read(results)[0] == "completed"
        assert StudyResult.load(results.directory).summary.completed == 1


def test_unwritable_results_directory_fails_experiments(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], results: Results
) -> None:
    closed = pytester.path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write everywhere")
    ran = run("for path in (run_directory() / 'experiments', run_directory()): path.chmod(0o555)")
    results.directory.chmod(0o755)
    (results.directory / "experiments").chmod(0o755)
    ran.assert_outcomes(passed=1, failed=2)
    ran.stdout.fnmatch_lines(["the result could not be saved: *Permission denied*"])
    assert _read(results)[0] == "completed"


def test_file_size_limit_fails_one_experiment(run: Callable[..., pytest.RunResult], results: Results) -> None:
    """Like a full disk, by a limit on the file size: a result exceeds it, and a line of the manifest does not."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        ran = run(limit.format("4096"), limit.format("resource.RLIM_INFINITY"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    ran.assert_outcomes(passed=2, failed=1)
    ran.stdout.fnmatch_lines(["the result could not be saved: *File too large*"])
    assert _read(results) == ["completed", "failed", "completed"]


def test_deleted_results_fail_and_the_others_are_kept(
    run: Callable[..., pytest.RunResult], results: Results
) -> None:
    ran = run("shutil.rmtree(run_directory() / 'experiments')")
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines(["noop: experiments/*-c1.json is missing, or was changed after it was written"])
    assert _read(results) == ["failed", "completed", "completed"]
    assert results.study_result["experiments"][0]["error"]["type"] == "ResultLost"


@pytest.mark.parametrize(
    "name", ["manifest.json", *map(slow, ("manifest.journal", "study_design.json", "study.yaml"))]
)
def test_deleted_record_costs_no_experiment(
    run: Callable[..., pytest.RunResult], results: Results, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for pause in ("REFRESH_SHARE", "REFRESH_PAUSE"):
        monkeypatch.setattr(manifest, pause, 1e9)  # or so small a study has no journal
    ran = run(f"(run_directory() / {name!r}).unlink()")
    ran.assert_outcomes(passed=3)
    assert _read(results) == ["completed"] * 3
    assert StudyResult.load(results.directory).status == "completed"


def test_recreated_results_directory_keeps_later_results(
    run: Callable[..., pytest.RunResult], results: Results
) -> None:
    ran = run("gone = run_directory(); shutil.rmtree(gone); gone.mkdir()")
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    assert _read(results) == ["failed", "completed", "completed"]
    assert StudyResult.load(results.directory).summary.completed == 2
