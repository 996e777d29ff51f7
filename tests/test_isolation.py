"""One experiment, one fresh process: real processes doing real things."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.isolation import child as childs
from pytest_llem.isolation import launcher
from pytest_llem.isolation.output import CappedOutput
from pytest_llem.measurement.progress import Progress
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import Results
from tests.support.processes import gone, wait_until


class Watching:
    """Somebody who looks on, and keeps what there was to see."""

    def __init__(self, every_s: float = 60.0) -> None:
        self.every_s = every_s
        self.seen = []
        self.ticks = []

    def see(self, seen: Any) -> None:
        self.seen.append(seen)

    def tick(self) -> None:
        self.ticks.append(time.monotonic())


def test_a_result_comes_back_whole(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    watcher = Watching()
    outcome = run(job(), watcher=watcher)
    assert outcome.error is None
    result = ExperimentResult.model_validate_json(outcome.result)
    assert result.identity.experiment_id == "one"
    assert outcome.files["requests.csv"].startswith("pass,request,")
    assert [seen.phase for seen in watcher.seen] == [
        "importing",
        "fetching the model",
        "loading",
        "preparing",
        "measuring",
        "accounting",
        "done",
    ]


def test_who_looks_on_is_woken_up_now_and_then(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    watcher = Watching(every_s=0.2)
    assert run(job(seconds=0.5), watcher=watcher).error is None
    measuring = [progress for progress in watcher.seen if progress.phase == "measuring"]
    assert measuring == [Progress("measuring", total=0.0, unit="s")]
    assert len(watcher.ticks) >= len(watcher.seen) + 2, "nothing is said within the window of a second"


def test_every_experiment_has_a_process_of_its_own(
    job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    for _ in range(2):
        assert run(job(report=str(tmp_path))).error is None
    first, second = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert first["pid"] != second["pid"]
    assert os.getpid() not in (first["pid"], second["pid"])
    for child in (first, second):
        assert child["sid"] == child["pid"], "it leads a session of its own"
        assert gone(child["pid"])


@pytest.mark.parametrize("command", [["pytest"], [sys.executable, "-m", "pytest"]], ids=["script", "module"])
def test_the_child_holds_no_pytest_and_the_parent_no_torch(
    pytester: pytest.Pytester, write_study: Callable[..., Path], command: list[str]
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
    if command == ["pytest"]:
        command = [str(Path(sys.executable).parent / "pytest")]
    done = pytester.run(*command, "study.yaml", "-p", "llem")
    assert done.ret == 0
    (note,) = (pytester.path / "notes").iterdir()
    child = {name.partition(".")[0] for name in json.loads(note.read_text())["modules"]}
    assert child.isdisjoint({"pytest", "_pytest", "pluggy", "xdist", "torch", "transformers"})
    assert "pytest_llem" in child
    parent = {name.partition(".")[0] for name in json.loads((pytester.path / "modules.json").read_text())}
    assert parent.isdisjoint({"torch", "transformers", "pynvml", "numpy.testing"})
    assert "pytest" in parent


@pytest.mark.parametrize(
    ("fault", "kind", "type_", "message"),
    [
        ("raise", "exception", "ValueError", "the engine says no"),
        ("memory", "oom", "MemoryError", "no more"),
        ("exit", "crash", "Exit", "the process ended with status 3 and left no result"),
        ("_exit", "crash", "Exit", "the process ended with status 7 and left no result"),
        ("segv", "crash", "SIGSEGV", "the process was ended by SIGSEGV"),
        ("kill", "crash", "SIGKILL", "the process was ended by SIGKILL"),
        ("signal 40", "crash", "signal 40", "the process was ended by signal 40"),
        ("surrogate", "exception", "ValueError", "\\udc80"),
        ("no message", "exception", "NoMessageError", "(its message could not be read)"),
        ("long message", "exception", "ValueError", "x" * 4000),
        ("exit 0", "crash", "Exit", "the process ended with status 0 and left no result"),
        ("real segv", "crash", "SIGSEGV", "the process was ended by SIGSEGV"),
        ("allocate", "oom", "MemoryError", ""),
    ],
)
def test_how_it_ended_is_told(
    job: Callable[..., Any], run: Callable[..., Any], fault: str, kind: str, type_: str, message: str
) -> None:
    outcome = run(job(fault=fault))
    assert outcome.result is None
    assert (outcome.error.kind, outcome.error.type, outcome.error.message) == (kind, type_, message)
    assert outcome.error.phase == "measuring"
    assert bool(outcome.error.traceback) == (kind in ("exception", "oom"))


@pytest.mark.parametrize("fault", ["linger", "linger at exit"])
def test_a_result_is_not_kept_waiting_for_a_process_that_will_not_exit(
    job: Callable[..., Any], run: Callable[..., Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(childs, "GRACE_SECONDS", 0.5)
    outcome = run(job(fault=fault))
    assert outcome.error is None
    assert ExperimentResult.model_validate_json(outcome.result)


def test_an_orphan_that_holds_the_pipes_stalls_nothing(
    job: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives for 60 s and holds what multiprocessing would wait for."""
    monkeypatch.setattr(childs, "REAP_SECONDS", 1000.0)
    began = time.monotonic()
    assert run(job(fault="orphan")).error is None
    assert time.monotonic() - began < 50


