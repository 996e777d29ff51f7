"""The server that experiments are forked from: what it holds, what it shares, and when it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import psutil
import pytest

from pytest_llem.isolation.launcher import run_isolated
from pytest_llem.isolation.server import Servers
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import Results
from tests.support.processes import gone, wait_until

#: An engine whose import does what each test says.
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


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.end()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def read() -> Any:
        files = sorted((tmp_path / "notes").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(file.read_text()) for file in files]

    return read


@pytest.fixture
def engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Callable[..., Any], notes: Callable[..., Any]
) -> Callable[..., Any]:
    """Return what makes a job for an engine with something in its module."""

    def make(at_import: str = "", name: str = "forked_engine", **options: Any) -> Any:
        import textwrap
        from dataclasses import replace

        text = textwrap.dedent(ENGINE.format(at_import=textwrap.indent(at_import, "    ").lstrip()))
        (tmp_path / f"{name}.py").write_text(text)
        made = job()
        config = {k: v for k, v in made.config.items() if k != "noop"}
        backend = f"{name}:Engine"
        return replace(made, config=config | {"backend": backend, backend: options}, python_path=[str(tmp_path)])

    return make


def _server() -> Any:
    """Return the one forkserver of this process: the child of a guardian that is its child."""
    guardians = [one for one in psutil.Process().children() if "pytest_llem.isolation.forkserver" in one.cmdline()]
    (guardian,) = guardians
    (server,) = guardian.children()
    return server


def _links(pid: Any) -> Any:
    return [str(Path(file).readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]


class TestTheServer:
    def test_experiments_do_not_import_again(
        self, servers: Servers, engine: Callable[..., Any], notes: Callable[..., Any]
    ) -> None:
        jobs = engine()
        outcomes = [run_isolated(jobs, servers=servers) for _ in range(3)]
        assert [outcome.error for outcome in outcomes] == [None] * 3
        imported_by = {note["imported_by"] for note in notes()}
        assert imported_by == {_server().pid}
        assert len({note["pid"] for note in notes()} | imported_by) == 4
        starts = [ExperimentResult.model_validate_json(outcome.result).start for outcome in outcomes]
        assert {start.method for start in starts} == {"forkserver"}
        assert all(start.began_at <= start.ready_at for start in starts)

    def test_it_has_one_thread_and_no_device(
        self, servers: Servers, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it is seen from outside, with the engine, the class of the model and all that these bring."""
        pytest.importorskip("torch")
        monkeypatch.setenv("OMP_NUM_THREADS", "4")  # some libraries start threads as they are imported
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
        from dataclasses import replace

        tiny = job()
        config = {**tiny.config, "backend": "pytorch", "model": "builtin:tiny-llama"}
        config = {k: v for k, v in config.items() if k != "noop"}
        tiny = replace(tiny, config=config | {"baseline": {"enabled": False}})
        digests = set()
        for _ in range(2):
            outcome = run_isolated(tiny, servers=servers)
            assert outcome.error is None
            digests.add(ExperimentResult.model_validate_json(outcome.result).tokens.output_digest)
            server = _server()
            assert server.num_threads() == 1
            mapped = Path(f"/proc/{server.pid}/maps").read_text()
            assert "libtorch" in mapped, "it has imported what is slow"
            assert not [link for link in _links(server.pid) if link.startswith("/dev/nvidia")]
            assert "libcuda.so" not in mapped, "nobody has asked for the driver"
        spawned = ExperimentResult.model_validate_json(run_isolated(tiny).result)
        assert digests == {spawned.tokens.output_digest}, "the same tokens, however it was started"

    def test_libraries_that_start_threads_are_kept_from_it(
        self, servers: Servers, engine: Callable[..., Any]
    ) -> None:
        """In an environment with scikit-learn, transformers brings pandas and pyarrow."""
        pytest.importorskip("pyarrow")
        for _ in range(2):
            assert run_isolated(engine("import pyarrow"), servers=servers).error is None
            assert _server().num_threads() == 1

    def test_it_keeps_no_files_and_no_memory(self, servers: Servers, job: Callable[..., Any]) -> None:
        seen = []
        for _ in range(12):
            assert run_isolated(job(), servers=servers).error is None
            server = _server()
            seen.append((len(_links(server.pid)), server.memory_info().rss))
        assert len({files for files, _ in seen}) == 1
        assert seen[-1][1] - seen[1][1] < 1_000_000

    @pytest.mark.parametrize(
        ("at_import", "reason"),
        [
            (
                "import threading, time; threading.Thread(target=time.sleep, args=(5,)).start()",
                "there are 2 threads",
            ),
            (
                "import types; sys.modules['torch'] = types.SimpleNamespace(\n"
                "    cuda=types.SimpleNamespace(is_initialized=lambda: True))",
                "CUDA is initialised",
            ),
        ],
    )
    def test_what_cannot_be_forked_is_refused(
        self, servers: Servers, engine: Callable[..., Any], job: Callable[..., Any], at_import: str, reason: str
    ) -> None:
        outcome = run_isolated(engine(at_import), servers=servers)
        assert outcome.error.kind == "preflight"
        assert outcome.error.message == (
            f"engine 'forked_engine:Engine' cannot be forked: once it is imported, {reason}; "
            "leave execution.start_method at spawn"
        )
        assert run_isolated(engine(at_import)).error is None
        assert run_isolated(job(), servers=servers).error is None, "another server takes its place"

    def test_what_its_import_raises_is_the_experiments_failure(
        self, servers: Servers, engine: Callable[..., Any]
    ) -> None:
        jobs = engine("print('a word'); raise ValueError('not today')")
        forked, spawned = run_isolated(jobs, servers=servers), run_isolated(jobs)
        assert (forked.error.kind, forked.error.message) == (spawned.error.kind, spawned.error.message)
        assert "ValueError: not today" in forked.error.message
        assert "a word" in forked.output

    @pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 11)"])
    def test_so_is_its_death_there(
        self, servers: Servers, engine: Callable[..., Any], job: Callable[..., Any], end: str
    ) -> None:
        jobs = engine(end)
        forked, spawned = run_isolated(jobs, servers=servers).error, run_isolated(jobs).error
        assert (forked.kind, forked.type, forked.message) == (spawned.kind, spawned.type, spawned.message)
        assert run_isolated(job(), servers=servers).error is None

    @pytest.mark.parametrize(
        "at_import",
        [
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
            "import time; os.fork() or (time.sleep(60), os._exit(0))",
        ],
        ids=["blocks signals", "leaves a child"],
    )
    def test_nobody_waits_for_what_its_import_has_done(
        self, servers: Servers, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, at_import: str
    ) -> None:
        """Its end is seen although a signal is blocked, and although somebody else has the pipes."""
        monkeypatch.setattr("pytest_llem.isolation.child.GRACE_SECONDS", 1000.0)
        monkeypatch.setattr("pytest_llem.isolation.child.REAP_SECONDS", 1000.0)
        jobs, outcomes = engine(at_import), []
        run = threading.Thread(target=lambda: outcomes.append(run_isolated(jobs, servers=servers)), daemon=True)
        run.start()
        run.join(60)
        assert [outcome.error for outcome in outcomes] == [None]

    @pytest.mark.parametrize("value", ["None", "io.StringIO()"])
    def test_its_import_may_put_anything_in_place_of_the_streams(
        self, servers: Servers, engine: Callable[..., Any], value: str
    ) -> None:
        jobs = engine(f"import io; sys.stdout = sys.stderr = {value}")
        for _ in range(2):
            assert run_isolated(jobs, servers=servers).error is None

    def test_an_import_that_hangs_is_ended_at_the_deadline(
        self, servers: Servers, engine: Callable[..., Any]
    ) -> None:
        error = run_isolated(engine("import time; time.sleep(3600)"), servers=servers, timeout=9).error
        assert (error.kind, error.message) == ("timeout", "not done after 9 s")
        assert "forked_engine.py" in error.traceback, "where it was is told"
        assert not [one for one in psutil.Process().children() if "guardian" in " ".join(one.cmdline())]


