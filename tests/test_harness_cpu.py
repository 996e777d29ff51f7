"""CPU time of the measurement: which processes count, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from pytest_llem import run_experiment
from pytest_llem.energy.account import Account, Total
from pytest_llem.measurement.observers import WindowObservers
from tests.conftest import NOOP_STUDY, Results, WriteStudy
from tests.support.marks import slow


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes for 0.2 s and then waits."""
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def _observed(pids: list[int], work: Callable[[], object], meters: float | None) -> float | None:
    """Return the CPU time of measuring while *work* is done, given that of the meters' own processes."""
    observers = WindowObservers([], pids)
    observers.begin()
    work()
    observers.end(Account((), Total(None, "unavailable"), harness_cpu_seconds=meters))
    return observers.harness_cpu_seconds


def _work(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_processor_time_is_counted_from_the_start(other: subprocess.Popen[bytes]) -> None:
    assert other.stdout is not None
    other.stdout.readline()  # it has finished computing before the window
    pids = [os.getpid(), other.pid]
    # The kernel counts in steps of 10 ms.
    assert _observed(pids, lambda: _work(0.3), None) == pytest.approx(0.3, abs=0.08)
    assert _observed(pids, lambda: _work(0.3), 2.0) == pytest.approx(2.3, abs=0.08), "with the meters' own"
    other.communicate(b"\n")


def test_processor_time_is_unknown_if_a_process_has_ended(other: subprocess.Popen[bytes]) -> None:
    assert _observed([os.getpid(), other.pid], lambda: other.communicate(b"\n"), 2.0) is None
    assert _observed([other.pid], lambda: None, None) is None


def test_without_processes_only_the_meters_count() -> None:
    assert _observed([], lambda: None, None) is None
    assert _observed([], lambda: None, 0.25) == 0.25


@pytest.mark.usefixtures("noop_engine")
def test_run_experiment_has_no_harness() -> None:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    assert run_experiment(fields).harness_cpu_seconds is None


#: One process has a busy thread: pytest's, or with xdist the controller.
BUSY = """
    import os, threading

    def burn():
        while True:
            pass

    if "PYTEST_XDIST_WORKER" not in os.environ:
        threading.Thread(target=burn, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("busy", "workers"),
    [(False, ()), slow(True, ()), slow(True, ("-n", "1"))],
    ids=["idle", "busy", "busy controller"],
)
@pytest.mark.slow
def test_result_has_the_processor_time_of_pytest(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    busy: bool,
    workers: tuple[str, ...],
) -> None:
    """pytest's process sleeps while an experiment runs, so that a busy thread in it is visible."""
    write_study(
        sweep={"n": [1]},
        noop={"seconds": 3.0 if busy else 0.6},
        measurement={"min_window_seconds": 0.5},
        execution={"n_cycles": 1},
    )
    if busy:
        pytester.makeconftest(BUSY)
    pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=1)
    (result,) = results.experiments()
    assert result.window.window_seconds > 0.5
    used = result.harness_cpu_seconds
    assert used is not None
    # Even a busy machine gives a busy thread a part of these 3 s.
    assert (used > 0.15) if busy else (0 <= used < 0.15)


def test_restarted_window_of_a_turn_is_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.01])
    monkeypatch.setattr("pytest_llem.measurement.observers.own_cpus", lambda *_: next(waits))
    observers, account = WindowObservers([], []), Account((), Total(None, "unavailable"))
    observers.begin()
    observers.end(account)
    observers.begin()
    observers.begin()  # something was compiled in the window
    observers.end(account)
    assert observers.waiting_cpus == 0.01
