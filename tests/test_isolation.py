"""Run experiments in processes of their own: outcomes, output, watchers and cleanup."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.isolation import child as childs
from pytest_llem.isolation import supervisor
from pytest_llem.isolation.child import CappedOutput, Child
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome, collect
from pytest_llem.isolation.worker import RESULT, write_whole
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.requests import Requests
from pytest_llem.results.csv_files import read_csv
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

MakeJob = Callable[..., Job]
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def warm_servers() -> Iterator[ForkServers]:
    forkservers = ForkServers()
    yield forkservers
    forkservers.end()


@pytest.fixture
def fork(warm_servers: ForkServers) -> Run:
    """Return a function that runs a job in a process forked from a shared forkserver."""
    return functools.partial(run_isolated, forkservers=warm_servers)


class Watching:
    """A watcher that keeps the events and counts its calls."""

    def __init__(self, refresh_every_s: float = 60.0) -> None:
        self.refresh_every_s = refresh_every_s
        self.seen: list[Progress] = []
        self.ticks = 0

    def see(self, seen: Progress) -> None:
        self.seen.append(seen)

    def refresh(self) -> None:
        self.ticks += 1


def test_answers_are_collected_as_they_are(tmp_path: Path) -> None:
    requests = Requests(
        [[RequestRecord(1, output_text="one\r\ntwo\rthree"), RequestRecord(1, output_text="\ud800")]]
    )
    assert len(requests.output_digest() or "") == 64
    write_whole(tmp_path / "outputs.csv", requests.outputs_to_csv())
    write_whole(tmp_path / RESULT, "{}")
    child = cast("Child", SimpleNamespace(output=CappedOutput()))
    text = collect(tmp_path, child, None, None).files["outputs.csv"]
    rows = [row["output_text"] for row in read_csv(io.StringIO(text, newline=""))]
    assert rows == ["one\r\ntwo\rthree", "\\ud800"]


def test_result_files_and_phases_are_returned(job: MakeJob, run: Run) -> None:
    watcher = Watching()
    outcome = run(job(), watcher=watcher)
    assert outcome.result is not None
    result = ExperimentResult.model_validate_json(outcome.result)
    assert result.identity.experiment_id == "one"
    assert outcome.files["requests.csv"].startswith("pass,request,")
    assert [seen.phase for seen in watcher.seen] == [
        "importing",
        "ready",
        "importing",
        "fetching the model",
        "loading",
        "preparing",
        "measuring",
        "computing the metrics",
        "done",
    ]


def test_watcher_is_called_between_events(job: MakeJob, fork: Run) -> None:
    watcher = Watching(refresh_every_s=0.1)
    assert fork(job(seconds=0.5), watcher=watcher).error is None
    measuring = [progress for progress in watcher.seen if progress.phase == "measuring"]
    assert measuring == [Progress("measuring", total=0.0, unit="s")]
    assert watcher.ticks >= len(watcher.seen) + 2, "there are no events within the window"


def test_every_experiment_has_a_process_of_its_own(job: MakeJob, run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(job(report=str(tmp_path))).error is None
    first, second = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert first["pid"] != second["pid"]
    assert os.getpid() not in (first["pid"], second["pid"])
    for child in (first, second):
        assert child["sid"] == child["pid"], "it leads a session of its own"
        assert gone(child["pid"])


def test_experiments_import_no_pytest_and_pytest_no_torch(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    (pytester.path / "notes").mkdir()
    write_study(noop={"report": str(pytester.path / "notes")}, sweep={"n": [1]}, execution={"n_cycles": 1})
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    done = pytester.run(Path(sys.executable).with_name("pytest"), "study.yaml", "-p", "llem")
    assert done.ret == 0
    (note,) = (pytester.path / "notes").iterdir()
    child = {name.partition(".")[0] for name in json.loads(note.read_text())["modules"]}
    assert child.isdisjoint({"pytest", "_pytest", "pluggy", "xdist", "torch", "transformers"})
    assert "pytest_llem" in child
    parent = {name.partition(".")[0] for name in json.loads((pytester.path / "modules.json").read_text())}
    assert parent.isdisjoint({"torch", "transformers"})
    assert "pytest" in parent


@pytest.mark.parametrize(
    ("fault", "kind", "type_", "message"),
    [
        ("raise", "exception", "ValueError", "the engine says no"),
        ("memory", "oom", "MemoryError", "no more"),
        ("exit", "crash", "Exit", "the process ended with status 3 and left no result"),
        ("_exit", "crash", "Exit", "the process ended with status 7 and left no result"),
        ("kill", "crash", "SIGKILL", "the process was ended by SIGKILL"),
        ("signal 40", "crash", "signal 40", "the process was ended by signal 40"),
        ("surrogate", "exception", "ValueError", "\\udc80"),
        ("no message", "exception", "NoMessageError", "(its message could not be read)"),
        ("long message", "exception", "ValueError", "x" * 4000),
        ("exit 0", "crash", "Exit", "the process ended with status 0 and left no result"),
        ("real segv", "crash", "SIGSEGV", "the process was ended by SIGSEGV"),
        ("allocate", "oom", "MemoryError", ""),
    ],
    ids=lambda value: value[:20],
)
def test_process_end_is_reported(job: MakeJob, fork: Run, fault: str, kind: str, type_: str, message: str) -> None:
    _assert_failed(fork(job(fault=fault)), kind, type_, message)


@pytest.mark.parametrize(
    ("fault", "kind", "type_", "message"),
    [
        ("raise", "exception", "ValueError", "the engine says no"),
        ("exit", "crash", "Exit", "the process ended with status 3 and left no result"),
        ("real segv", "crash", "SIGSEGV", "the process was ended by SIGSEGV"),
    ],
    ids=lambda value: value[:20],
)
def test_spawned_process_end_is_reported(job: MakeJob, fault: str, kind: str, type_: str, message: str) -> None:
    _assert_failed(run_isolated(job(fault=fault)), kind, type_, message)


def _assert_failed(outcome: Outcome, kind: str, type_: str, message: str) -> None:
    assert outcome.result is None
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.type, outcome.error.message) == (kind, type_, message)
    assert outcome.error.phase == "measuring"
    assert bool(outcome.error.traceback) == (kind in ("exception", "oom"))


@pytest.mark.parametrize("fault", [slow("linger"), "linger at exit"])
def test_hanging_process_is_ended_after_its_result(
    job: MakeJob, run: Run, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(childs, "GRACE_SECONDS", 0.2)
    outcome = run(job(fault=fault))
    assert outcome.result is not None
    assert ExperimentResult.model_validate_json(outcome.result)


def test_orphan_that_holds_the_pipes_is_not_waited_for(
    job: MakeJob, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orphan runs for an hour and holds the pipes that multiprocessing would wait for."""
    monkeypatch.setattr(childs, "REAP_SECONDS", 1000.0)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(job(fault="orphan"))), daemon=True)
    thread.start()
    thread.join(120)
    assert [outcome.error for outcome in outcomes] == [None]


