"""What measuring costs in processor time: whose is counted, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_llem import ExperimentResult, run_experiment
from pytest_llem.measurement.harness import Harness
from tests.conftest import NOOP_STUDY, Results
from tests.support.marks import slow


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that works for a fifth of a second and then waits."""
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def _work(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_processor_time_is_counted_from_the_start(other: subprocess.Popen[bytes]) -> None:
    assert other.stdout is not None
    other.stdout.readline()  # it has worked, before the window
    harness = Harness([os.getpid(), other.pid])
    _work(0.3)
    assert harness.cpu_seconds(None) == pytest.approx(0.3, abs=0.08)  # the kernel counts in 10 ms
    assert harness.cpu_seconds(2.0) == pytest.approx(2.3, abs=0.08), "with the meters' own"
    other.communicate(b"\n")


def test_processor_time_is_unknown_once_a_process_is_gone(other: subprocess.Popen[bytes]) -> None:
    harness = Harness([os.getpid(), other.pid])
    other.communicate(b"\n")
    assert harness.cpu_seconds(2.0) is None
    assert Harness([other.pid]).cpu_seconds(None) is None


def test_without_processes_only_the_meters_count() -> None:
    assert Harness([]).cpu_seconds(None) is None
    assert Harness([]).cpu_seconds(0.25) == 0.25


@pytest.mark.usefixtures("noop_engine")
def test_run_experiment_has_no_harness() -> None:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    assert run_experiment(fields).harness_cpu_seconds is None


#: One process has a thread that never waits: the only one, or with xdist the controller.
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
    write_study: Callable[..., Path],
    results: Results,
    busy: bool,
    workers: tuple[str, ...],
) -> None:
    """A pytest process sleeps while an experiment runs; one in which a thread works shows."""
    write_study(
        sweep={"n": [1]},
        noop={"seconds": 0.6},
        measurement={"min_window_seconds": 0.5},
        execution={"n_cycles": 1},
    )
    if busy:
        pytester.makeconftest(BUSY)
    pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=1)
    text = (results.directory / results.manifest["experiments"][0]["result_file"]).read_text()
    result = ExperimentResult.model_validate_json(text)
    assert result.window.window_seconds > 0.5
    used = result.harness_cpu_seconds
    assert used is not None
    # Of a thread that never waits, even a busy machine runs some of these 0.6 s.
    assert (used > 0.15) if busy else (0 <= used < 0.15)
