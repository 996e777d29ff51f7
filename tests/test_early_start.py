"""The next experiment's process imports while its turn is waited for; the last one's exits meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from signal import Signals
from typing import Any

import psutil
import pytest

from tests.conftest import Results
from tests.support.processes import gone, wait_until

#: An engine that takes its time to import and to exit, and notes who was there when.
ENGINE = """
    import atexit, json, os, time
    from pathlib import Path
    from noop_engine import NoopEngine

    SEEN = {"imported": time.monotonic()}

    def note(**what):
        SEEN.update(what, pid=os.getpid())
        temporary = Path("notes", f"{os.getpid()}.tmp")
        temporary.write_text(json.dumps(SEEN))
        temporary.replace(temporary.with_suffix(""))

    def leave():
        time.sleep(float(os.environ.get("EXIT_SECONDS", 0)))
        note(exited=time.monotonic())

    class Engine(NoopEngine):
        def __init__(self, config, context):
            super().__init__(config, context)
            note(begun=time.monotonic(), variable=os.environ.get("A_VARIABLE"))
            atexit.register(leave)

    time.sleep(float(os.environ.get("IMPORT_SECONDS", 0)))
    note()
"""

BACKEND = "slow_engine:Engine"


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: Callable[..., Path]) -> Callable[..., Any]:
    """Write a study of the engine, with a gap of so many seconds."""
    pytester.makepyfile(slow_engine=ENGINE)
    pytester.mkdir("notes")

    def write(gap: Any, method: str = "spawn", points: int = 3) -> Any:
        execution = {"n_cycles": 1, "experiment_gap_seconds": gap, "start_method": method}
        return write_study(
            backend=BACKEND,
            sweep={"n": list(range(1, points + 1))},
            execution={**execution, "cycle_order": "sequential"},
        )

    return write


@pytest.fixture
def notes(pytester: pytest.Pytester) -> Callable[..., Any]:
    def read() -> Any:
        found = [json.loads(file.read_text()) for file in (pytester.path / "notes").iterdir() if not file.suffix]
        return sorted(found, key=lambda note: note["imported"])

    return read


@pytest.fixture
def measured(results: Results) -> Callable[..., Any]:
    """Return the results in the order in which they were measured."""

    def read() -> Any:
        found = [results.read(entry["result_file"]) for entry in results.manifest["experiments"]]
        return sorted(found, key=lambda result: result["started_at"])

    return read


def _start(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


class TestInTheGap:
    @pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "xdist"])
    def test_no_import_falls_into_anybodys_experiment(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        measured: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        workers: tuple[str, ...],
    ) -> None:
        """From loading to accounting, and so in any window. All times are the results' own."""
        monkeypatch.setenv("IMPORT_SECONDS", "1")
        study(3)
        pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=3)
        found = measured()
        early = [result for result in found if result["start"]["early"]]
        assert len(early) >= (1 if workers else 2)
        for one in found:
            start = one["start"]
            assert start["began_at"] < start["ready_at"] <= one["started_at"]
            for other in found:
                if other is not one:
                    assert start["ready_at"] < other["started_at"] or start["began_at"] > other["completed_at"]
        for one in early:
            assert one["gap"]["reason"] == "fixed"
            assert one["gap"]["seconds"] >= 3

    def test_it_is_only_where_there_is_a_gap(
        self, pytester: pytest.Pytester, study: Callable[..., Any], measured: Callable[..., Any]
    ) -> None:
        study(600)
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-no-gaps")
        run.assert_outcomes(passed=3)
        assert [result["start"]["early"] for result in measured()] == [False] * 3

    def test_its_deadline_begins_at_its_turn(
        self, pytester: pytest.Pytester, study: Callable[..., Any], measured: Callable[..., Any]
    ) -> None:
        study(6, points=2)
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-timeout", "5")
        run.assert_outcomes(passed=2)
        assert [result["start"]["early"] for result in measured()] == [False, True]

    def test_a_forkserver_forks_there_too(
        self, pytester: pytest.Pytester, study: Callable[..., Any], measured: Callable[..., Any]
    ) -> None:
        study(1, "forkserver")
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=3)
        assert [result["start"]["early"] for result in measured()] == [False, True, True]

    def test_one_that_dies_there_fails(
        self, pytester: pytest.Pytester, study: Callable[..., Any], results: Results
    ) -> None:
        study(2, points=2)
        file = pytester.path / "slow_engine.py"
        file.write_text(
            file.read_text() + "\nif Path('first').exists():\n    os._exit(5)\nPath('first').touch()\n"
        )
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1, failed=1)
        (error,) = [entry["error"] for entry in results.manifest["experiments"] if entry["error"]]
        assert error["message"] == "the process ended with status 5 and left no result"


