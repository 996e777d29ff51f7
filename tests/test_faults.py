"""Whatever an experiment's process does, the study gets a clear failure and nothing of the process stays."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.isolation import child as childs
from pytest_llem.isolation import guardian
from pytest_llem.isolation.oom import oom_kills
from pytest_llem.isolation.server import Servers
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import Results
from tests.support.processes import gone, wait_until

CGROUPS = Path("/sys/fs/cgroup")


def _script(path: Any, *lines: Any) -> Any:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def _pids(folder: Any) -> Any:
    return [int(path.stem) for path in folder.iterdir()]


class TestBeforeItsFirstLine:
    def test_an_interpreter_that_is_not_there(self, job: Callable[..., Any], run: Callable[..., Any]) -> None:
        error = run(job(python="/nowhere/python"), timeout=3600).error
        assert (error.kind, error.type) == ("crash", "NotStarted")
        assert error.message == "no process: /nowhere/python: No such file or directory"

    def test_an_interpreter_that_is_no_program(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
    ) -> None:
        (tmp_path / "python").write_text("text")
        error = run(job(python=str(tmp_path / "python")), timeout=3600).error
        assert (error.type, error.message) == ("NotStarted", f"no process: {tmp_path}/python: Permission denied")

    def test_an_interpreter_that_cannot_import_us(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
    ) -> None:
        python = _script(tmp_path / "python", f"exec {sys.executable} -I -c 'import nothing_of_that_name'")
        outcome = run(job(python=python), timeout=3600)
        assert (outcome.error.kind, outcome.error.phase) == ("crash", "starting")
        assert outcome.error.message == "the process ended with status 1 and left no result"
        assert "No module named 'nothing_of_that_name'" in outcome.output

    def test_no_room_for_its_files(
        self, job: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        error = run(job()).error
        assert (error.kind, error.type) == ("crash", "NotStarted")
        assert "No such file or directory" in error.message

    def test_what_lies_in_the_current_folder_is_not_in_the_way(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
        assert run(job()).error is None


class TestHangs:
    @pytest.mark.parametrize("fault", ["hang", "hold the lock"])
    def test_at_the_deadline_nothing_is_left(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path, fault: str
    ) -> None:
        """Its children have left its session, were orphaned, and ignore every signal that can be ignored."""
        for name in ("family", "notes"):
            (tmp_path / name).mkdir()
        options = {"family": str(tmp_path / "family"), "report": str(tmp_path / "notes")}
        outcome = run(job(fault=fault, **options), timeout=8)
        assert (outcome.error.kind, outcome.error.phase) == ("timeout", "measuring")
        assert "in generate" in outcome.error.traceback, "where it was is told"
        pids = _pids(tmp_path / "family") + _pids(tmp_path / "notes")
        assert len(pids) == 4
        assert all(map(gone, pids))

    def test_after_a_result_nothing_is_left_either(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
    ) -> None:
        outcome = run(job(family=str(tmp_path)))
        assert outcome.error is None
        assert len(_pids(tmp_path)) >= 3
        assert all(map(gone, _pids(tmp_path)))

    def test_one_that_is_stopped_is_ended_too(
        self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
    ) -> None:
        def stop() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            os.kill(_pids(tmp_path)[0], signal.SIGSTOP)

        threading.Thread(target=stop).start()
        outcome = run(job(fault="hang", report=str(tmp_path)), timeout=8)
        assert outcome.error.kind == "timeout"
        assert gone(_pids(tmp_path)[0])

    def test_getting_the_model_does_not_count(self, job: Callable[..., Any], run: Callable[..., Any]) -> None:
        assert run(job(fetch=6), timeout=5).error is None

    def test_but_does_not_take_for_ever(
        self, job: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(childs, "FETCH_SECONDS", 1.0)
        error = run(job(fetch=3600), timeout=5).error
        assert (error.kind, error.phase) == ("timeout", "fetching the model")


class TestKilled:
    def test_its_guardian_was(self, job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path) -> None:
        """What is left of the group is ended without it."""

        def kill() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            stat = Path(f"/proc/{_pids(tmp_path)[0]}/stat").read_text()
            os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)

        threading.Thread(target=kill).start()
        error = run(job(fault="hang", report=str(tmp_path))).error
        assert (error.kind, error.type) == ("crash", "Unknown")
        wait_until(lambda: gone(_pids(tmp_path)[0]))

    @pytest.mark.slow
    def test_pytorch_without_memory(self, job: Callable[..., Any], run: Callable[..., Any]) -> None:
        error = run(job(fault="torch allocate")).error
        assert (error.kind, error.type) == ("oom", "RuntimeError")

    @pytest.mark.slow
    def test_by_the_kernel_for_memory(
        self, pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results, start_method: str
    ) -> None:
        """pytest and the experiment share the limit, as in a container; the experiment goes."""
        write_study(
            sweep={"noop.fault": ["fill memory", "none"]},
            execution={"n_cycles": 1, "start_method": start_method},
        )
        group = _limited_group(600 * 2**20)
        try:
            done = subprocess.run(
                [
                    "sh",
                    "-c",
                    f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m pytest study.yaml -p llem",
                ],
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            wait_until(lambda: not (group / "cgroup.procs").read_text().strip())
            group.rmdir()
        assert done.returncode == pytest.ExitCode.TESTS_FAILED
        assert results.statuses() == {"fault=fill%20memory": "failed", "fault=none": "completed"}
        (error,) = [entry["error"] for entry in results.manifest["experiments"] if entry["error"]]
        assert (error["kind"], error["phase"]) == ("oom", "measuring")
        assert error["message"] == "the kernel killed the process: there was no memory left"


def _limited_group(size: Any) -> Any:
    """Return a new control group whose processes may take so many bytes; skip where none can be made."""
    version_1 = (CGROUPS / "memory" / "cgroup.procs").exists()
    group = (CGROUPS / "memory" if version_1 else CGROUPS) / f"llem-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(size))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group with a limit can be made: {error}")
    return group


class TestTheKernelsCount:
    @pytest.mark.parametrize(
        ("membership", "counter"),
        [
            ("0::/job/7\n", "job/7/memory.events"),
            ("0::/a/place/on/the/host\n", "memory.events"),
            ("4:memory:/job/7\n0::/\n", "memory/job/7/memory.oom_control"),
            ("4:cpu,memory:/on/the/host\n0::/\n", "memory/memory.oom_control"),
        ],
    )
    def test_is_that_of_the_own_control_group(self, tmp_path: Path, membership: str, counter: str) -> None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
        (tmp_path / "proc" / "vmstat").write_text("oom_kill 99\n")
        (tmp_path / counter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / counter).write_text("oom 7\noom_kill 3\n")
        assert oom_kills(tmp_path / "proc", tmp_path) == 3

    def test_or_else_the_machines(self, tmp_path: Path) -> None:
        (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 5\n")
        assert oom_kills(tmp_path, tmp_path) == 5

    def test_or_nobodys(self, tmp_path: Path) -> None:
        assert oom_kills(tmp_path, tmp_path) is None


class TestMuch:
    def test_a_result_of_50_mb_is_intact(self, job: Callable[..., Any], run: Callable[..., Any]) -> None:
        outcome = run(job(filler=50_000_000))
        assert outcome.error is None
        result = ExperimentResult.model_validate_json(outcome.result)
        assert result.engine.settings["filler"] == "x" * 50_000_000

    def test_a_gigabyte_of_output_is_not_held(
        self, pytester: pytest.Pytester, write_study: Callable[..., Path]
    ) -> None:
        """Measured where pytest runs: its peak memory is far below what was written."""
        write_study(noop={"fault": "pour"}, sweep={"n": [1]}, execution={"n_cycles": 1})
        pytester.makeconftest(
            """
            import pathlib

            def pytest_unconfigure(config):
                status = pathlib.Path("/proc/self/status").read_text()
                (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
                pathlib.Path("peak").write_text(str(int(peak) * 1024))
            """
        )
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
        assert int((pytester.path / "peak").read_text()) < 300_000_000

    def test_a_closed_event_channel_costs_nothing(self, job: Callable[..., Any], run: Callable[..., Any]) -> None:
        assert run(job(fault="close")).error is None


class TestPytestIsKilled:
    @pytest.mark.parametrize("fault", ["hang", "hold the lock"])
    def test_nothing_outlives_it(
        self,
        pytester: pytest.Pytester,
        write_study: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        fault: str,
        start_method: str,
    ) -> None:
        for name in ("family", "notes", "temporary"):
            (pytester.path / name).mkdir()
        monkeypatch.setenv("TMPDIR", str(pytester.path / "temporary"))
        options = {
            name: str(pytester.path / folder) for name, folder in (("family", "family"), ("report", "notes"))
        }
        write_study(noop={"fault": fault, **options}, sweep={"n": [1]}, execution={"start_method": start_method})
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"], stdout=subprocess.DEVNULL
        )
        wait_until(lambda: len(_pids(pytester.path / "family")) == 3)
        run.kill()
        run.wait()
        pids = _pids(pytester.path / "family") + _pids(pytester.path / "notes")
        assert len(pids) == 4
        wait_until(lambda: all(map(gone, pids)), 30)
        wait_until(lambda: not list((pytester.path / "temporary").glob("llem-*")), 30)

    def test_nor_xdists_controller(
        self, pytester: pytest.Pytester, write_study: Callable[..., Path], start_method: str
    ) -> None:
        """Its workers take some seconds to notice; their experiments do not."""
        (pytester.path / "notes").mkdir()
        write_study(
            noop={"fault": "hang", "report": str(pytester.path / "notes")},
            sweep={"n": [1]},
            execution={"start_method": start_method},
        )
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-n", "1"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: any((pytester.path / "notes").iterdir()))
        (xdist,) = [child.pid for child in psutil.Process(run.pid).children()]
        run.kill()
        run.wait()
        wait_until(lambda: all(map(gone, _pids(pytester.path / "notes"))), 30)
        assert not gone(xdist), "the experiment did not wait for that"


def test_sys_path_may_hold_paths(
    job: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("somewhere"), None])
    assert run(job()).error is None


def test_without_file_descriptors_nothing_is_left(
    job: Callable[..., Any],
    run: Callable[..., Any],
    servers: Servers | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    for spare in range(2, 14):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limit[1]))
        try:
            error = run(job()).error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert error is None or error.type == "NotStarted"
        if servers is not None:
            servers.end()
        assert list(tmp_path.iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) == used


def test_the_parent_sleeps_meanwhile(pytester: pytest.Pytester, write_study: Callable[..., Path]) -> None:
    """Processor time of pytest's process over 5 s of an experiment that sleeps: below 1 % of a core."""
    write_study(
        noop={"seconds": 7}, sweep={"n": [1]}, execution={"n_cycles": 1}, measurement={"min_window_seconds": 0}
    )
    pytester.makeconftest(
        """
        import pathlib, threading, time

        def watch():
            while True:
                time.sleep(1)
                children = [p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if busy(p)]
                if children:
                    time.sleep(1)
                    before = time.process_time()
                    time.sleep(5)
                    pathlib.Path("used").write_text(str(time.process_time() - before))
                    return

        def busy(path):
            try:
                return str(pathlib.Path.cwd()).encode() in (path.parent / "environ").read_bytes() and (
                    b"isolation.worker" in path.read_bytes()
                )
            except OSError:
                return False

        def pytest_runtest_call(item):
            threading.Thread(target=watch, daemon=True).start()
        """
    )
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    assert float((pytester.path / "used").read_text()) < 0.05


def test_the_guardian_imports_little() -> None:
    """Every experiment waits for it to start."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(len(sys.modules), 'pytest_llem' in sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, guardian.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, ours = done.stdout.split()
    assert int(count) < 100
    assert ours == "False"
