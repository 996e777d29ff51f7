"""The forkserver: what it imports, shares and refuses, and when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow
from tests.support.processes import children_called, gone, wait_until

#: An engine with code of each test in its module.
ENGINE = """
    import json, os, sys
    from pathlib import Path
    from noop_engine import NoopEngine
    {at_import}

    IMPORTED_BY = os.getpid()

    class Engine(NoopEngine):
        def __init__(self, config, context):
            super().__init__(config, context)
            note = {{"imported_by": IMPORTED_BY, "pid": os.getpid(), "environ": dict(os.environ)}}
            Path(os.environ["NOTES"], f"{{os.getpid()}}.json").write_text(json.dumps(note))
"""


MakeJob = Callable[..., Job]
Notes = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def forkservers() -> Iterator[ForkServers]:
    forkservers = ForkServers()
    yield forkservers
    forkservers.end()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def read() -> list[dict[str, Any]]:
        files = sorted((tmp_path / "notes").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(file.read_text()) for file in files]

    return read


@pytest.fixture
def engine(tmp_path: Path, job: MakeJob, notes: Notes) -> MakeJob:
    """Return a function that makes a job for an engine with the given code in its module."""

    def make(at_import: str = "", name: str = "forked_engine", **options: Any) -> Job:
        text = textwrap.dedent(ENGINE.format(at_import=textwrap.indent(at_import, "    ").lstrip()))
        (tmp_path / f"{name}.py").write_text(text)
        made = job()
        config = {k: v for k, v in made.config.items() if k != "noop"}
        backend = f"{name}:Engine"
        return replace(made, config=config | {"backend": backend, backend: options}, python_path=[str(tmp_path)])

    return make


def _server() -> psutil.Process:
    """Return the only forkserver of this process: the child of a supervisor, which is this process's child."""
    (supervisor,) = children_called("pytest_llem.isolation.forkserver")
    (server,) = supervisor.children()
    return server