class TestNotNeeded:
    def test_it_is_gone_where_its_item_is_skipped(
        self, pytester: pytest.Pytester, study: Callable[..., Any], notes: Callable[..., Any]
    ) -> None:
        study(2)
        pytester.makeconftest(
            """
            import pytest

            def pytest_runtest_setup(item):
                if "n=2" in item.name:
                    pytest.skip("not now")
            """
        )
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
        run.assert_outcomes(passed=2, skipped=1)
        assert len(notes()) == 3
        assert len([note for note in notes() if "begun" in note]) == 2
        assert all(gone(note["pid"]) for note in notes())

    def test_one_with_another_environment_takes_its_place(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        measured: Callable[..., Any],
    ) -> None:
        study(2, points=2)
        pytester.makeconftest(
            """
            import pytest

            @pytest.fixture(autouse=True)
            def variable(monkeypatch):
                monkeypatch.setenv("A_VARIABLE", "mine")
            """
        )
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
        assert {note["variable"] for note in notes() if "begun" in note} == {"mine"}
        assert len(notes()) == 3
        assert all(gone(note["pid"]) for note in notes())
        assert [result["start"]["early"] for result in measured()] == [False, False]

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_it_is_gone_when_the_session_is(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        number: Signals,
    ) -> None:
        pytester.mkdir("temporary")
        monkeypatch.setenv("TMPDIR", str(pytester.path / "temporary"))
        study(600, method)
        run = _start()

        def family() -> Any:
            found = psutil.Process(run.pid).children(recursive=True)
            return [one.pid for one in found if not gone(one.pid)]

        def waits() -> Any:
            done = list(pytester.path.glob("results/*/experiments/*.json"))
            return done and len(notes()) == 2 and len(family()) == (2 if method == "spawn" else 4)

        wait_until(waits)
        pids = family()
        run.send_signal(number)
        run.wait(60)
        wait_until(lambda: all(map(gone, pids)), 30 if number == signal.SIGKILL else 0.5)
        wait_until(lambda: not list((pytester.path / "temporary").glob("llem-*")), 30)

    def test_nor_when_the_controller_is_killed(
        self, pytester: pytest.Pytester, study: Callable[..., Any], notes: Callable[..., Any]
    ) -> None:
        study(600)
        run = _start("-n", "1")
        wait_until(lambda: len(notes()) == 2, 120)
        run.kill()
        run.wait()
        wait_until(lambda: all(gone(note["pid"]) for note in notes()), 30)


class TestExits:
    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_the_next_one_imports_meanwhile_and_begins_afterwards(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        measured: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        method: str,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "2")
        study(0, method)
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=3)
        seen = sorted((note for note in notes() if "begun" in note), key=lambda note: note["begun"])
        assert len(seen) == 3
        for one, following in pairwise(seen):
            assert one["exited"] <= following["begun"], "its devices are free"
            if method == "spawn":
                assert following["imported"] < one["exited"]
        assert all(gone(note["pid"]) for note in seen), "the last one, too"
        assert [result["start"]["early"] for result in measured()] == [False, True, True]

    def test_its_result_is_told_before(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "3")
        study(0, points=1)
        pytester.makeconftest(
            """
            import time
            from pathlib import Path

            def pytest_runtest_logfinish(nodeid):
                Path("told").write_text(str(time.monotonic()))
            """
        )
        pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
        (note,) = notes()
        assert float((pytester.path / "told").read_text()) < note["exited"]
        assert gone(note["pid"])

    def test_its_devices_are_its_own_up_to_then(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whoever waits for them in another session of pytest, or in another worker of xdist."""
        monkeypatch.setenv("EXIT_SECONDS", "1")
        study(0, points=2)
        runs = [_start("--llem-run-id", "a"), _start("--llem-run-id", "b", "-n", "2")]
        assert [run.wait(120) for run in runs] == [0, 0]
        seen = sorted(notes(), key=lambda note: note["begun"])
        assert len(seen) == 4
        for one, following in pairwise(seen):
            assert one["exited"] <= following["begun"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_what_exits_is_gone_with_the_session(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        number: Signals,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "100")
        study(0)
        run = _start()
        wait_until(lambda: list(pytester.path.glob("results/*/experiments/*.json")))
        time.sleep(0.5)
        os.killpg(run.pid, number)
        run.wait(60)
        wait_until(lambda: all(gone(note["pid"]) for note in notes()), 30)
        assert not any("exited" in note for note in notes())

    def test_ordinary_tests_do_not_run_beside_it(
        self,
        pytester: pytest.Pytester,
        study: Callable[..., Any],
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "1")
        study(0, points=1)
        pytester.makepyfile(
            test_other="""
            import time
            from pathlib import Path

            def test_other():
                Path("other").write_text(str(time.monotonic()))
            """
        )
        run = pytester.runpytest_subprocess("study.yaml", "test_other.py", "-p", "llem")
        run.assert_outcomes(passed=2)
        assert notes()[0]["exited"] <= float((pytester.path / "other").read_text())