#: Runs a command as :mod:`pytest_llem.isolation.supervisor` does, with another time for its descendants.
SUPERVISE = """
import sys
from pytest_llem.isolation import supervisor

supervisor.REST_SECONDS = 3600
supervisor.main("", "", sys.argv[1:])
"""


def supervised(*command: str) -> subprocess.Popen[bytes]:
    """Run *command* under a supervisor."""
    start = [sys.executable, "-c", SUPERVISE, *command]
    return subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_descendants_of_an_ended_process_can_clean_up(tmp_path: Path) -> None:
    """As Python's resource tracker does, once the last process that uses it has ended."""
    file = tmp_path / "file"
    file.touch()
    with supervised("/bin/sh", "-c", '(sleep 0.2; rm "$0") & exit 3', str(file)) as run:
        assert run.wait() == 0
    assert not file.exists()


def test_descendants_of_an_ended_process_are_killed_on_order() -> None:
    with supervised("/bin/sh", "-c", "sleep 3600 & echo $! >&2") as run:
        assert run.stderr is not None
        left = int(run.stderr.readline())
        run.communicate(supervisor.END)
    assert gone(left)


def test_semaphore_of_a_killed_process_is_removed() -> None:
    code = """
    import multiprocessing, signal
    lock = multiprocessing.get_context("spawn").Lock()
    print(lock._semlock.name, flush=True)
    signal.pause()
    """
    with supervised(sys.executable, "-c", textwrap.dedent(code)) as run:
        assert run.stderr is not None
        file = Path("/dev/shm", "sem." + run.stderr.readline().decode().strip("/\n"))
        assert file.exists()
        run.communicate(supervisor.END)
    assert not file.exists()


