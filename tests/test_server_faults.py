"""Faults of a server and of its client: the reason is named, nothing survives, and the study goes on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.execution import model_servers
from pytest_llem.isolation import supervisor, worker
from pytest_llem.isolation.model_server import free_port
from pytest_llem.results.manifest import read_manifest
from tests.conftest import Results, RunPytest
from tests.support.load_studies import patient, processes_in, result_of, write_load_study
from tests.support.processes import wait_until
from tests.support.serving import mock_server

#: Each faulty server is the first one: the next one has no fault.
ONCE = ("--once", "once", "--step-ms", "40+0")


def fault(name: str, mock: str, where: str, message: str, *, is_slow: bool = False, **study: Any) -> Any:
    """Return a case: an option of the mock server, and the kind, phase and message of the experiment's error."""
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(mock, where, message, study, id=name, marks=marks)


@pytest.fixture(autouse=True)
def folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the study, in which no process is left, and no temporary folder."""
    temporary = pytester.path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield pytester.path
    wait_until(lambda: not processes_in(pytester.path), seconds=10)
    wait_until(lambda: not list(temporary.glob("llem-*/")), seconds=10)


@pytest.fixture
def run_pytest(run_pytest: RunPytest, pytester: pytest.Pytester) -> RunPytest:
    """Run pytest as the fixture of all tests does, and again if the machine was too busy."""
    return patient(run_pytest, pytester.path)


@pytest.fixture
def shared_file() -> Iterator[str]:
    """Name of a file in shared memory, which is not left."""
    name = f"llem-test-{uuid.uuid4().hex}"
    yield name
    path = Path("/dev/shm", name)
    try:
        wait_until(lambda: not path.exists(), seconds=10)
    finally:
        path.unlink(missing_ok=True)


STATUS_3 = "the server ended with status 3: its output says why$"


@pytest.mark.parametrize(
    ("mock", "where", "message", "study"),
    [
        fault(
            "never ready",
            "--never-ready",
            "timeout while starting the server",
            r"the server was not ready after 4 s: http://127\.0\.0\.1:\d+/health did not answer with status 200 "
            r"\(raise server\.ready\.timeout_seconds\)$",
            server={"ready": {"timeout_seconds": 4}},  # enough for the second point's on a busy machine
        ),
        fault(
            "dies while starting",
            "--exit-starting=5",
            "crash while starting the server",
            "the server ended with status 5: its output says why$",
        ),
        fault("dies in the ramp", "--die-in-answer=1", "crash while ramping up", STATUS_3, is_slow=True),
        fault("dies in the window", "--die-in-answer=2", "crash while measuring", STATUS_3),
        fault("dies in the drain", "--die-in-answer=3", "crash while draining", STATUS_3, is_slow=True),
        fault(
            "status 500",
            "--error-every=2",
            "load while measuring",
            r"1 of 2 requests failed, and load\.max_error_rate is 0; the first: HTTP 500: .*out of memory",
        ),
        fault(
            "cut stream",
            "--cut-every=2",
            "load while measuring",
            "1 of 2 requests .* the first: the stream was cut after 8 chunks$",
            is_slow=True,
        ),
        fault(
            "wrong usage",
            "--wrong-usage-every=2",
            "load while measuring",
            "1 of 2 requests .* the first: wrong usage: 23 completion_tokens, of at most 16$",
            is_slow=True,
        ),
        fault(
            "stall",
            "--stall-after=2",
            "load while measuring",
            "1 of 2 requests .* the first: no complete answer within 4 s$",
            is_slow=True,
            load={"request_timeout_seconds": 4},
        ),
    ],
)
def test_fault_is_named_and_the_next_point_has_a_fresh_server(
    run_pytest: RunPytest, results: Results, folder: Path, mock: str, where: str, message: str, study: Any
) -> None:
    points = {"sweep": {"load.concurrency": [1, 2]}, "measurement": {"min_window_seconds": 0.1}}
    write_load_study(folder, *ONCE, mock, **points, **study)
    run = run_pytest()
    run.assert_outcomes(passed=1, failed=1)
    first, second = results.manifest["experiments"]
    assert (first["status"], second["status"]) == ("failed", "completed")
    [line] = [line for line in run.outlines if line.startswith(f"{where}: ")]
    assert re.match(message, line.removeprefix(f"{where}: "))
    output = "no such model" if "exit" in mock else "listening on *"
    run.stdout.fnmatch_lines(["*Captured server output*", output])
    [kept] = results.directory.glob("experiments/*.server.txt")
    assert fnmatch(kept.read_text(), f"*{output}*")
    assert result_of(results, second)["server"]["position"] == 1


@pytest.mark.slow
def test_merged_chunks_leave_inter_token_latencies_null(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    write_load_study(folder, "--merge=4", load={"concurrency": 2, "slo": {"itl_ms": 50}})
    run_pytest().assert_outcomes(passed=1)
    metrics = result_of(results, results.manifest["experiments"][0])["metrics"]
    assert metrics["tpot_p50_ms"]["value"] > 0
    for name in ("itl_p99_ms", "slo_attainment", "energy_per_good_token_j"):
        assert metrics[name]["value"] is None
        assert re.search("second token with a time|several tokens arrived together", metrics[name]["reason"])


def test_client_without_cpu_time_fails_as_too_slow(
    pytester: pytest.Pytester, results: Results, folder: Path
) -> None:
    """The client's process is stopped again and again, as by other programs on its CPU."""
    log = folder / "log"
    write_load_study(
        folder, "--log-file", str(log), load={"concurrency": 4}, measurement={"min_window_seconds": 1}
    )
    with background(pytester, "--llem-start-method=spawn") as run:
        wait_until(lambda: log.exists() and log.read_text())
        [client] = [psutil.Process(pid) for pid in clients(run.pid)]
        with suppress(psutil.NoSuchProcess):
            while run.poll() is None:
                client.suspend()
                time.sleep(0.1)
                client.resume()
                time.sleep(0.05)
        output, _ = run.communicate(timeout=300)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.search(
        r"^load while measuring: the load client is too slow for this load: 1 % of the requests were sent \d+ ms "
        r"late or later \(limit \d+ ms\)\. Use a machine with more free CPU time, or a lower load$",
        output,
        re.MULTILINE,
    )


