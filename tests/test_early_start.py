"""Start the next experiment's process during the gap before it, while the previous process exits."""

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
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pytest_llem.isolation import child
from pytest_llem.isolation.launcher import ExperimentProcess, Job, run_isolated
from tests.conftest import Results
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

#: An engine whose import and exit take a while, and that records the time of each step.
ENGINE = """
    import atexit, json, os, sys, tempfile, time
    from pathlib import Path
    import filelock
    from noop_engine import NoopEngine
    from pytest_llem.machine.owner import FOLDER

    SEEN = {"imported": time.monotonic()}

    def note(**what):
        SEEN.update(what, pid=os.getpid())
        temporary = Path("notes", f"{os.getpid()}.tmp")
        temporary.write_text(json.dumps(SEEN))
        temporary.replace(temporary.with_suffix(""))

    def leave():
        time.sleep(float(os.environ.get("EXIT_SECONDS", 0)))
        if pattern := os.environ.get("EXIT_AFTER"):  # so many files of that name are there
            number, name = pattern.split()
            give_up = time.monotonic() + 30
            while len(list(Path().glob(name))) < int(number) and time.monotonic() < give_up:
                time.sleep(0.02)
        note(exited=time.monotonic(), owned=is_owned())

    def is_owned():
        try:
            with filelock.FileLock(Path(tempfile.gettempdir(), FOLDER, "cpu.lock")).acquire(blocking=False):
                return False
        except filelock.Timeout:
            return True

    class Engine(NoopEngine):
        def __init__(self, config, context):
            super().__init__(config, context)
            note(begun=time.monotonic(), variable=os.environ.get("A_VARIABLE"))
            atexit.register(leave)

    if sys.argv[0] != "-c":  # not only asked for its options
        time.sleep(float(os.environ.get("IMPORT_SECONDS", 0)))
        note()
"""

BACKEND = "slow_engine:Engine"

WriteStudy = Callable[..., Path]
Notes = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: WriteStudy) -> WriteStudy:
    """Write a study of the engine with a gap in s."""
    pytester.makepyfile(slow_engine=ENGINE)
    pytester.mkdir("notes")

    def write(gap: float, method: str = "spawn", points: int = 2) -> Path:
        execution = {"n_cycles": 1, "experiment_gap_seconds": gap, "start_method": method}
        return write_study(
            backend=BACKEND,
            sweep={"n": list(range(1, points + 1))},
            execution={**execution, "cycle_order": "sequential"},
        )

    return write


@pytest.fixture
def notes(pytester: pytest.Pytester) -> Notes:
    """The notes of each process, in the order of their imports."""

    def read() -> list[dict[str, Any]]:
        found = [json.loads(file.read_text()) for file in (pytester.path / "notes").iterdir() if not file.suffix]
        return sorted(found, key=lambda note: note["imported"])

    return read


@pytest.fixture
def measured(results: Results) -> Notes:
    """The results in the order of measurement."""

    def read() -> list[dict[str, Any]]:
        found = [results.read(entry["result_file"]) for entry in results.manifest["experiments"]]
        return sorted(found, key=lambda result: result["started_at"])

    return read


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def _early(measured: Notes) -> list[bool]:
    return [result["start"]["early"] for result in measured()]


