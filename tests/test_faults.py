"""Faults of an experiment's process: the study gets a clear error, and no process or file is left."""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.hardware.cgroups import oom_kills
from pytest_llem.isolation import child as childs
from pytest_llem.isolation import supervisor, worker
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

CGROUPS = Path("/sys/fs/cgroup")


MakeJob = Callable[..., Job]
Run = Callable[..., Outcome]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file become larger than *size* bytes, in this process and in those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def warm_servers() -> Iterator[ForkServers]:
    servers = ForkServers()
    yield servers
    servers.end()


@pytest.fixture
def fork(job: MakeJob, warm_servers: ForkServers) -> Run:
    """Return a function that runs a job in a process forked from a running forkserver."""
    if not warm_servers._forkservers:
        assert run_isolated(job(), forkservers=warm_servers).error is None
    return functools.partial(run_isolated, forkservers=warm_servers)


class HourIn:
    """A clock, and a watcher of an experiment, in one of whose phases the clock goes on by an hour."""

    refresh_every_s = 1.0

    def __init__(self, phase: str) -> None:
        self._phase, self._passed = phase, 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def see(self, seen: Any) -> None:
        if getattr(seen, "phase", None) == self._phase:
            self._passed = 3600.0

    def refresh(self) -> None:
        pass


@pytest.fixture
def hour_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], HourIn]:
    """Return a function that has the hour of a phase pass for the deadlines of experiments."""

    def make(phase: str) -> HourIn:
        made = HourIn(phase)
        monkeypatch.setattr(childs, "time", made)
        return made

    return make


def _error(outcome: Outcome) -> ErrorRecord:
    assert outcome.error is not None
    return outcome.error


def _script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def _pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.iterdir()]