class TestTheProcess:
    def test_its_environment_is_that_of_its_turn(
        self,
        servers: Servers,
        engine: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        jobs = engine()
        for gpus in ("0", "1", None):
            if gpus is None:
                monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
            else:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"with {gpus}")
            assert run_isolated(jobs, servers=servers).error is None
        assert len({note["imported_by"] for note in notes()}) == 1, "no reason for another server"
        environments = [note["environ"] for note in notes()]
        assert [one.get("CUDA_VISIBLE_DEVICES") for one in environments] == ["0", "1", None]
        assert [one["PYTEST_CURRENT_TEST"] for one in environments] == ["with 0", "with 1", "with None"]
        assert {one["PYTHONHASHSEED"] for one in environments} == {"0"}

    def test_what_else_has_changed_takes_another_server(
        self,
        servers: Servers,
        engine: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        jobs = engine()
        assert run_isolated(jobs, servers=servers).error is None
        monkeypatch.setenv("A_LIBRARY_READS_IT", "1")
        assert run_isolated(jobs, servers=servers).error is None
        first, second = notes()
        assert first["imported_by"] != second["imported_by"]
        assert gone(first["imported_by"])
        assert second["environ"]["A_LIBRARY_READS_IT"] == "1"

    def test_it_is_as_one_that_was_spawned(
        self,
        servers: Servers,
        job: Callable[..., Any],
        tmp_path: Path,
        engine: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Its signals, limits, current folder, open files and streams."""
        monkeypatch.chdir(tmp_path)
        look = (
            "def look():\n"
            "    import signal, resource\n"
            "    return {\n"
            "        'signals': {str(n): str(signal.getsignal(n)) for n in signal.valid_signals()},\n"
            "        'cwd': os.getcwd(),\n"
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
        assert run_isolated(jobs, servers=servers).error is None
        assert run_isolated(jobs).error is None
        forked, spawned = [json.loads(file.read_text()) for file in (tmp_path / "notes").glob("*.look")]
        assert forked == spawned

    def test_numpys_generator_is_not_shared(
        self, servers: Servers, engine: Callable[..., Any], tmp_path: Path
    ) -> None:
        pytest.importorskip("numpy")
        drawn = "import numpy, atexit\natexit.register(lambda: Path(os.environ['NOTES'], f'{os.getpid()}.drawn')"
        jobs = engine(f"{drawn}.write_text(str(numpy.random.random())))")
        for _ in range(2):
            assert run_isolated(jobs, servers=servers).error is None
        first, second = [file.read_text() for file in (tmp_path / "notes").glob("*.drawn")]
        assert first != second


class TestItsEnd:
    def test_when_it_is_killed_its_experiment_fails_and_the_next_has_another(
        self, servers: Servers, job: Callable[..., Any], tmp_path: Path
    ) -> None:
        def kill() -> None:
            wait_until(lambda: any(tmp_path.iterdir()))
            _server().kill()

        threading.Thread(target=kill).start()
        error = run_isolated(job(fault="hang", report=str(tmp_path)), servers=servers).error
        assert (error.kind, error.type) == ("crash", "Unknown")
        assert "forkserver was killed" in error.message
        assert all(gone(int(note.stem)) for note in tmp_path.iterdir())
        assert run_isolated(job(), servers=servers).error is None

    def test_killed_while_it_has_nothing_to_do(self, servers: Servers, job: Callable[..., Any]) -> None:
        assert run_isolated(job(), servers=servers).error is None
        server = _server()
        guardian = server.parent()
        server.kill()
        wait_until(lambda: gone(guardian.pid))
        assert run_isolated(job(), servers=servers).error is None
        assert _server().pid != server.pid

    def test_with_them_goes_all(self, servers: Servers, job: Callable[..., Any]) -> None:
        assert run_isolated(job(), servers=servers).error is None
        server = _server()
        pids, folders = [server.pid, server.parent().pid], [one.folder for _, one in servers._servers.values()]
        servers.end()
        assert all(map(gone, pids))
        assert not any(folder.exists() for folder in folders)

    @pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["serial", "xdist"])
    @pytest.mark.parametrize("how", ["ends", signal.SIGINT, signal.SIGKILL], ids=str)
    def test_with_the_session_it_goes(
        self,
        pytester: pytest.Pytester,
        write_study: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        how: Signals | str,
        workers: tuple[str, ...],
    ) -> None:
        (pytester.path / "notes").mkdir()
        (pytester.path / "temporary").mkdir()
        monkeypatch.setenv("TMPDIR", str(pytester.path / "temporary"))
        fault = "none" if how == "ends" else "hang"
        write_study(
            noop={"report": str(pytester.path / "notes"), "fault": fault},
            sweep={"n": [1, 2]},
            execution={"n_cycles": 1, "start_method": "forkserver"},
        )
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *workers]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        family = set()
        if how != "ends":
            wait_until(lambda: any((pytester.path / "notes").iterdir()))
            family = {one.pid for one in psutil.Process(run.pid).children(recursive=True)}
            assert len(family) >= 4 + len(workers) // 2
            run.send_signal(how)
        else:
            while run.poll() is None:
                try:
                    family |= {one.pid for one in psutil.Process(run.pid).children(recursive=True)}
                except psutil.NoSuchProcess:
                    break
                time.sleep(0.02)
            assert len(family) >= 5
        run.wait(60)
        wait_until(lambda: all(map(gone, family)), 0 if how == "ends" else 30)
        left = lambda: {one.name for one in (pytester.path / "temporary").glob("llem-*")}  # noqa: E731
        wait_until(lambda: all(name.startswith("llem-board") for name in left()), 30)


def test_each_interpreter_has_its_own(servers: Servers, job: Callable[..., Any], tmp_path: Path) -> None:
    """One is reached through a link: to it that is another."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexport PYTHONPATH={os.environ["PYTHONPATH"]}\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    for _ in range(2):
        for python in (None, str(other)):
            assert run_isolated(job(python=python), servers=servers).error is None
    guardians = [one for one in psutil.Process().children() if "pytest_llem.isolation.forkserver" in one.cmdline()]
    assert len(guardians) == 2
    assert {one.cmdline()[6] for one in guardians} == {sys.executable, str(other)}


def test_another_study_has_another(
    pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results
) -> None:
    """And one that spawns has none."""
    for name, method in (("a.yaml", "forkserver"), ("b.yaml", "forkserver"), ("c.yaml", "spawn")):
        write_study(name, name=name[0], sweep={"n": [1, 2]}, execution={"n_cycles": 1, "start_method": method})
    pytester.makeconftest(
        """
        import pathlib, psutil

        def pytest_runtest_logfinish(nodeid):
            children = psutil.Process().children()  # guardians
            running = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
            found = [one.pid for one in running if "pytest_llem.isolation.forkserver" in one.cmdline()]
            with open("seen", "a") as file:
                print(nodeid[0], *found, file=file)
        """
    )
    pytester.runpytest_subprocess("a.yaml", "b.yaml", "c.yaml", "-p", "llem").assert_outcomes(passed=6)
    seen = [line.split() for line in (pytester.path / "seen").read_text().splitlines()]
    assert [line[0] for line in seen] == list("aabbcc")
    assert [len(line) for line in seen] == [2, 2, 2, 2, 1, 1]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0][1] != seen[2][1]


class TestOption:
    @pytest.mark.parametrize("how", [["--llem-start-method", "{}"], ["-o", "llem_start_method={}"]])
    def test_it_wins_over_the_study(
        self, pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results, how: list[str]
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1, "start_method": "spawn"})
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *(one.format("forkserver") for one in how))
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(["llem: noop * · forkserver*"])
        assert results.study_result["measurement_protocol"]["start_method"] == "forkserver"
        (entry,) = results.manifest["experiments"]
        assert results.read(entry["result_file"])["start"]["method"] == "forkserver"

    def test_the_default_is_spawn(
        self, pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
        run.stdout.no_fnmatch_line("*forkserver*")
        assert results.study_result["measurement_protocol"]["start_method"] == "spawn"

    def test_it_is_in_no_hash(self, pytester: pytest.Pytester, write_study: Callable[..., Path]) -> None:
        hashes = set()
        for method in ("spawn", "forkserver"):
            write_study(execution={"start_method": method})
            pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json")
            plan = json.loads((pytester.path / "plan.json").read_text())
            assert plan["start_method"] == method
            hashes.add(plan["study_design_hash"])
        assert len(hashes) == 1

    @pytest.mark.parametrize("text", ["fork", ""])
    def test_what_cannot_be_meant_is_a_usage_error(self, pytester: pytest.Pytester, text: str) -> None:
        result = pytester.runpytest("-p", "llem", "--llem-start-method", text)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        told = f"ERROR: --llem-start-method: must be one of spawn, forkserver (got {text!r})"
        assert told in result.errlines

    def test_isolated_experiment_obeys_it(self, pytester: pytest.Pytester, noop_engine: None) -> None:
        pytester.makepyfile(
            """
            FIELDS = {"model": "none", "backend": "noop", "n": 1, "energy": {"backend": "estimate"},
                      "warmup": {"enabled": False}, "measurement": {"min_window_seconds": 0}}

            def test_one(isolated_experiment):
                assert isolated_experiment(FIELDS).start.method == "forkserver"
                assert isolated_experiment(FIELDS).start.method == "forkserver"
            """
        )
        run = pytester.runpytest_subprocess("-p", "llem", "--llem-start-method", "forkserver")
        run.assert_outcomes(passed=1)