def test_interrupt_during_the_cleanup_does_not_end_it(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is pressed again while the process is being ended after the first one."""
    end = Child.end
    ended: list[Child] = []

    def interrupt(child: Child, *_: object, **__: object) -> None:
        childs._read([child], 10)  # it has sent its id
        raise KeyboardInterrupt

    def end_interrupted(child: Child) -> None:
        ended.append(child)
        if len(ended) < 4:
            raise KeyboardInterrupt
        end(child)

    monkeypatch.setattr(Child, "wait", interrupt)
    monkeypatch.setattr(Child, "end", end_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_isolated(job(fault="hang"))
    assert len(ended) == 4
    assert ended[0]._pid is not None
    assert gone(ended[0]._pid)


def test_very_long_timeout_is_accepted(job: MakeJob, fork: Run) -> None:
    assert fork(job(), timeout=3e9).error is None


def test_garbage_on_the_event_channel_is_ignored(job: MakeJob, run: Run) -> None:
    assert run(job(fault="garbage")).error is None


def test_preflight_error_has_no_traceback(job: MakeJob, fork: Run) -> None:
    error = fork(job(sise=3)).error
    assert error is not None
    assert (error.kind, error.message) == (
        "preflight",
        "noop.sise: the engine has no such option (did you mean 'size'?)",
    )
    assert error.traceback is None


def test_output_is_kept_up_to_a_cap(job: MakeJob, fork: Run) -> None:
    outcome = fork(job(fault="shout"))
    assert outcome.error is None
    assert outcome.output.startswith("xxx")
    assert outcome.output.endswith("the last words")
    assert "bytes left out …]" in outcome.output
    assert len(outcome.output) < 200_000


def test_capped_output_loses_the_middle_only() -> None:
    output = CappedOutput(head=4, tail=4)
    for chunk in (b"abcdef", b"ghij", b"kl", b"mnop"):
        output.write(chunk)
    assert output.text() == "abcd\n[… 8 bytes left out …]\nmnop"


def test_capped_output_that_fits_is_whole() -> None:
    output = CappedOutput()
    for chunk in (b"abc", b"def\xff"):
        output.write(chunk)
    assert output.text() == "abcdef\ufffd"


@pytest.mark.slow
def test_experiment_ends_with_its_xdist_worker(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """The experiment fails, and the worker's replacement runs the others."""
    (pytester.path / "notes").mkdir()
    write_study(
        noop={"report": str(pytester.path / "notes")},
        sweep={"noop.fault": ["none", "hang", "none "]},
        execution={"n_cycles": 1, "cycle_order": "sequential"},
    )
    pytester.makeconftest(
        """
        import os, pathlib, signal, threading, time

        def pytest_runtest_call(item):
            if "hang" in item.name:
                threading.Thread(target=die, args=(notes(),), daemon=True).start()

        def notes():
            return len(list(pathlib.Path("notes").iterdir()))

        def die(before):
            while notes() == before:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-n", "1")
    run.assert_outcomes(passed=2, failed=1)
    assert results.statuses() == {"fault=none": "completed", "fault=hang": "failed", "fault=none%20": "completed"}
    (error,) = [entry["error"] for entry in results.manifest["experiments"] if entry["error"]]
    assert (error["kind"], error["type"]) == ("crash", "WorkerCrash")
    wait_until(lambda: all(gone(int(note.stem)) for note in (pytester.path / "notes").iterdir()))


def test_timeout_of_the_study_ends_the_experiment(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(
        noop={"seconds": 5}, sweep={"n": [1]}, execution={"n_cycles": 1, "experiment_timeout_seconds": 0.5}
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    run.assert_outcomes(failed=1)
    assert results.manifest["experiments"][0]["error"]["kind"] == "timeout"


def test_failed_experiments_traceback_is_shown(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(sweep={"noop.fault": ["raise"]}, execution={"n_cycles": 1})
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    run.stdout.fnmatch_lines(
        ["exception while measuring: ValueError: the engine says no", "", "Traceback (most recent call last):*"]
    )