def _links(pid: int) -> list[str]:
    return [str(Path(file).readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]


def _error(outcome: Outcome) -> ErrorRecord:
    assert outcome.error is not None
    return outcome.error


def _result(outcome: Outcome) -> ExperimentResult:
    assert outcome.result is not None
    return ExperimentResult.model_validate_json(outcome.result)


class TestTheServer:
    def test_experiments_share_what_the_server_imported(
        self, forkservers: ForkServers, engine: MakeJob, notes: Notes
    ) -> None:
        jobs = engine()
        outcomes = [run_isolated(jobs, forkservers=forkservers) for _ in range(3)]
        assert [outcome.error for outcome in outcomes] == [None] * 3
        imported_by = {note["imported_by"] for note in notes()}
        assert imported_by == {_server().pid}
        assert len({note["pid"] for note in notes()} | imported_by) == 4
        for outcome in outcomes:
            start = _result(outcome).start
            assert start is not None
            assert start.method == "forkserver"
            assert start.began_at <= start.ready_at

    @pytest.mark.slow
    def test_server_with_torch_has_one_thread_and_no_device(
        self, forkservers: ForkServers, job: MakeJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Checked from outside, with the engine, the model's class and their imports."""
        pytest.importorskip("torch")
        monkeypatch.setenv("OMP_NUM_THREADS", "4")  # some libraries start threads as they are imported
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
        tiny = job()
        config = {**tiny.config, "backend": "pytorch", "model": "builtin:tiny-llama"}
        config = {k: v for k, v in config.items() if k != "noop"}
        tiny = replace(tiny, config=config | {"baseline": {"enabled": False}})
        digests = set()
        for _ in range(2):
            outcome = run_isolated(tiny, forkservers=forkservers)
            assert outcome.error is None
            digests.add(_result(outcome).tokens.output_digest)
            server = _server()
            assert server.num_threads() == 1
            mapped = Path(f"/proc/{server.pid}/maps").read_text()
            assert "libtorch" in mapped, "it has imported what is slow"
            assert not [link for link in _links(server.pid) if link.startswith("/dev/nvidia")]
            assert "libcuda.so" not in mapped, "nobody has asked for the driver"
        spawned = _result(run_isolated(tiny))
        assert digests == {spawned.tokens.output_digest}, "the same tokens, however it was started"

    def test_libraries_start_no_threads_in_the_server(self, forkservers: ForkServers, engine: MakeJob) -> None:
        """If scikit-learn is installed, transformers imports pandas and pyarrow."""
        pytest.importorskip("pyarrow")
        for _ in range(2):
            assert run_isolated(engine("import pyarrow"), forkservers=forkservers).error is None
            assert _server().num_threads() == 1

    @pytest.mark.slow
    def test_server_keeps_no_files_and_no_memory_of_experiments(
        self, forkservers: ForkServers, job: MakeJob
    ) -> None:
        seen = []
        for _ in range(12):
            assert run_isolated(job(), forkservers=forkservers).error is None
            server = _server()
            seen.append((len(_links(server.pid)), server.memory_info().rss))
        assert len({files for files, _ in seen}) == 1
        assert seen[-1][1] - seen[1][1] < 1_000_000

    @pytest.mark.parametrize(
        ("at_import", "reason"),
        [
            (
                "import threading, time; threading.Thread(None, time.sleep, 'flusher', args=(2,)).start()",
                "there are 2 threads (flusher)",
            ),
            (
                "import types; sys.modules['torch'] = types.SimpleNamespace(\n"
                "    cuda=types.SimpleNamespace(is_initialized=lambda: True))",
                "CUDA is initialised",
            ),
        ],
    )
    def test_engine_that_cannot_be_forked_is_refused(
        self, forkservers: ForkServers, engine: MakeJob, job: MakeJob, at_import: str, reason: str
    ) -> None:
        error = _error(run_isolated(engine(at_import), forkservers=forkservers))
        assert error.kind == "preflight"
        assert error.message == (
            f"engine 'forked_engine:Engine' cannot be forked: once it is imported, {reason}; "
            "leave execution.start_method at spawn"
        )
        assert run_isolated(engine(at_import)).error is None
        assert run_isolated(job(), forkservers=forkservers).error is None, "another server takes its place"

    def test_exception_at_import_fails_as_when_spawned(self, forkservers: ForkServers, engine: MakeJob) -> None:
        jobs = engine("print('a word'); raise ValueError('not today')")
        forked, spawned = run_isolated(jobs, forkservers=forkservers), run_isolated(jobs)
        error, expected = _error(forked), _error(spawned)
        assert (error.kind, error.message) == (expected.kind, expected.message)
        assert "ValueError: not today" in error.message
        assert "a word" in forked.output

    @pytest.mark.parametrize("end", ["os._exit(3)", slow("os.kill(os.getpid(), 11)")])
    def test_death_at_import_fails_as_when_spawned(
        self, forkservers: ForkServers, engine: MakeJob, job: MakeJob, end: str
    ) -> None:
        jobs = engine(end)
        forked, spawned = _error(run_isolated(jobs, forkservers=forkservers)), _error(run_isolated(jobs))
        assert (forked.kind, forked.type, forked.message) == (spawned.kind, spawned.type, spawned.message)
        assert run_isolated(job(), forkservers=forkservers).error is None

    @pytest.mark.parametrize(
        "at_import",
        [
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
            "import time; os.fork() or (time.sleep(600), os._exit(0))",
        ],
        ids=["blocks signals", "leaves a child"],
    )
    def test_end_is_detected_if_import_blocks_signals_or_keeps_pipes(
        self, forkservers: ForkServers, engine: MakeJob, monkeypatch: pytest.MonkeyPatch, at_import: str
    ) -> None:
        """The import blocks SIGCHLD, or starts a process that inherits the pipes."""
        monkeypatch.setattr("pytest_llem.isolation.child.GRACE_SECONDS", 1000.0)
        monkeypatch.setattr("pytest_llem.isolation.child.REAP_SECONDS", 1000.0)
        jobs = engine(at_import)
        outcomes: list[Outcome] = []
        run = threading.Thread(
            target=lambda: outcomes.append(run_isolated(jobs, forkservers=forkservers)), daemon=True
        )
        run.start()
        run.join(120)
        assert [outcome.error for outcome in outcomes] == [None]

    @pytest.mark.parametrize("value", ["None", "io.StringIO()"])
    def test_import_may_replace_the_standard_streams(
        self, forkservers: ForkServers, engine: MakeJob, value: str
    ) -> None:
        jobs = engine(f"import io; sys.stdout = sys.stderr = {value}")
        for _ in range(2):
            assert run_isolated(jobs, forkservers=forkservers).error is None

    @pytest.mark.slow
    def test_deadline_ends_an_import_that_hangs(self, forkservers: ForkServers, engine: MakeJob) -> None:
        error = _error(run_isolated(engine("import time; time.sleep(3600)"), forkservers=forkservers, timeout=5))
        assert (error.kind, error.message) == ("timeout", "not finished after 5 s")
        assert "forked_engine.py" in (error.traceback or ""), "where it was"
        assert not children_called("supervisor")


class TestTheProcess:
    def test_environment_is_the_one_at_the_start(
        self,
        forkservers: ForkServers,
        engine: MakeJob,
        notes: Notes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        jobs = engine()
        for gpus in ("0", "1", None):
            if gpus is None:
                monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
            else:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"with {gpus}")
            assert run_isolated(jobs, forkservers=forkservers).error is None
        assert len({note["imported_by"] for note in notes()}) == 1, "no reason for another server"
        environments = [note["environ"] for note in notes()]
        assert [one.get("CUDA_VISIBLE_DEVICES") for one in environments] == ["0", "1", None]
        assert [one["PYTEST_CURRENT_TEST"] for one in environments] == ["with 0", "with 1", "with None"]
        assert {one["PYTHONHASHSEED"] for one in environments} == {"0"}

    def test_changed_environment_starts_another_server(
        self,
        forkservers: ForkServers,
        engine: MakeJob,
        notes: Notes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        jobs = engine()
        assert run_isolated(jobs, forkservers=forkservers).error is None
        monkeypatch.setenv("A_LIBRARY_READS_IT", "1")
        assert run_isolated(jobs, forkservers=forkservers).error is None
        first, second = notes()
        assert first["imported_by"] != second["imported_by"]
        assert gone(first["imported_by"])
        assert second["environ"]["A_LIBRARY_READS_IT"] == "1"

    def test_forked_process_is_like_a_spawned_one(
        self,
        forkservers: ForkServers,
        job: MakeJob,
        tmp_path: Path,
        engine: MakeJob,
        notes: Notes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Compares variables, signals, limits, current folder, open files and streams."""
        monkeypatch.chdir(tmp_path)
        look = (
            "def look():\n"
            "    import signal, resource\n"
            "    return {\n"
            "        'signals': {str(n): str(signal.getsignal(n)) for n in signal.valid_signals()},\n"
            "        'cwd': os.getcwd(),\n"
            "        'environ': {n: v for n, v in os.environ.items() if n != 'JE_ARROW_MALLOC_CONF'},\n"
            "        'limits': resource.getrlimit(resource.RLIMIT_NOFILE),\n"
            "        'files': sorted(os.path.basename(os.readlink(file)).split(':')[0]\n"
            "            for file in map(str, Path('/proc/self/fd').iterdir()) if os.path.exists(file)),\n"
            "        'leads': os.getsid(0) == os.getpid() == os.getpgrp(),\n"
            "        'score': Path('/proc/self/oom_score_adj').read_text(),\n"
            "        'daemons': len(os.listdir('/proc/self/task')),\n"
            "    }\n"
            "import atexit\n"
            "def leave():\n"
            "    Path(os.environ['NOTES'], f'{os.getpid()}.look').write_text(json.dumps(look()))\n"
            "atexit.register(leave)\n"
        )
        jobs = engine(look)
        assert run_isolated(jobs, forkservers=forkservers).error is None
        assert run_isolated(jobs).error is None
        forked, spawned = [json.loads(file.read_text()) for file in (tmp_path / "notes").glob("*.look")]
        assert forked == spawned

    def test_numpys_random_state_is_not_shared(
        self, forkservers: ForkServers, engine: MakeJob, tmp_path: Path
    ) -> None:
        pytest.importorskip("numpy")
        drawn = "import numpy, atexit\natexit.register(lambda: Path(os.environ['NOTES'], f'{os.getpid()}.drawn')"
        jobs = engine(f"{drawn}.write_text(str(numpy.random.random())))")
        for _ in range(2):
            assert run_isolated(jobs, forkservers=forkservers).error is None
        first, second = [file.read_text() for file in (tmp_path / "notes").glob("*.drawn")]
        assert first != second


class TestItsEnd:
    def test_killed_server_fails_its_experiment_and_is_replaced(
        self, forkservers: ForkServers, job: MakeJob, tmp_path: Path
    ) -> None:
        def kill() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            _server().kill()

        thread = threading.Thread(target=kill)
        thread.start()
        error = _error(run_isolated(job(fault="hang", report=str(tmp_path)), forkservers=forkservers))
        thread.join()
        assert (error.kind, error.type) == ("crash", "Unknown")
        assert "forkserver was killed" in error.message
        assert all(gone(int(note.stem)) for note in tmp_path.iterdir())
        assert run_isolated(job(), forkservers=forkservers).error is None

    def test_server_killed_between_experiments_is_replaced(self, forkservers: ForkServers, job: MakeJob) -> None:
        assert run_isolated(job(), forkservers=forkservers).error is None
        server = _server()
        supervisor = server.parent()
        assert supervisor is not None
        server.kill()
        wait_until(lambda: gone(supervisor.pid))
        assert run_isolated(job(), forkservers=forkservers).error is None
        assert _server().pid != server.pid

    def test_end_of_the_servers_leaves_no_process_and_no_file(
        self, forkservers: ForkServers, job: MakeJob
    ) -> None:
        assert run_isolated(job(), forkservers=forkservers).error is None
        server = _server()
        pids, folders = [server.pid, server.ppid()], [one.folder for _, one in forkservers._forkservers.values()]
        forkservers.end()
        assert all(map(gone, pids))
        assert not any(folder.exists() for folder in folders)

    @pytest.mark.parametrize(
        ("number", "workers"),
        [(signal.SIGINT, ()), slow(signal.SIGKILL, ()), slow(signal.SIGKILL, ("-n", "1"))],
        ids=["ctrl-c", "kill", "kill, xdist"],
    )
    def test_server_does_not_outlive_a_session_that_is_ended(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        temporary: Path,
        number: signal.Signals,
        workers: tuple[str, ...],
    ) -> None:
        notes = pytester.mkdir("notes")
        write_study(noop={"report": str(notes), "fault": "hang"}, sweep={"n": [1]}, execution=FORKED)
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *workers]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        wait_until(lambda: any(notes.iterdir()))
        family = [one.pid for one in psutil.Process(run.pid).children(recursive=True)]
        assert len(family) >= 4 + len(workers) // 2
        run.send_signal(number)
        run.wait(60)
        wait_until(lambda: all(map(gone, family)), 30)
        wait_until(lambda: not _left(temporary), 30)

    @pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["serial", "xdist"])
    @pytest.mark.slow
    def test_server_ends_with_the_session(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        temporary: Path,
        workers: tuple[str, ...],
    ) -> None:
        write_study(sweep={"n": [1]}, execution=FORKED)
        pytester.makeconftest(
            """
            import os, pathlib, psutil

            def pytest_runtest_logfinish(nodeid):
                family = [psutil.Process(), *psutil.Process().children(recursive=True)]
                pathlib.Path(f"family-{os.getpid()}").write_text(" ".join(str(one.pid) for one in family))
            """
        )
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers)
        run.assert_outcomes(passed=1)
        family = {int(pid) for file in pytester.path.glob("family-*") for pid in file.read_text().split()}
        assert len(family) >= 3 + len(workers) // 2
        assert all(map(gone, family))
        wait_until(lambda: not _left(temporary), 30)


FORKED = {"n_cycles": 1, "start_method": "forkserver"}


@pytest.fixture
def temporary(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of the started sessions."""
    folder = pytester.mkdir("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def _left(temporary: Path) -> list[str]:
    """Return the files that experiments have left."""
    return [one.name for one in temporary.glob("llem-*") if not one.name.startswith("llem-shared")]


def test_each_interpreter_has_a_server_of_its_own(forkservers: ForkServers, job: MakeJob, tmp_path: Path) -> None:
    """The second interpreter is a script that starts the first one."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexport PYTHONPATH={os.environ["PYTHONPATH"]}\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    for _ in range(2):
        for python in (None, str(other)):
            assert run_isolated(job(python=python), forkservers=forkservers).error is None
    supervisors = children_called("pytest_llem.isolation.forkserver")
    assert len(supervisors) == 2
    assert {one.cmdline()[6] for one in supervisors} == {sys.executable, str(other)}


@pytest.mark.slow
def test_each_study_has_a_server_of_its_own(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """A study with start method spawn has none."""
    for name, method in (("a.yaml", "forkserver"), ("b.yaml", "forkserver"), ("c.yaml", "spawn")):
        write_study(name, name=name[0], sweep={"n": [1, 2]}, execution={"n_cycles": 1, "start_method": method})
    pytester.makeconftest(
        """
        from tests.support.processes import children_called

        def pytest_runtest_logfinish(nodeid):
            found = children_called("pytest_llem.isolation.forkserver")  # supervisors
            with open("seen", "a") as file:
                print(nodeid[0], *(one.pid for one in found), file=file)
        """
    )
    pytester.runpytest_inprocess("a.yaml", "b.yaml", "c.yaml", "-p", "llem").assert_outcomes(passed=6)
    seen = [line.split() for line in (pytester.path / "seen").read_text().splitlines()]
    assert [line[0] for line in seen] == list("aabbcc")
    assert [len(line) for line in seen] == [2, 2, 2, 2, 1, 1]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0][1] != seen[2][1]


class TestOption:
    @pytest.mark.parametrize(
        "how", [["--llem-start-method", "forkserver"], ["-o", "llem_start_method=forkserver"]]
    )
    def test_option_and_ini_value_win_over_the_study(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, how: list[str]
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1, "start_method": "spawn"})
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", *how)
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(["llem: noop * · forkserver*"])
        assert results.study_result["measurement_protocol"]["start_method"] == "forkserver"
        (entry,) = results.manifest["experiments"]
        assert results.read(entry["result_file"])["start"]["method"] == "forkserver"

    def test_default_start_method_is_spawn(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
        run.stdout.no_fnmatch_line("*forkserver*")
        assert results.study_result["measurement_protocol"]["start_method"] == "spawn"

    def test_start_method_changes_no_hash(self, pytester: pytest.Pytester, write_study: WriteStudy) -> None:
        hashes = set()
        for method in ("spawn", "forkserver"):
            write_study(execution={"start_method": method})
            pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json")
            plan = json.loads((pytester.path / "plan.json").read_text())
            assert plan["start_method"] == method
            hashes.add(plan["study_design_hash"])
        assert len(hashes) == 1

    @pytest.mark.parametrize("text", ["fork", ""])
    def test_unknown_start_method_is_a_usage_error(self, pytester: pytest.Pytester, text: str) -> None:
        result = pytester.runpytest("-p", "llem", "--llem-start-method", text)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        message = f"ERROR: --llem-start-method: must be one of spawn, forkserver (got {text!r})"
        assert message in result.errlines

    def test_isolated_experiment_uses_the_start_method(self, pytester: pytest.Pytester, noop_engine: None) -> None:
        pytester.makepyfile(
            """
            FIELDS = {"model": "none", "backend": "noop", "n": 1, "energy": {"backend": "estimate"},
                      "warmup": {"enabled": False}, "measurement": {"min_window_seconds": 0}}

            def test_one(isolated_experiment):
                assert isolated_experiment(FIELDS).start.method == "forkserver"
                assert isolated_experiment(FIELDS).start.method == "forkserver"
            """
        )
        run = pytester.runpytest_inprocess("-p", "llem", "--llem-start-method", "forkserver")
        run.assert_outcomes(passed=1)
