"""Ctrl-C, SIGTERM and SIGHUP: no process or file is left, and the manifest records the interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Results, WriteStudy
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(pytester: pytest.Pytester) -> Iterator[Start]:
    """Start pytest on the study as the leader of a process group."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *arguments]
        started.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.fixture
def notes(pytester: pytest.Pytester) -> Path:
    (pytester.path / "notes").mkdir()
    return pytester.path / "notes"


XDIST = ("-n", "2")
FORKSERVER = ("--llem-start-method", "forkserver")
ONE_CYCLE = {"n_cycles": 1, "cycle_order": "sequential", "contended_retries": 0}


@pytest.mark.parametrize(
    ("numbers", "whole_group", "options"),
    [
        ([signal.SIGTERM], False, ()),
        slow([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], True, ()),
        ([signal.SIGINT] * 3, True, FORKSERVER),
        slow([signal.SIGHUP], False, FORKSERVER),
        slow([signal.SIGINT] * 3, True, XDIST),
        slow([signal.SIGTERM], False, (*XDIST, *FORKSERVER)),
    ],
    ids=[
        "term to pytest",
        "mixed",
        "ctrl-c three times, forkserver",
        "hup, forkserver",
        "ctrl-c three times, xdist",
        "term to pytest, xdist and forkserver",
    ],
)
def test_signal_ends_the_experiment_and_is_in_the_manifest(
    start: Start,
    write_study: WriteStudy,
    results: Results,
    notes: Path,
    numbers: list[signal.Signals],
    whole_group: bool,
    options: tuple[str, ...],
) -> None:
    write_study(noop={"report": str(notes), "fault": "hang"}, sweep={"n": [1, 2]})
    run = start(*options)
    wait_until(lambda: any(notes.iterdir()))
    for number in numbers:
        (os.killpg if whole_group else os.kill)(run.pid, number)
        time.sleep(0.05)  # the next one comes while results are written
    output, _ = run.communicate(timeout=300)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert all(gone(int(note.stem)) for note in notes.iterdir())
    assert "INTERNALERROR" not in output
    assert results.manifest["status"] == "interrupted"
    interrupted = [entry for entry in results.manifest["experiments"] if entry["status"] == "failed"]
    assert {entry["error"]["kind"] for entry in interrupted} == {"interrupted"}
    assert set(results.statuses().values()) == {"failed", "pending"}
    assert results.study_result["status"] == "interrupted"
    summary = f"0 of 4 experiments completed, {len(interrupted)} interrupted, {4 - len(interrupted)} not run"
    assert summary in output
    assert "run again with --llem-resume to continue" in output


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_before(
    start: Start, write_study: WriteStudy, results: Results, notes: Path
) -> None:
    write_study(
        noop={"report": str(notes)},
        sweep={"noop.fault": ["none", "hang"]},
        execution={"n_cycles": 1, "cycle_order": "sequential"},
    )
    run = start()
    wait_until(lambda: len(list(notes.iterdir())) == 2)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=300)
    assert results.statuses() == {"fault=none": "completed", "fault=hang": "failed"}
    assert "1 of 2 experiments completed, 1 interrupted" in output
    assert "1 passed" in output


@pytest.mark.slow
def test_ctrl_c_while_the_last_result_is_written(
    start: Start, write_study: WriteStudy, pytester: pytest.Pytester, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pathlib, time
        from pytest_llem.results import study_run

        complete = study_run.complete

        def slowly(*arguments, **named):
            pathlib.Path("finishing").touch()
            time.sleep(1)
            return complete(*arguments, **named)

        study_run.complete = slowly
        """
    )
    run = start()
    wait_until((pytester.path / "finishing").exists)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=300)
    assert (run.returncode, results.manifest["status"]) == (0, "completed")
    assert results.study_result["summary"]["completed"] == 1
    assert "KeyboardInterrupt" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_collecting_writes_nothing(
    start: Start, write_study: WriteStudy, pytester: pytest.Pytester, number: signal.Signals
) -> None:
    write_study()
    pytester.makeconftest(
        """
        import pathlib, time

        def pytest_itemcollected(item):
            pathlib.Path("collecting").touch()
            time.sleep(600)
        """
    )
    run = start()
    wait_until((pytester.path / "collecting").exists)
    os.killpg(run.pid, number)
    run.communicate(timeout=300)
    assert run.returncode == (pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -signal.SIGTERM)
    assert not (pytester.path / "results").exists()


@pytest.mark.slow
def test_existing_signal_handlers_are_kept(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    """An ignored SIGHUP, as under nohup, and a handled SIGTERM stay so. At the end all handlers are restored."""
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import signal

        def mine(number, frame): pass

        def pytest_configure(config):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, mine)

        def pytest_runtest_call(item):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler

        def pytest_sessionfinish(session):
            session.config.add_cleanup(check)

        def check():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            print("as before")
        """
    )
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-s")
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["as before"])


def test_session_without_studies_handles_no_signal(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import signal

        def test_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        """
    )
    pytester.runpytest_subprocess("-p", "llem").assert_outcomes(passed=1)


@pytest.mark.parametrize(("option", "failed"), [("-x", 1), slow("--maxfail=2", 2)])
def test_maxfail_is_not_reported_as_interrupt(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results, option: str, failed: int
) -> None:
    write_study(sweep={"noop.fault": ["raise", "memory", "none"]}, execution=ONE_CYCLE)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", option)
    assert results.manifest["status"] == "aborted"
    assert [*results.statuses().values()] == ["failed"] * failed + ["pending"] * (3 - failed)
    assert run.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_maxfail_under_xdist_is_not_reported_as_interrupt(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.fault": ["raise", *(f"none {number}" for number in range(7))]}, execution=ONE_CYCLE)
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-x", *XDIST, *FORKSERVER)
    assert results.manifest["status"] == "aborted"
    statuses = [*results.statuses().values()]
    assert statuses.count("failed") == 1
    assert "pending" in statuses
    assert run.ret == pytest.ExitCode.INTERRUPTED