def test_port_that_was_taken_meanwhile_is_replaced(
    run_pytest: RunPytest, results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_load_study(folder)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        ports = iter([other.getsockname()[1]] * 2)
        monkeypatch.setattr(model_servers, "free_port", lambda: next(ports, None) or free_port())
        run_pytest().assert_outcomes(passed=1)
    assert next(ports, None) is None


def test_other_server_on_the_port_is_not_measured(
    run_pytest: RunPytest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_load_study(folder)
    log = folder / "log"
    with mock_server("--log-file", str(log)) as url:
        monkeypatch.setattr(model_servers, "free_port", lambda: int(url.rpartition(":")[2]))
        run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.re_match_lines(
        [r"crash while starting the server: (the server's port is in use: process|.*status 1)"]
    )
    assert log.read_text() == ""


def test_nothing_is_left_of_a_server_that_resists(
    run_pytest: RunPytest, results: Results, folder: Path, shared_file: str
) -> None:
    """It ignores SIGTERM, has a child that outlives it, and leaves a file in shared memory."""
    child = folder / "child"
    options = ("--ignore-sigterm", "--grandchild", str(child), "--shm", shared_file)
    write_load_study(folder, *options, server={"stop": {"grace_seconds": 0.3}})
    run_pytest().assert_outcomes(passed=1)
    assert child.exists()


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_dies(run_pytest: RunPytest, folder: Path, shared_file: str) -> None:
    child = folder / "child"
    write_load_study(folder, "--die-in-answer=2", "--grandchild", str(child), "--shm", shared_file)
    run_pytest().assert_outcomes(failed=1)
    assert child.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_signal_in_mid_load_leaves_nothing(
    pytester: pytest.Pytester, results: Results, folder: Path, shared_file: str, number: signal.Signals
) -> None:
    log, child = folder / "log", folder / "child"
    options = ("--log-file", str(log), "--grandchild", str(child), "--shm", shared_file, "--ignore-sigterm")
    write_load_study(
        folder, *options, measurement={"min_window_seconds": 60}, server={"stop": {"grace_seconds": 0.3}}
    )
    with background(pytester) as run:
        wait_until(lambda: log.exists() and log.read_text())
        os.killpg(run.pid, number)
        output, _ = run.communicate(timeout=300)
    if number == signal.SIGINT:
        assert run.returncode == pytest.ExitCode.INTERRUPTED
        assert "1 interrupted" in output
    assert read_manifest(results.directory).status == "interrupted"


def test_ctrl_c_while_a_server_starts_leaves_nothing(
    pytester: pytest.Pytester, results: Results, folder: Path, shared_file: str
) -> None:
    write_load_study(folder, "--never-ready", "--shm", shared_file)
    with background(pytester) as run:
        wait_until(Path("/dev/shm", shared_file).exists)
        os.killpg(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=300)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert "0 of 1 experiment completed, 1 interrupted" in output
    [entry] = results.manifest["experiments"]
    assert entry["error"]["kind"] == "interrupted"


@contextmanager
def background(pytester: pytest.Pytester, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run pytest on the study as the leader of a process group."""
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *options]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def clients(pid: int) -> list[int]:
    """Return the pids of the experiment processes of a run of pytest."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if worker.__name__ in one.cmdline() and supervisor.__file__ not in one.cmdline():
                found.append(one.pid)
    return found
