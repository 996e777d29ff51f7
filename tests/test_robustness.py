"""Errors outside of experiments: cleanup, locks, killed runs and messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import registry, run_study
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.machine.device_locks import CPU, owned
from pytest_llem.machine.lock_files import FileLock, QueuePosition, Ticket
from pytest_llem.machine.owner import FOLDER, Owner, holder
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.host import Host
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.liveness import is_locked
from pytest_llem.results.manifest import ManifestWriter, read_manifest
from pytest_llem.results.manifest_records import Manifest, ManifestEntry
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.loading import load_study
from pytest_llem.times import now
from tests.conftest import WriteStudy
from tests.support.marks import slow
from tests.support.tiny import config


class TestClosing:
    @pytest.mark.usefixtures("noop_engine")
    @pytest.mark.parametrize(
        ("raising", "changes", "error"),
        [
            ("fetch", {}, RuntimeError),
            ("load", {}, RuntimeError),
            ("generate", {}, RuntimeError),
            (None, {"energy": {"backend": "nvml"}}, PreflightError),
            (None, {}, None),
        ],
        ids=["fetch", "load", "generate", "meter", "nothing"],
    )
    def test_engine_is_closed_after_any_exception(
        self,
        monkeypatch: pytest.MonkeyPatch,
        raising: str | None,
        changes: dict[str, Any],
        error: type[Exception] | None,
    ) -> None:
        engine: Any = registry.load(registry.ENGINE_GROUP, "noop")
        closed: list[object] = []

        def fail(*_: object) -> None:
            raise RuntimeError("no")

        if raising is not None:
            monkeypatch.setattr(engine, raising, fail)
        monkeypatch.setattr(engine, "close", lambda self: closed.append(self))
        orchestrator = ExperimentOrchestrator(config(backend="noop", **changes))
        if error is None:
            orchestrator.run()
        else:
            with pytest.raises(error):
                orchestrator.run()
        assert len(closed) == 1


class TestDeadline:
    def test_deadline_of_unknown_engine_is_hours_not_days(self) -> None:
        def deadline(n: int) -> float:
            asked = config(backend="other", n=n, max_output_tokens=2000)
            return deadline_seconds(asked, ExecutionConfig(), Needs(), None, Host(2**36))

        assert 2 * 3600 < deadline(50) < deadline(100) < deadline(1000) == deadline(100_000) == 6 * 3600


#: Begins to write a manifest, starts its one experiment, and is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from pytest_llem.results.manifest import ManifestWriter
from pytest_llem.results.manifest_records import Manifest

writer = ManifestWriter(Path(sys.argv[1]), Manifest.model_validate_json(sys.argv[2]))
writer.running("one")
print("running", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestKilledRun:
    def test_killed_run_is_interrupted_once_its_process_is_gone(self, tmp_path: Path) -> None:
        manifest = self.manifest()
        command = [sys.executable, "-c", KILLED, str(tmp_path), manifest.model_dump_json()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            assert self.seen(tmp_path) == ("running", "running", None)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        message = "its run was killed while it was running"
        assert self.seen(tmp_path) == ("interrupted", "failed", message)
        assert read_manifest(tmp_path).failed == 1
        assert Manifest.read(tmp_path / "manifest.json").status == "running", "a reader changes nothing"

    def test_run_of_another_machine_may_still_be_running(self, tmp_path: Path) -> None:
        writer = ManifestWriter(tmp_path, self.manifest())
        writer.running("one")
        del writer
        file = tmp_path / "manifest.json"
        assert self.seen(tmp_path)[0] == "interrupted"
        for elsewhere in (None, "another boot"):
            file.write_text(Manifest.read(file).model_copy(update={"boot_id": elsewhere}).model_dump_json())
            assert self.seen(tmp_path) == ("running", "running", None)

    def test_finished_run_keeps_its_status(self, tmp_path: Path) -> None:
        writer = ManifestWriter(tmp_path, self.manifest())
        writer.finish("completed")
        assert read_manifest(tmp_path).status == "completed"
        assert not is_locked(tmp_path)

    @staticmethod
    def manifest() -> Manifest:
        entry = ManifestEntry(experiment_id="one", config_hash="0", config_summary="", cycle=1)
        return Manifest(
            study_name="s",
            study_design_hash="0",
            pytest_llem_version="0",
            started_at=now(),
            total_experiments=1,
            experiments=[entry],
        )

    @staticmethod
    def seen(directory: Path) -> tuple[str, str, str | None]:
        manifest = read_manifest(directory)
        (entry,) = manifest.experiments
        return manifest.status, entry.status, entry.error.message if entry.error else None


class TestTimestamps:
    @pytest.mark.usefixtures("noop_engine")
    def test_result_has_the_edges_of_its_windows_in_utc(self) -> None:
        before = datetime.now(UTC)
        settings = {"measurement": {"min_window_seconds": 0.05, "prefill_split": True}}
        result = ExperimentOrchestrator(config(backend="noop", noop={"seconds": 0.05}, **settings)).run().result
        assert result.prefill_window is not None
        edges = [before]
        for window in (result.window, result.prefill_window):
            began, ended = _time(window.began_at), _time(window.ended_at)
            assert (ended - began).total_seconds() == pytest.approx(window.window_seconds, abs=1e-5)
            edges += [began, ended]
        assert edges == sorted(edges)
        assert edges[-1] < datetime.now(UTC) + timedelta(seconds=1)


def _time(text: str | None) -> datetime:
    assert text is not None
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


class TestMissingEngine:
    def test_no_install_hint_for_a_library_without_an_engine(self, write_study: WriteStudy) -> None:
        study = load_study(write_study(backend="tensorrt", sweep={"n": [1]}))
        assert Preflight(study, (), []).refusal(study.points[0]) == (
            "engine 'tensorrt' is not installed here (there are: noop, pytorch, server, vllm): the library "
            "tensorrt itself provides no engine; install a package that provides it (entry-point group "
            "pytest_llem.engines), or name a class of your own, backend: package.module:Class, or name in runners "
            "a Python interpreter that has it"
        )


class TestLockFolder:
    @pytest.mark.skipif(os.geteuid() != 0, reason="takes two users")
    def test_other_users_cannot_remove_a_held_lock(self, shared: Path) -> None:
        owner = Owner.of_this_process("study", "one")
        with owned([CPU], owner, print):
            place = QueuePosition.take(shared / FOLDER, Ticket(owner=owner, pool=[CPU]))
            files = sorted(shared.joinpath(FOLDER).iterdir())
            assert len(files) == 3, "lock, note and ticket"

            def attack() -> None:
                for file in files:
                    with pytest.raises(PermissionError):
                        file.unlink()
                    with pytest.raises(PermissionError):
                        file.rename(file.with_suffix(".mine"))

            assert _as_nobody(attack) == 0
            place.leave()

    @pytest.mark.skipif(os.geteuid() != 0, reason="takes two users")
    def test_each_user_writes_their_own_owner_note(self, shared: Path) -> None:
        with owned([CPU], Owner.of_this_process("study", "of root"), print):
            pass

        def own() -> None:
            assert holder(CPU) is None
            with owned([CPU], Owner.of_this_process("study", "of nobody"), print):
                found = holder(CPU)
                assert found is not None
                assert found.experiment == "of nobody"

        assert _as_nobody(own) == 0
        with owned([CPU], Owner.of_this_process("study", "of root again"), print):
            found = holder(CPU)
            assert found is not None
            assert found.experiment == "of root again"

    def test_existing_lock_file_is_opened_without_o_creat(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a sticky folder Linux refuses O_CREAT for another user's file (fs.protected_regular)."""
        path = tmp_path / "cpu.lock"
        path.touch()
        flags: list[int] = []
        real = os.open

        def recorded(path: Any, how: int, *more: int) -> int:
            flags.append(how)
            return real(path, how, *more)

        monkeypatch.setattr(os, "open", recorded)
        lock = FileLock(path)
        assert lock.acquire()
        assert not FileLock(path).acquire()
        assert [how & os.O_CREAT for how in flags] == [0, 0]
        lock.release()

    def test_lock_on_a_replaced_file_is_invalid(self, tmp_path: Path) -> None:
        path = tmp_path / "cpu.lock"
        first, second = FileLock(path), FileLock(path)
        assert first.acquire()
        path.unlink()
        assert second.acquire(), "it guards the name"
        first.release()
        assert not first.acquire()
        second.release()

    def test_release_frees_a_lock_inherited_by_a_forked_process(self, tmp_path: Path) -> None:
        lock = FileLock(tmp_path / "cpu.lock")
        assert lock.acquire()
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[_descriptor(lock)]) as child:
            lock.release()
            assert FileLock(lock.path).acquire()
            child.communicate()

    @pytest.fixture
    def shared(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A folder for temporary files that all users share."""
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            Path(folder).chmod(0o1777)
            monkeypatch.setattr(tempfile, "tempdir", folder)
            yield Path(folder)


def _descriptor(lock: FileLock) -> int:
    descriptor = lock._descriptor
    assert descriptor is not None
    return descriptor


def _as_nobody(do: Callable[[], None]) -> int:
    """Call a function as another user in a new process, and return the exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(65534)
            do()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestRunStudy:
    @pytest.mark.parametrize(
        ("ini", "output_dir", "expected"),
        [("results-of-ini", None, "results-of-ini"), slow("results-of-ini", "of-study", "of-study")],
    )
    def test_run_study_uses_pytests_results_directory(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        monkeypatch: pytest.MonkeyPatch,
        ini: str,
        output_dir: str | None,
        expected: str,
    ) -> None:
        pytester.makeini(f"[pytest]\nllem_results_dir = {ini}\n")
        pytester.makeconftest("def pytest_llem_study_finished(): raise AssertionError('not after this one')")
        path = write_study(sweep={"n": [1]}, execution={"n_cycles": 1}, output_dir=output_dir)
        elsewhere = pytester.mkdir("elsewhere")
        monkeypatch.chdir(elsewhere)
        result = run_study(path, quiet=True, pytest_args=["--llem-start-method=forkserver", "--llem-run-id=one"])
        assert result.summary.completed == 1
        assert (pytester.path / expected / "noop_one" / "study_result.json").is_file()
        assert list(elsewhere.iterdir()) == []
