"""Ctrl-C, SIGTERM and the like: nothing is left, and the manifest says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import pytest

from tests.conftest import Results
from tests.support.processes import gone, wait_until


@pytest.fixture
def start(pytester: pytest.Pytester) -> Iterator[Callable[..., Any]]:
    """Start pytest on the study, as the leader of a process group of its own."""
    started = []

    def start(*arguments: Any) -> Callable[..., Any]:
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


WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "xdist"])


SIGNALS = {
    "ctrl-c": ([signal.SIGINT], True),
    "ctrl-c three times": ([signal.SIGINT] * 3, True),
    "term to pytest": ([signal.SIGTERM], False),
    "term to all": ([signal.SIGTERM], True),
    "hup": ([signal.SIGHUP], False),
    "mixed": ([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], True),
}


FORKSERVER = ("--llem-start-method", "forkserver")


@pytest.mark.parametrize(
    ("case", "workers"),
    [(case, ()) for case in SIGNALS]
    + [(case, ("-n", "2")) for case in ("ctrl-c", "ctrl-c three times", "term to pytest")]
    + [(case, FORKSERVER) for case in ("ctrl-c", "ctrl-c three times", "hup", "mixed")]
    + [(case, ("-n", "2", *FORKSERVER)) for case in ("ctrl-c three times", "term to pytest")],
    ids=str,
)
def test_the_child_goes_and_the_manifest_says_interrupted(
    start: Callable[..., Any],
    write_study: Callable[..., Path],
    results: Results,
    notes: Path,
    case: str,
    workers: tuple[str, ...],
) -> None:
    numbers, whole_group = SIGNALS[case]
    write_study(noop={"report": str(notes), "fault": "hang"}, sweep={"n": [1, 2]})
    run = start(*workers)
    wait_until(lambda: any(notes.iterdir()))
    for number in numbers:
        (os.killpg if whole_group else os.kill)(run.pid, number)
        time.sleep(0.3)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert all(gone(int(note.stem)) for note in notes.iterdir())
    assert "INTERNALERROR" not in output
    assert results.manifest["status"] == "interrupted"
    interrupted = [entry for entry in results.manifest["experiments"] if entry["status"] == "failed"]
    assert {entry["error"]["kind"] for entry in interrupted} == {"interrupted"}
    assert set(results.statuses().values()) == {"failed", "pending"}
    assert results.study_result["status"] == "interrupted"
    told = f"0 of 4 experiments completed, {len(interrupted)} interrupted, {4 - len(interrupted)} not run"
    assert told in output
    assert "--llem-resume goes on from here" in output


def test_as_somebody_at_a_terminal_would(
    start: Callable[..., Any], write_study: Callable[..., Path], results: Results, notes: Path
) -> None:
    """What was measured before stays."""
    write_study(
        noop={"report": str(notes)},
        sweep={"noop.fault": ["none", "hang"]},
        execution={"n_cycles": 1, "cycle_order": "sequential"},
    )
    run = start()
    wait_until(lambda: len(list(notes.iterdir())) == 2)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert results.statuses() == {"fault=none": "completed", "fault=hang": "failed"}
    assert "1 of 2 experiments completed, 1 interrupted" in output
    assert "1 passed" in output


def test_in_a_gap(
    start: Callable[..., Any], write_study: Callable[..., Path], results: Results, notes: Path
) -> None:
    write_study(
        noop={"report": str(notes)}, sweep={"n": [1, 2]}, execution={"n_cycles": 1, "experiment_gap_seconds": 600}
    )
    run = start()
    wait_until(lambda: list(results.root.glob("*/experiments/*.json")))
    time.sleep(1)
    for _ in range(3):
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.2)
    run.communicate(timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert results.manifest["status"] == "interrupted"
    assert sorted(results.statuses().values()) == ["completed", "pending"]


def test_while_the_result_is_written(
    start: Callable[..., Any], write_study: Callable[..., Path], pytester: pytest.Pytester, results: Results
) -> None:
    """What is nearly done is done."""
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import pathlib, time
        from pytest_llem.reporting import study_run

        complete = study_run.complete

        def slowly(*arguments, **named):
            pathlib.Path("finishing").touch()
            time.sleep(2)
            return complete(*arguments, **named)

        study_run.complete = slowly
        """
    )
    run = start()
    wait_until((pytester.path / "finishing").exists)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert (run.returncode, results.manifest["status"]) == (0, "completed")
    assert results.study_result["summary"]["completed"] == 1
    assert "KeyboardInterrupt" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_collecting_nothing_is_written(
    start: Callable[..., Any], write_study: Callable[..., Path], pytester: pytest.Pytester, number: Signals
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
    run.communicate(timeout=60)
    assert run.returncode == (pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -signal.SIGTERM)
    assert not (pytester.path / "results").exists()


def test_signals_are_left_to_whom_they_belong(pytester: pytest.Pytester, write_study: Callable[..., Path]) -> None:
    """Who ignores SIGHUP, as nohup does, or handles SIGTERM, goes on doing so; all are as before at the end."""
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


def test_an_ordinary_session_handles_no_signal(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import signal

        def test_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        """
    )
    pytester.runpytest_subprocess("-p", "llem").assert_outcomes(passed=1)


@pytest.mark.parametrize(("option", "failed"), [("-x", 1), ("--maxfail=2", 2)])
@WORKERS
def test_stopping_early_is_no_interrupt(
    pytester: pytest.Pytester,
    write_study: Callable[..., Path],
    results: Results,
    option: str,
    failed: int,
    workers: tuple[str, ...],
) -> None:
    faults = ["raise", "memory", *(f"none {number}" for number in range(20))]
    write_study(sweep={"noop.fault": faults}, execution={"n_cycles": 1, "cycle_order": "sequential"})
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", option, *workers)
    assert results.manifest["status"] == "aborted"
    statuses = list(results.statuses().values())
    assert statuses.count("failed") in ({failed} if not workers else {1, 2, 3})
    assert "pending" in statuses
    assert run.ret == (pytest.ExitCode.INTERRUPTED if workers else pytest.ExitCode.TESTS_FAILED)