def test_an_interrupt_during_the_cleanup_does_not_end_it(
    job: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further Ctrl-C come while the first one's process is being ended."""
    end = launcher.Child.end
    ended = []

    def interrupt(child: Any, *_: Any, **__: Any) -> None:
        child._read(10)  # it has told its id
        raise KeyboardInterrupt

    def end_interrupted(child: Any) -> None:
        ended.append(child)
        if len(ended) < 4:
            raise KeyboardInterrupt
        end(child)

    monkeypatch.setattr(launcher.Child, "wait", interrupt)
    monkeypatch.setattr(launcher.Child, "end", end_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job(fault="hang"))
    assert len(ended) == 4
    assert gone(ended[0]._pid)


def test_a_very_long_timeout_is_one(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    assert run(job(), timeout=3e9).error is None


def test_garbage_on_the_event_channel_costs_nothing(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    outcome = run(job(fault="garbage"))
    assert outcome.error is None


def test_a_preflight_error_is_one_line(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    outcome = run(job(sise=3))
    assert (outcome.error.kind, outcome.error.message) == ("preflight", "noop: unknown option 'sise'")
    assert outcome.error.traceback is None


def test_a_deadline_ends_it(job: Callable[..., Any], run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run(job(fault="hang", report=str(tmp_path)), timeout=5)
    assert (outcome.error.kind, outcome.error.message) == ("timeout", "not done after 5 s")
    assert all(gone(int(path.stem)) for path in tmp_path.iterdir())


def test_output_is_kept_up_to_a_cap(job: Callable[..., Any], run: Callable[..., Any]) -> None:
    outcome = run(job(fault="shout"))
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


def test_a_worker_of_xdist_that_dies_takes_its_experiment_along(
    pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results
) -> None:
    """The experiment has failed, the others are run by the worker that takes its place."""
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
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-n", "1")
    run.assert_outcomes(passed=2, failed=1)
    assert results.statuses() == {"fault=none": "completed", "fault=hang": "failed", "fault=none%20": "completed"}
    (error,) = [entry["error"] for entry in results.manifest["experiments"] if entry["error"]]
    assert (error["kind"], error["type"]) == ("crash", "WorkerCrash")
    wait_until(lambda: all(gone(int(note.stem)) for note in (pytester.path / "notes").iterdir()))


def test_a_timeout_in_the_study_is_obeyed(
    pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results
) -> None:
    write_study(
        noop={"fault": "hang"}, sweep={"n": [1]}, execution={"n_cycles": 1, "experiment_timeout_seconds": 3}
    )
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    run.assert_outcomes(failed=1)
    assert results.manifest["experiments"][0]["error"]["kind"] == "timeout"


def test_a_failed_items_output_is_shown(pytester: pytest.Pytester, write_study: Callable[..., Path]) -> None:
    write_study(sweep={"noop.fault": ["raise"]}, execution={"n_cycles": 1})
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    run.stdout.fnmatch_lines(
        ["exception while measuring: ValueError: the engine says no", "", "Traceback (most recent call last):*"]
    )