class TestBeforeItsFirstLine:
    def test_missing_interpreter_is_a_crash(self, job: MakeJob, run: Run) -> None:
        error = _error(run(job(python="/nowhere/python"), timeout=3600))
        assert (error.kind, error.type) == ("crash", "NotStarted")
        assert error.message == "the process could not be started: /nowhere/python: No such file or directory"

    def test_interpreter_that_is_not_executable_is_a_crash(self, job: MakeJob, run: Run, tmp_path: Path) -> None:
        (tmp_path / "python").write_text("text")
        error = _error(run(job(python=str(tmp_path / "python")), timeout=3600))
        assert (error.type, error.message) == (
            "NotStarted",
            f"the process could not be started: {tmp_path}/python: Permission denied",
        )

    def test_interpreter_that_cannot_import_the_plugin_is_a_crash(
        self, job: MakeJob, run: Run, tmp_path: Path
    ) -> None:
        python = _script(tmp_path / "python", f"exec {sys.executable} -I -c 'import nothing_of_that_name'")
        outcome = run(job(python=python), timeout=3600)
        error = _error(outcome)
        assert (error.kind, error.phase) == ("crash", "starting")
        assert error.message == "the process ended with status 1 and left no result"
        assert "No module named 'nothing_of_that_name'" in outcome.output

    def test_full_disk_prevents_the_start(
        self, job: MakeJob, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        error = _error(run(job()))
        assert (error.kind, error.type) == ("crash", "NotStarted")
        assert "No such file or directory" in error.message

    def test_modules_in_the_current_folder_are_not_imported(
        self, job: MakeJob, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
        assert run(job()).error is None


class TestHangs:
    @pytest.mark.parametrize(("start_method", "fault"), [slow("spawn", "hang"), ("forkserver", "hold the lock")])
    def test_deadline_ends_the_experiment_and_its_descendants(
        self, job: MakeJob, fork: Run, start_method: str, tmp_path: Path, fault: str
    ) -> None:
        """Its children have left the session, were orphaned, and ignore every signal that can be ignored."""
        for name in ("family", "notes"):
            (tmp_path / name).mkdir()
        options = {"family": str(tmp_path / "family"), "report": str(tmp_path / "notes")}
        run, timeout = (run_isolated, 6) if start_method == "spawn" else (fork, 3)
        error = _error(run(job(fault=fault, **options), timeout=timeout))
        assert (error.kind, error.phase) == ("timeout", "measuring")
        assert error.message == f"not finished after {timeout} s"
        assert "in generate" in (error.traceback or ""), "where it was"
        pids = _pids(tmp_path / "family") + _pids(tmp_path / "notes")
        assert len(pids) == 4
        assert all(map(gone, pids))

    def test_descendants_are_ended_after_the_result(self, job: MakeJob, run: Run, tmp_path: Path) -> None:
        outcome = run(job(family=str(tmp_path)))
        assert outcome.error is None
        assert len(_pids(tmp_path)) >= 3
        assert all(map(gone, _pids(tmp_path)))

    @pytest.mark.slow
    def test_deadline_ends_a_stopped_experiment(self, job: MakeJob, fork: Run, tmp_path: Path) -> None:
        def stop() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            os.kill(_pids(tmp_path)[0], signal.SIGSTOP)

        thread = threading.Thread(target=stop)
        thread.start()
        outcome = fork(job(fault="hang", report=str(tmp_path)), timeout=3)
        thread.join()
        assert _error(outcome).kind == "timeout"
        assert gone(_pids(tmp_path)[0])

    def test_deadline_does_not_count_fetching_the_model(
        self, job: MakeJob, fork: Run, hour_in: Callable[[str], HourIn]
    ) -> None:
        assert fork(job(), watcher=hour_in("fetching the model"), timeout=60).error is None

    def test_fetching_the_model_has_a_limit_of_its_own(
        self, job: MakeJob, fork: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(childs, "FETCH_SECONDS", 0.3)
        error = _error(fork(job(fetch=3600), timeout=60))
        assert (error.kind, error.phase) == ("timeout", "fetching the model")

    def test_load_has_a_limit_of_its_own(self, job: MakeJob, fork: Run) -> None:
        error = _error(fork(replace(job(load=3600), max_load_seconds=0.3), timeout=60))
        assert (error.kind, error.phase) == ("timeout", "loading")
        assert error.message == "not loaded after 0.3 s"

    def test_limit_of_the_load_ends_with_it(
        self, job: MakeJob, fork: Run, hour_in: Callable[[str], HourIn]
    ) -> None:
        one = replace(job(), max_load_seconds=60)
        assert fork(one, watcher=hour_in("measuring"), timeout=7200).error is None


class TestKilled:
    def test_killed_supervisor_leaves_no_experiment(self, job: MakeJob, run: Run, tmp_path: Path) -> None:
        def kill() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            stat = Path(f"/proc/{_pids(tmp_path)[0]}/stat").read_text()
            os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        error = _error(run(job(fault="hang", report=str(tmp_path))))
        thread.join()
        assert (error.kind, error.type) == ("crash", "Unknown")
        wait_until(lambda: gone(_pids(tmp_path)[0]))

    @pytest.mark.slow
    def test_pytorch_out_of_memory_is_oom(self, job: MakeJob) -> None:
        error = _error(run_isolated(job(fault="torch allocate")))
        assert (error.kind, error.type) == ("oom", "RuntimeError")

    @pytest.mark.slow
    def test_kill_by_the_oom_killer_is_oom(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, start_method: str
    ) -> None:
        """pytest and the experiment share the limit, as in a container. Only the experiment is killed."""
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
        assert error["message"] == "the kernel killed the process: out of memory"


def _limited_group(size: int) -> Path:
    """Return a new control group with a memory limit in bytes; skip if none can be made."""
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


class TestOomKills:
    @pytest.mark.parametrize(
        ("membership", "counter"),
        [
            ("0::/job/7\n", "job/7/memory.events"),
            ("0::/a/place/on/the/host\n", "memory.events"),
            ("4:memory:/job/7\n0::/\n", "memory/job/7/memory.oom_control"),
            ("4:cpu,memory:/on/the/host\n0::/\n", "memory/memory.oom_control"),
        ],
    )
    def test_oom_kills_of_the_control_group_are_counted(
        self, tmp_path: Path, membership: str, counter: str
    ) -> None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
        (tmp_path / "proc" / "vmstat").write_text("oom_kill 99\n")
        (tmp_path / counter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / counter).write_text("oom 7\noom_kill 3\n")
        assert oom_kills(tmp_path / "proc", tmp_path) == 3

    def test_without_control_group_oom_kills_of_the_machine_count(self, tmp_path: Path) -> None:
        (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 5\n")
        assert oom_kills(tmp_path, tmp_path) == 5

    def test_oom_kill_count_is_unknown_without_any_counter(self, tmp_path: Path) -> None:
        assert oom_kills(tmp_path, tmp_path) is None


class TestMuch:
    def test_result_of_50_mb_is_intact(self, job: MakeJob, fork: Run) -> None:
        outcome = fork(job(filler=50_000_000))
        assert outcome.result is not None
        result = ExperimentResult.model_validate_json(outcome.result)
        assert result.engine.settings["filler"] == "x" * 50_000_000

    @pytest.mark.slow
    def test_output_of_400_mb_is_not_held_in_memory(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        """The peak memory of the pytest process is far below the size of the output."""
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

    def test_closed_event_channel_does_not_fail_the_experiment(self, job: MakeJob, run: Run) -> None:
        assert run(job(fault="close")).error is None


class TestPytestIsKilled:
    @pytest.mark.parametrize(("start_method", "fault"), [slow("spawn", "hang"), ("forkserver", "hold the lock")])
    def test_no_process_and_no_file_outlives_pytest(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
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

    @pytest.mark.slow
    def test_no_experiment_outlives_xdists_controller(
        self, pytester: pytest.Pytester, write_study: WriteStudy, start_method: str
    ) -> None:
        """The experiment ends even if the worker is suspended and so cannot notice."""
        (pytester.path / "notes").mkdir()
        write_study(
            noop={"fault": "hang", "report": str(pytester.path / "notes")},
            sweep={"n": [1]},
            execution={"start_method": start_method},
        )
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-n", "1"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: any((pytester.path / "notes").iterdir()))
        (worker,) = psutil.Process(run.pid).children()
        worker.suspend()
        run.kill()
        run.wait()
        try:
            wait_until(lambda: all(map(gone, _pids(pytester.path / "notes"))), 30)
        finally:
            worker.kill()


def test_result_that_does_not_fit_on_the_disk_is_located(job: MakeJob, run: Run) -> None:
    with file_size_limit(50_000):
        error = _error(run(job(filler=100_000)))
    assert (error.kind, error.type, error.traceback) == ("crash", "UnwritableError", None)
    assert error.message.endswith("/result.json'")


def test_file_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    with file_size_limit(50_000), pytest.raises(worker.UnwritableError, match=r"/result\.json'$"):
        worker.write_whole(tmp_path / "result.json", "x" * 100_000)
    assert not list(tmp_path.iterdir()), "the error, which is written next, may need the room"


def test_sys_path_may_hold_paths(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("somewhere"), None])
    assert run_isolated(job()).error is None


def test_nothing_is_left_if_file_descriptors_run_out(
    job: MakeJob, run: Run, servers: ForkServers | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of missing file descriptors."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    for spare in range(2, 50):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limit[1]))
        try:
            error = run(job()).error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        if servers is not None:
            servers.end()
        assert list(tmp_path.iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) == used
        if error is None:
            break
        assert error.type == "NotStarted"
    assert error is None, "these are enough"
    assert spare > 5


@pytest.mark.slow
def test_pytest_sleeps_while_an_experiment_runs(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    """For half a second of the experiment, pytest's main thread sleeps and hardly wakes up."""
    notes = pytester.mkdir("notes")
    write_study(noop={"seconds": 3, "report": str(notes)}, sweep={"n": [1]}, execution={"n_cycles": 1})
    seen: list[tuple[str, int]] = []

    def watch() -> None:
        wait_until(lambda: any(notes.iterdir()))
        time.sleep(0.5)  # it has announced that it measures
        for _ in range(10):
            seen.append(_main_thread())
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    thread.join()
    assert {state for state, _ in seen} == {"S"}
    assert seen[-1][1] - seen[0][1] <= 5


def _main_thread() -> tuple[str, int]:
    """Return the state of the main thread, and its number of context switches."""
    lines = Path(f"/proc/self/task/{os.getpid()}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    switches = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
    return fields["State"].split()[0], switches


def test_supervisor_imports_little() -> None:
    """Every experiment waits for the supervisor's start."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(len(sys.modules), 'pytest_llem' in sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, supervisor.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, ours = done.stdout.split()
    assert int(count) < 100
    assert ours == "False"