class TestInTheGap:
    @pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
    def test_no_import_overlaps_an_experiment(
        self,
        pytester: pytest.Pytester,
        study: WriteStudy,
        notes: Notes,
        measured: Notes,
        monkeypatch: pytest.MonkeyPatch,
        workers: tuple[str, ...],
    ) -> None:
        """From loading to accounting, and so in any window. All times are the results' own.

        Nor does another experiment's exit: the devices are owned up to then.
        """
        monkeypatch.setenv("IMPORT_SECONDS", "0.5")
        study(1, points=3)
        pytester.runpytest_inprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=3)
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
            assert one["gap"]["seconds"] >= 1
        seen = sorted(notes(), key=lambda note: note["begun"])
        assert all(note["owned"] for note in seen)
        assert all(one["exited"] <= following["begun"] for one, following in pairwise(seen))

    def test_without_gap_no_experiment_starts_early(
        self, pytester: pytest.Pytester, study: WriteStudy, measured: Notes
    ) -> None:
        study(600)
        # A process that is still exiting would be reason enough to start the next one early.
        pytester.makeconftest("import time\n\ndef pytest_runtest_teardown():\n    time.sleep(0.5)")
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-no-gaps")
        run.assert_outcomes(passed=2)
        assert _early(measured) == [False, False]

    def test_deadline_begins_with_the_experiment(
        self, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The gap, an hour on the fake clock, does not count."""
        started = ExperimentProcess(job(), early=True)
        started.start()
        monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
        assert run_isolated(job(), started=started, timeout=60).error is None

    def test_forkserver_forks_in_the_gap(
        self, pytester: pytest.Pytester, study: WriteStudy, measured: Notes
    ) -> None:
        study(0.3, "forkserver", points=3)
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=3)
        assert _early(measured) == [False, True, True]

    def test_process_that_dies_in_the_gap_fails_its_experiment(
        self, pytester: pytest.Pytester, study: WriteStudy, results: Results
    ) -> None:
        study(0.5)
        file = pytester.path / "slow_engine.py"
        dies = "if Path('first').exists():\n        os._exit(5)\n    Path('first').touch()"
        file.write_text(f"{file.read_text()}\nif sys.argv[0] != '-c':\n    {dies}\n")
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1, failed=1)
        (error,) = [entry["error"] for entry in results.manifest["experiments"] if entry["error"]]
        assert error["message"] == "the process ended with status 5 and left no result"


#: For a conftest: waits until a number of processes have imported the engine.
WAIT_FOR_NOTES = """
    import pytest
    from pathlib import Path
    from tests.support.processes import wait_until

    def wait_for_notes(count):
        wait_until(lambda: len([one for one in Path("notes").iterdir() if not one.suffix]) == count)
"""


class TestNotNeeded:
    def test_early_process_of_skipped_item_is_ended(
        self, pytester: pytest.Pytester, study: WriteStudy, notes: Notes
    ) -> None:
        study(0.3, points=3)
        pytester.makeconftest(
            WAIT_FOR_NOTES
            + """
    def pytest_runtest_setup(item):
        if "n=2" in item.name:
            wait_for_notes(2)
            pytest.skip("not now")
"""
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2, skipped=1)
        assert len(notes()) == 3
        assert len([note for note in notes() if "begun" in note]) == 2
        assert all(gone(note["pid"]) for note in notes())

    @pytest.mark.slow
    def test_changed_environment_replaces_early_process(
        self, pytester: pytest.Pytester, study: WriteStudy, notes: Notes, measured: Notes
    ) -> None:
        study(0.3)
        pytester.makeconftest(
            WAIT_FOR_NOTES
            + """
    @pytest.fixture(autouse=True)
    def variable(monkeypatch, request):
        if "n=2" in request.node.name:
            wait_for_notes(2)
        monkeypatch.setenv("A_VARIABLE", "mine")
"""
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
        assert {note["variable"] for note in notes() if "begun" in note} == {"mine"}
        assert len(notes()) == 3
        assert all(gone(note["pid"]) for note in notes())
        assert _early(measured) == [False, False]

    @pytest.mark.parametrize(
        ("method", "number"),
        [
            slow("spawn", signal.SIGINT),
            slow("spawn", signal.SIGKILL),
            ("forkserver", signal.SIGKILL),
        ],
    )
    def test_early_process_does_not_outlive_the_session(
        self,
        pytester: pytest.Pytester,
        study: WriteStudy,
        notes: Notes,
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        number: signal.Signals,
    ) -> None:
        pytester.mkdir("temporary")
        monkeypatch.setenv("TMPDIR", str(pytester.path / "temporary"))
        study(600, method)
        run = _start()

        def family() -> list[int]:
            found = psutil.Process(run.pid).children(recursive=True)
            return [one.pid for one in found if not gone(one.pid)]

        def waits() -> bool:
            done = list(pytester.path.glob("results/*/experiments/*.json"))
            return bool(done) and len(notes()) == 2 and len(family()) == (2 if method == "spawn" else 4)

        wait_until(waits)
        pids = family()
        run.send_signal(number)
        run.wait(60)
        if number != signal.SIGKILL:
            assert all(map(gone, pids)), "before pytest itself"
        wait_until(lambda: all(map(gone, pids)), 30)
        wait_until(lambda: not list((pytester.path / "temporary").glob("llem-*")), 30)

    @pytest.mark.slow
    def test_early_process_does_not_outlive_xdists_controller(
        self, pytester: pytest.Pytester, study: WriteStudy, notes: Notes
    ) -> None:
        study(600)
        run = _start("-n", "1")
        wait_until(lambda: len(notes()) == 2, 120)
        run.kill()
        run.wait()
        wait_until(lambda: all(gone(note["pid"]) for note in notes()), 30)


class TestExits:
    @pytest.mark.slow
    def test_next_process_imports_while_one_exits(
        self,
        pytester: pytest.Pytester,
        study: WriteStudy,
        notes: Notes,
        measured: Notes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("EXIT_AFTER", "2 notes/*[0-9]")
        study(0)
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
        one, following = notes()
        assert [note["owned"] for note in notes()] == [True, True]
        assert following["imported"] < one["exited"] <= following["begun"], "its devices are free"
        assert all(gone(note["pid"]) for note in notes()), "the last one, too"
        assert _early(measured) == [False, True]

    def test_forked_experiment_begins_once_the_last_one_has_exited(
        self,
        pytester: pytest.Pytester,
        study: WriteStudy,
        notes: Notes,
        measured: Notes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "0.5")
        study(0, "forkserver")
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
        one, following = sorted((note for note in notes() if "begun" in note), key=lambda note: note["begun"])
        assert one["exited"] <= following["begun"]
        assert gone(one["pid"])
        assert gone(following["pid"])
        assert _early(measured) == [False, True]

    def test_result_is_reported_before_the_exit(
        self, pytester: pytest.Pytester, study: WriteStudy, notes: Notes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EXIT_AFTER", "1 reported")
        study(0, points=1)
        pytester.makeconftest(
            """
            import time
            from pathlib import Path

            def pytest_runtest_logfinish(nodeid):
                Path("reporting").write_text(str(time.monotonic()))
                Path("reporting").rename("reported")
            """
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
        (note,) = notes()
        assert float((pytester.path / "reported").read_text()) < note["exited"]
        assert gone(note["pid"])

    @pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGKILL])
    @pytest.mark.slow
    def test_exiting_process_does_not_outlive_the_session(
        self,
        pytester: pytest.Pytester,
        study: WriteStudy,
        notes: Notes,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "100")
        study(0)
        run = _start()
        wait_until(lambda: list(pytester.path.glob("results/*/experiments/*.json")) and len(notes()) == 2)
        os.killpg(run.pid, number)
        run.wait(60)
        wait_until(lambda: all(gone(note["pid"]) for note in notes()), 30)
        assert not any("exited" in note for note in notes())

    def test_ordinary_test_waits_for_the_exit(
        self, pytester: pytest.Pytester, study: WriteStudy, notes: Notes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EXIT_SECONDS", "0.5")
        study(0, points=1)
        pytester.makepyfile(
            test_other="""
            import time
            from pathlib import Path

            def test_other():
                Path("other").write_text(str(time.monotonic()))
            """
        )
        run = pytester.runpytest_inprocess("study.yaml", "test_other.py", "-p", "llem")
        run.assert_outcomes(passed=2)
        assert notes()[0]["exited"] <= float((pytester.path / "other").read_text())
