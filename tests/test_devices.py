"""A device has one owner at a time, and GPU memory is free before the next experiment starts."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pytest_llem.hardware.gpu_state import GpuState
from pytest_llem.hardware.gpus import Gpu, VisibleGpus, gpus_for, visible_gpus
from pytest_llem.machine import device_locks, lock_files
from pytest_llem.machine.device_locks import CPU, DeviceError, owned
from pytest_llem.machine.gpu_memory import MARGIN_BYTES, MAX_S, GpuMemory, Settled
from pytest_llem.machine.owner import FOLDER, Owner, note_file
from pytest_llem.planning.host import GpuCapacity, this_host
from pytest_llem.results.experiment import GapRecord
from pytest_llem.results.study_result import StudyResult
from tests.conftest import OTHER_PLUGINS, Results
from tests.support import nvml
from tests.support.marks import slow
from tests.support.nvml import Script
from tests.support.processes import wait_until

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
LLEM = ("-p", "llem", "--llem-no-gaps")
ESTIMATED = "energy is estimated from CPU time, not measured"
ONE_CYCLE = {"n_cycles": 1, "cycle_order": "sequential", "contended_retries": 0}

#: Forking despite threads is safe here: libraries' threads are idle, and the child only takes locks and waits.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

WriteStudy = Callable[..., Path]
GiveGpus = Callable[..., Script]
Recorded = Callable[..., list[GapRecord]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of locks that no other test uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / FOLDER


# ---- GPUs of the host ----


def _gpu(uuid: str = A, **more: Any) -> nvml.ScriptedGpu:
    return nvml.ScriptedGpu(uuid, [(0.0, 70.0)], {"memory_mb": 80_000, "power_limit_w": 700, **more})


@pytest.fixture
def gpus(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_build: None) -> GiveGpus:
    """Return a function that gives new processes scripted GPUs."""

    def give(*gpus: nvml.ScriptedGpu) -> Script:
        return nvml.install(monkeypatch, nvml_library, Script(tmp_path / "script", list(gpus)))

    return give


def test_gpu_properties_come_from_nvml(gpus: GiveGpus) -> None:
    script = gpus(_gpu(name="Scripted H100", capability=9.0), _gpu(B, name="Old", capability=7.5, no_memory=1))
    h100 = Gpu(A, "Scripted H100", 80_000_000_000, (9, 0), "580.159.04", 700.0, False)
    old = Gpu(B, "Old", None, (7, 5), "580.159.04", 700.0, False)
    assert nvml.run(os.environ, visible_gpus) == VisibleGpus((h100, old), h100)
    assert nvml.run(os.environ | {"CUDA_VISIBLE_DEVICES": f"{B},{A}"}, visible_gpus) == VisibleGpus(
        (old, h100), old
    )
    assert script.users() == 0


def test_lost_gpu_is_left_out(gpus: GiveGpus) -> None:
    gpus(_gpu(lost_at=0), _gpu(B))
    env = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    seen = nvml.run(env, visible_gpus)
    assert [gpu.uuid for gpu in seen.all] == [B]
    assert seen.first is None, "CUDA counts the lost one, or does not"


def test_without_nvml_there_are_no_gpus(tmp_path: Path, cuda_build: None) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    env = nvml.environment(tmp_path, Script(tmp_path / "script", []))
    assert nvml.run(env, visible_gpus) == nvml.run(env, gpus_for, "2.13.0") == VisibleGpus()


def test_plan_counts_gpus_that_torch_would_use(gpus: GiveGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(_gpu(name="a"), _gpu(B, name="b", capability=8.0), _gpu("GPU-c", no_memory=1))
    assert len(nvml.run(os.environ, this_host).gpus) == 2, "one without memory of its own is left out"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": B}
    assert nvml.run(env, this_host).gpus == (GpuCapacity("b", 80_000_000_000, (8, 0)),)
    assert nvml.run(os.environ | {"CUDA_VISIBLE_DEVICES": ""}, this_host).gpus == ()
    monkeypatch.delenv("PYTHONPATH")
    assert nvml.run(os.environ, this_host).gpus == (), "the torch here is a build for CPUs"


# ---- locks ----


def _owner(experiment: str = "here", **changes: Any) -> Owner:
    return Owner.of_this_process("s", experiment).model_copy(update=changes)


class Holder:
    """Another process that owns devices. It is forked, because importing is slow."""

    def __init__(self, *names: str) -> None:
        owns, ready = os.pipe()
        wait, self._release = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._release)
                with owned(names, Owner.of_this_process("other", "there"), print) as ownership:
                    ownership.note_used(dict.fromkeys(names, 0))
                    os.write(ready, b"!")
                    os.read(wait, 1)
                status = 0
            finally:
                os._exit(status)
        os.close(ready)
        os.close(wait)
        assert os.read(owns, 1) == b"!"
        os.close(owns)

    def release(self) -> None:
        """Make the process release the devices and end. May be called again."""
        if self._release >= 0:
            with suppress(BrokenPipeError):  # the process was killed
                os.write(self._release, b"!")  # closing is not enough: processes forked since have it open too
            os.close(self._release)
            self._release = -1

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def _holding(*names: str) -> Iterator[Holder]:
    """Make another process own devices within the context."""
    holder = Holder(*names)
    try:
        yield holder
    finally:
        holder.release()
        os.waitpid(holder.pid, 0)


class Reports(list[str]):
    """A list of reports. *then* is called at the first report."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self._then = then

    def __call__(self, line: str) -> None:
        self.append(line)
        self._then()


def _text(process: Holder, experiment: str = "there") -> str:
    return rf"cpu: pid {process.pid} runs study other, experiment {experiment} since \d\d:\d\d:\d\d"


def test_free_device_is_owned_at_once() -> None:
    reports = Reports()
    for _ in range(3):
        with owned([CPU], _owner(), reports) as ownership:
            assert (ownership.waited_seconds, ownership.waited_for) == (0, None)
    assert reports == []


def test_wait_is_reported_with_the_owner() -> None:
    with _holding(CPU) as other:
        reports = Reports(other.release)
        with owned([CPU], _owner(), reports) as ownership:
            assert ownership.waited_seconds > 0
        assert re.fullmatch(_text(other), ownership.waited_for or "")
        assert ownership.used_before == {CPU: 0}, "though the other one ended after this one had begun to wait"
    assert reports == [f"waiting for {ownership.waited_for}"]


def test_wait_sleeps_between_two_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []
    with _holding(CPU) as other:

        def sleep(seconds: float) -> None:
            sleeps.append(seconds)
            if len(sleeps) == 5:
                other.release()
                os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)

        monkeypatch.setattr(device_locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        with owned([CPU], _owner(), Reports()):
            pass
    assert sleeps == [device_locks.POLL_S] * 5


def test_killed_owner_holds_no_lock_and_is_not_named(folder: Path) -> None:
    with _holding(CPU) as other:
        reports = Reports(other.kill)
        with owned([CPU], _owner(), reports) as ownership:
            assert re.fullmatch(_text(other), ownership.waited_for or "")
    with _holding(CPU) as other:
        note = note_file(folder, CPU).read_text()
        other.kill()
    assert json.loads(note)["pid"] == other.pid
    assert json.loads(note)["ended"] is None
    with _holding(CPU) as third:
        note_file(folder, CPU).write_text(note)  # as if the third process could not write its own note
        reports = Reports(third.release)
        with owned([CPU], _owner(), reports) as ownership:
            assert ownership.waited_for == "cpu: another process has it"


def test_stopped_process_in_the_queue_is_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_files, "MAX_UNTOUCHED_S", 0.5)
    with _holding(CPU) as first:
        waits, ready = os.pipe()
        second = os.fork()
        if second == 0:
            try:
                with owned([CPU], Owner.of_this_process("other", "next"), Reports(lambda: os.write(ready, b"!"))):
                    pass
            finally:
                os._exit(0)
        assert os.read(waits, 1) == b"!"
        os.kill(second, signal.SIGSTOP)
        first.release()
        with owned([CPU], _owner(), Reports()) as ownership:
            assert ownership.waited_seconds >= 0.5
        os.kill(second, signal.SIGCONT)
        assert os.waitpid(second, 0)[1] == 0
        os.close(waits)
        os.close(ready)


def test_process_with_a_reused_id_is_another_one() -> None:
    assert _owner().is_running()
    assert not _owner(began=psutil.Process().create_time() - 60).is_running()
    assert not _owner(ended=datetime.now(UTC)).is_running()


def test_several_devices_are_owned_together() -> None:
    with _holding(B) as other:
        reports = Reports(other.release)
        with owned([B, A], _owner(), reports) as ownership:
            assert ownership.devices == {A, B}
            assert reports[0].startswith(f"waiting for {B}: pid {other.pid} ")
            with pytest.raises(TimeoutError, match="it waits"), owned([A], _owner(), Reports(_give_up)):
                pass


def _give_up() -> None:
    raise TimeoutError("it waits")


def test_interrupted_wait_holds_nothing() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with _holding(B), pytest.raises(KeyboardInterrupt), owned([A, B], _owner(), Reports(interrupt)):
        pass
    with _holding(A, B):
        pass


@pytest.mark.slow
def test_process_that_waits_comes_before_one_that_returns() -> None:
    """A process that releases a device and requests it again is served after one that waits."""
    order = Path(tempfile.gettempdir()) / "order"
    pids = {}
    for name in "ab":
        pids[name] = os.fork()
        if pids[name] == 0:
            try:
                for turn in range(3):
                    with owned([CPU], _owner(f"{name}{turn}"), Reports()):
                        time.sleep(0.4)
                        with order.open("a") as file:
                            file.write(name)
            finally:
                os._exit(0)
    assert [os.waitpid(pid, 0)[1] for pid in pids.values()] == [0, 0]
    assert sorted(order.read_text()) == [*"aaabbb"]
    assert not re.match("(aaa|bbb)", order.read_text())


def test_locks_are_open_to_all_users(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with owned([CPU], _owner(), Reports()):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    finally:
        os.umask(before)
    assert modes == {FOLDER: 0o1777, "cpu.lock": 0o666, note_file(folder, CPU).name: 0o644}


@pytest.mark.skipif(os.geteuid() != 0, reason="takes two users")
def test_two_users_share_the_locks() -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        Path(shared).chmod(0o1777)
        for user in (0, nobody, 0):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    tempfile.tempdir = shared
                    os.setuid(user)
                    with owned([CPU], _owner(f"of {user}"), Reports()):
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            note = json.loads(Path(shared, FOLDER, f"cpu.{user}.json").read_text())
            assert note["experiment"] == f"of {user}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.symlink_to(folder.parent), "{} is not a folder; remove it"),
        (lambda folder: folder.touch(), "{} is not a folder; remove it"),
        (lambda folder: (folder.mkdir(), (folder / "cpu.lock").symlink_to("x")), "{}/cpu.lock: Too many levels"),
        (lambda folder: (folder.mkdir(), (folder / "cpu.lock").mkdir()), "{}/cpu.lock: Is a directory"),
    ],
    ids=["a link", "a file", "a lock that is a link", "a lock that is a folder"],
)
def test_unusable_lock_folder_is_an_error(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(DeviceError) as caught, owned([CPU], _owner(), Reports()):
        pass
    assert str(caught.value).startswith(f"devices cannot be locked: {message.format(folder)}")
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "x").exists()


@pytest.mark.parametrize(
    "put",
    [
        lambda note, other: note.write_text("garbage"),
        lambda note, other: note.write_bytes(b"\xff" * 100_000),
        lambda note, other: note.write_text("[" * 60_000),
        lambda note, other: os.mkfifo(note),
        lambda note, other: note.symlink_to(other),
        lambda note, other: note.with_suffix(".new").symlink_to(other),
        lambda note, other: note.write_text(_owner(pid=1).model_dump_json().replace('"pid":1', '"pid":-1')),
    ],
    ids=["garbage", "no text", "nested", "a pipe", "a link", "a link before it", "no process"],
)
def test_unreadable_note_is_replaced(folder: Path, put: Callable[[Path, Path], object]) -> None:
    folder.mkdir()
    other = folder.parent / "other"
    other.write_text("theirs")
    put(note_file(folder, CPU), other)
    with owned([CPU], _owner(), Reports()) as ownership:
        assert ownership.used_before == {}
        assert json.loads(note_file(folder, CPU).read_text())["pid"] == os.getpid()
    assert other.read_text() == "theirs"


def test_note_of_an_owner_is_printable() -> None:
    text = str(_owner("\x1b[31m" + "x" * 9000, study="a\nb", worker="gw1"))
    assert text.isprintable()
    assert text.startswith(f"pid {os.getpid()} (gw1) runs study a?b, experiment ?[31mxxx")
    assert len(text) < 400


NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("last", "used"),
    [
        ({"ended": NOW - timedelta(hours=5)}, 7),  # same session: no other experiment in between
        ({"pid": 1, "ended": NOW - timedelta(seconds=5)}, 7),
        ({"pid": 1, "ended": NOW - timedelta(hours=5)}, None),  # other processes may have started since
        ({"pid": 1, "since": NOW - timedelta(hours=5)}, 7),  # killed
        ({"pid": 1, "since": NOW - timedelta(days=5)}, None),
        ({"pid": 1, "ended": NOW + timedelta(days=5)}, None),
    ],
)
def test_memory_in_recent_notes_is_waited_for(last: dict[str, Any], used: int | None) -> None:
    assert _owner(**{"used_bytes": 7, **last}).used_before(_owner(since=NOW)) == used


# ---- GPU memory, with a clock that only sleeping advances ----


class Memory:
    def __init__(self, *course: tuple[float, dict[str, int | None]]) -> None:
        """Take readings in bytes by UUID, each with the time from which on it applies."""
        self.now = 0.0
        self.sleeps: list[float] = []
        self._course = course
        self.memory = GpuMemory(sensors=self._sensors, sleep=self._sleep, clock=lambda: self.now)

    @contextmanager
    def _sensors(self) -> Iterator[Callable[[], dict[str, GpuState]]]:
        yield lambda: [
            {uuid: GpuState(used_bytes=used) for uuid, used in look.items()}
            for since, look in self._course
            if since <= self.now
        ][-1]

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


GB = 10**9


@pytest.mark.parametrize(
    ("course", "before", "settled"),
    [
        ([(0, {A: GB})], {}, Settled(None, None, {A: GB})),
        ([(0, {A: GB})], {A: GB}, Settled(0.0, {}, {A: GB})),
        ([(0, {A: GB})], {A: 2 * GB}, Settled(0.0, {}, {A: GB})),
        ([(0, {A: GB + MARGIN_BYTES})], {A: GB}, Settled(0.0, {}, {A: GB + MARGIN_BYTES})),
        ([(0, {A: 3 * GB}), (2.1, {A: GB})], {A: GB}, Settled(2.25, {}, {A: GB})),
        ([(0, {A: 3 * GB})], {A: GB}, Settled(MAX_S, {A: 2000.0}, {A: 3 * GB})),
        ([(0, {A: GB, B: 9 * GB})], {A: GB, B: GB}, Settled(0.0, {}, {A: GB})),  # another GPU
        ([(0, {A: None})], {A: GB}, Settled(None, None, {})),
        ([(0, {A: 3 * GB}), (1, {A: None})], {A: GB}, Settled(None, None, {})),
        ([(0, {})], {A: GB}, Settled(None, None, {})),
    ],
)
def test_memory_is_waited_for_up_to_a_limit(course: list[Any], before: dict[str, Any], settled: Settled) -> None:
    host = Memory(*course)
    assert host.memory.settle({A}, before) == settled
    assert max(host.sleeps, default=0) <= 0.25


def test_memory_is_not_read_without_a_gpu() -> None:
    assert GpuMemory(sensors=pytest.fail).settle(set(), {}) == Settled()


# ---- whole runs ----


@pytest.fixture
def spans(tmp_path: Path) -> Path:
    """The file in which engines record when they began and ended."""
    return tmp_path / "spans"


def _overlap(spans: Path, count: int) -> bool:
    """Return whether any two of *count* processes overlap."""
    lines = [line.split() for line in spans.read_text().splitlines()]
    assert len(lines) == 2 * count
    running = 0
    for _, what, _ in sorted(lines, key=lambda line: float(line[0])):
        running += {"begins": 1, "ends": -1}[what]
        if running > 1:
            return True
    return False


@pytest.fixture
def recorded(results: Results) -> Recorded:
    """Return the recorded gaps of the completed experiments of a run, in run order."""

    def read(root: Path | None = None) -> list[GapRecord]:
        found = results if root is None else Results(root)
        return [one.gap for one in found.experiments() if one.gap is not None]

    return read


def _start(pytester: pytest.Pytester, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(
        command,
        cwd=pytester.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_xdist_workers_do_not_overlap(
    pytester: pytest.Pytester, write_study: WriteStudy, recorded: Recorded, spans: Path
) -> None:
    write_study(sweep={"n": [1, 2, 3, 4]}, noop={"span": str(spans), "seconds": 0.1}, execution=ONE_CYCLE)
    run = pytester.runpytest_subprocess("study.yaml", *LLEM, "-n", "2")
    run.assert_outcomes(passed=4)
    assert not _overlap(spans, 4)
    gaps = recorded()
    assert not any(gap.waited_seconds for gap in gaps), "a worker gets no experiment while the CPU is in use"
    assert all((gap.memory_waited_seconds, gap.memory_left_mb) == (None, None) for gap in gaps), "there is no GPU"


def test_two_runs_do_not_overlap_and_one_reports_its_wait(
    pytester: pytest.Pytester, write_study: WriteStudy, recorded: Recorded, spans: Path
) -> None:
    write_study(sweep={"n": [1, 2]}, noop={"span": str(spans), "seconds": 0.3}, execution=ONE_CYCLE)
    runs = [_start(pytester, "study.yaml", *LLEM, f"--llem-results-dir={name}") for name in "ab"]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert not _overlap(spans, 4)
    for name, output, other in zip("ab", outputs, reversed(runs), strict=True):
        gaps = [gap for gap in recorded(pytester.path / name) if gap.waited_seconds]
        lines = re.findall(r"^llem: waiting for cpu: pid (\d+) runs study noop, experiment n=\d", output, re.M)
        assert lines == [str(other.pid)] * len(lines)
        assert len(lines) <= len(gaps)


@pytest.fixture
def release_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Call a function after a wait in this process has been reported."""
    wait = device_locks._Waiting.wait

    def after(release: Callable[[], object]) -> None:
        def noted(waiting: device_locks._Waiting, *arguments: Any) -> None:
            wait(waiting, *arguments)
            if waiting._is_reported:
                release()

        monkeypatch.setattr(device_locks._Waiting, "wait", noted)

    return after


ReleaseAfter = Callable[[Callable[[], object]], None]


@pytest.mark.parametrize("quiet", [(), slow(("-q",))])
def test_terminal_names_the_owner_once(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    recorded: Recorded,
    release_after: ReleaseAfter,
    quiet: tuple[str, ...],
) -> None:
    write_study(sweep={"n": [1]}, execution=ONE_CYCLE)
    with _holding(CPU) as other:
        tries: list[None] = []

        def release_at_the_third() -> None:
            tries.append(None)
            if len(tries) == 3:
                other.release()

        release_after(release_at_the_third)
        run = pytester.runpytest_inprocess("study.yaml", *LLEM, *quiet)
    assert run.ret == 0
    lines = [line for line in run.outlines if "waiting" in line]
    assert len(lines) == (0 if quiet else 1), "once, however long it takes"
    assert all(re.fullmatch(rf"llem: waiting for {_text(other)}", line) for line in lines)
    [gap] = recorded()
    assert re.fullmatch(_text(other), gap.waited_for or "")
    assert gap.waited_seconds


@pytest.mark.slow
def test_run_on_another_gpu_does_not_wait(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    gpus: GiveGpus,
    recorded: Recorded,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(_gpu(A), _gpu(B))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    write_study(sweep={"n": [1]}, execution=ONE_CYCLE)
    with _holding(A), _holding(CPU):
        pytester.runpytest_subprocess("study.yaml", *LLEM, timeout=120).assert_outcomes(passed=1)
    assert [gap.waited_seconds for gap in recorded()] == [0]
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {A, B, CPU}


@pytest.mark.slow
def test_engine_that_may_use_any_gpu_owns_all(
    pytester: pytest.Pytester, write_study: WriteStudy, gpus: GiveGpus, recorded: Recorded
) -> None:
    gpus(_gpu(A), _gpu(B))
    write_study(sweep={"n": [1]}, execution=ONE_CYCLE)
    with _holding(B) as other:
        run = _start(pytester, "study.yaml", *LLEM)
        assert run.stdout is not None
        assert any(f"llem: waiting for {B}: pid {other.pid} " in line for line in run.stdout)
    run.communicate(timeout=300)
    [gap] = recorded()
    assert (gap.waited_for or "").startswith(f"{B}: pid {other.pid} runs study other")


def test_items_without_a_process_do_not_wait(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(sweep={"n": [1]}, runners={"noop": "docker"}, execution=ONE_CYCLE)
    write_study("skipped.yaml", sweep={"n": [1]}, execution=ONE_CYCLE)
    pytester.makepyfile(test_plain="def test_plain(): pass")
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                if "skipped" in item.nodeid:
                    item.add_marker(pytest.mark.skip)
        """
    )
    with _holding(CPU) as other:
        run = pytester.runpytest_inprocess("study.yaml", "skipped.yaml", "test_plain.py", *LLEM)
        assert os.waitpid(other.pid, os.WNOHANG) == (0, 0), "it owns the device to the end"
    run.assert_outcomes(failed=1, skipped=1, passed=1)


def _let_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    others = [one for one in OTHER_PLUGINS if one != name]
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{one}" for one in others))


def test_time_limit_does_not_count_the_wait(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    monkeypatch: pytest.MonkeyPatch,
    release_after: ReleaseAfter,
) -> None:
    """pytest-timeout's timer starts once the device is owned."""
    _let_in(monkeypatch, "timeout")
    write_study(sweep={"n": [1]}, execution=ONE_CYCLE)
    pytester.makeconftest(
        """
        import pathlib
        from pytest_llem.execution.device_lease import LEASE

        def pytest_timeout_set_timer(item, settings):
            pathlib.Path("waited").write_text(str(item.stash[LEASE].gap.waited_seconds))
        """
    )
    with _holding(CPU) as other:
        release_after(other.release)
        pytester.runpytest_inprocess("study.yaml", *LLEM, "--timeout=600").assert_outcomes(passed=1)
    assert float((pytester.path / "waited").read_text()) > 0


IS_OWNED = """
    import pathlib, tempfile
    import filelock, pytest
    from pytest_llem.machine.owner import FOLDER

    def is_owned(name="cpu"):
        lock = filelock.FileLock(pathlib.Path(tempfile.gettempdir(), FOLDER, name + ".lock"))
        try:
            with lock.acquire(blocking=False):
                return False
        except filelock.Timeout:
            return True

    def note(text):
        with open("seen", "a") as file:
            print(text, is_owned(), file=file)
"""


def test_device_is_owned_from_set_up_to_the_last_rerun(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recorded: Recorded,
) -> None:
    _let_in(monkeypatch, "rerunfailures")
    write_study(sweep={"n": [1]}, noop={"fail_once": str(tmp_path / "failed")}, execution=ONE_CYCLE)
    pytester.makepyfile(test_plain="def test_plain(): pass")
    pytester.makeconftest(
        IS_OWNED
        + """
    def pytest_runtest_logstart(nodeid):
        note("start")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item):
        note("call")
        return (yield)

    def pytest_runtest_teardown(item):
        note("teardown")

    def pytest_sessionfinish():
        note("end")
"""
    )
    run = pytester.runpytest_inprocess("study.yaml", "test_plain.py", *LLEM, "--reruns=1")
    assert run.parseoutcomes() == {"passed": 2, "rerun": 1}
    seen = (pytester.path / "seen").read_text().splitlines()
    ours, plain = ["start True", "call True", "teardown True"], ["start False", "call False", "teardown False"]
    assert seen == [*ours, *ours, *plain, "end False"]
    [gap] = recorded()
    assert (gap.note, gap.waited_seconds) == ("run again at once", 0)


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("runtest_call(item)", "KeyboardInterrupt"),
        ("runtest_call(item)", "pytest.exit.Exception('so be it')"),
        ("runtest_logstart(nodeid)", "ValueError"),  # an internal error
    ],
)
def test_device_is_released_whatever_ends_the_run(
    pytester: pytest.Pytester, write_study: WriteStudy, hook: str, error: str
) -> None:
    write_study(sweep={"n": [1, 2]}, execution=ONE_CYCLE)
    pytester.makeconftest(
        IS_OWNED
        + f"""
    def pytest_{hook}:
        note("call")
        raise {error}

    def pytest_unconfigure():
        note("end")
"""
    )
    pytester.runpytest_inprocess("study.yaml", *LLEM, no_reraise_ctrlc=True)
    assert (pytester.path / "seen").read_text().splitlines() == ["call True", "end False"]


def test_experiment_fails_where_devices_cannot_be_locked(
    pytester: pytest.Pytester, write_study: WriteStudy, folder: Path, results: Results
) -> None:
    folder.symlink_to(folder.parent)
    write_study(sweep={"n": [1]}, execution=ONE_CYCLE)
    pytester.makepyfile(test_plain="def test_plain(): pass")
    run = pytester.runpytest_inprocess("study.yaml", "test_plain.py", *LLEM)
    run.assert_outcomes(failed=1, passed=1)
    run.stdout.fnmatch_lines(
        ["preflight: devices cannot be locked: */pytest-llem-locks is not a folder; remove it"]
    )
    [entry] = results.manifest["experiments"]
    assert entry["error"]["kind"] == "preflight"


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_ctrl_c_ends_the_wait(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results, workers: tuple[str, ...]
) -> None:
    write_study(sweep={"n": [1, 2]}, execution=ONE_CYCLE)
    pytester.makeconftest(
        """
        import os, pathlib
        from pytest_llem.machine import device_locks

        wait = device_locks._Waiting.wait

        def noted(self, *arguments):
            pathlib.Path(f"waits-{os.getpid()}").touch()
            wait(self, *arguments)

        device_locks._Waiting.wait = noted
        """
    )
    with _holding(CPU):
        run = _start(pytester, "study.yaml", *LLEM, *workers)
        wait_until(lambda: len(list(pytester.path.glob("waits-*"))) == 1)
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=300)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert results.manifest["status"] == "interrupted"
    assert set(results.statuses().values()) == {"pending"}


@pytest.mark.slow
def test_device_of_a_killed_run_is_free_at_once(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    recorded: Recorded,
    tmp_path: Path,
    release_after: ReleaseAfter,
) -> None:
    write_study(
        "hangs.yaml", sweep={"n": [1]}, noop={"fault": "hang", "report": str(tmp_path)}, execution=ONE_CYCLE
    )
    write_study(sweep={"n": [2]}, execution=ONE_CYCLE)
    first = _start(pytester, "hangs.yaml", *LLEM, "--llem-results-dir=first")
    wait_until(lambda: list(tmp_path.glob("*.json")))
    release_after(first.kill)
    second = pytester.runpytest_inprocess("study.yaml", *LLEM, "--llem-results-dir=second")
    first.communicate(timeout=300)
    second.assert_outcomes(passed=1)
    second.stdout.fnmatch_lines(
        [f"llem: waiting for cpu: pid {first.pid} runs study noop, experiment n=1 since *"]
    )
    third = pytester.runpytest_inprocess("study.yaml", *LLEM, "--llem-results-dir=third")
    assert [gap.waited_seconds for gap in recorded(pytester.path / "third")] == [0]
    third.stdout.no_fnmatch_line("*waiting*")


MEMORY = """
    import os, pathlib, time
    import pytest_llem.machine.gpu_memory as memory

    memory.MAX_S, memory.POLL_S = 0.9, 0.1
    path = pathlib.Path(os.environ["LLEM_SCRIPTED_NVML"])
    now = lambda: time.monotonic() - float(path.read_text().split()[1])

    def uses(*course):
        '''Have the GPU's memory in use change: seconds from now on, MB.'''
        lines = [f"used_mb {now() + after} {amount}" for after, amount in course]
        fresh = path.with_suffix(".changed")
        fresh.write_text(path.read_text() + "\\n".join(lines) + "\\n")
        fresh.replace(path)

    finished = 0

    def pytest_llem_experiment_finished(result):
        global finished
        finished += 1
        after(finished)
"""


def _used(mb: int = 500) -> nvml.ScriptedGpu:
    gpu = _gpu()
    gpu.used_mb = [(0.0, mb)]
    return gpu


@pytest.mark.slow
def test_memory_is_waited_for_between_experiments_and_runs(
    pytester: pytest.Pytester, write_study: WriteStudy, gpus: GiveGpus, recorded: Recorded, results: Results
) -> None:
    """The first experiment's memory is freed late, that of the second and of the run never."""
    script = gpus(_used())
    write_study(sweep={"n": [1, 2, 3, 4]}, execution=ONE_CYCLE)
    pytester.makeconftest(
        MEMORY
        + """
    def after(count):
        if count == 1:
            memory.MAX_S = 60
            uses((0, 2500), (1, 520))
        if count == 2:
            memory.MAX_S = 0.9
            uses((0, 2500))
        if count == 4:
            uses((0, 4500))
"""
    )
    run = pytester.runpytest_subprocess("study.yaml", *LLEM)
    run.assert_outcomes(passed=4)
    first, second, third, fourth = recorded()
    assert (first.memory_waited_seconds, first.memory_left_mb) == (None, None), "nothing was before it"
    assert 0 < (second.memory_waited_seconds or 0) < 60
    assert second.memory_left_mb == {}
    assert (third.memory_waited_seconds or 0) >= 0.9
    assert third.memory_left_mb == {A: 1980.0}
    assert (fourth.memory_waited_seconds, fourth.memory_left_mb) == (0, {})
    warning, estimated = StudyResult.load(results.directory).warnings
    assert str(estimated) == ESTIMATED
    assert warning.text.startswith(f"{A} had not released the memory of the previous experiment, or another ")
    assert warning.experiments == ["n=3"]
    run.stdout.fnmatch_lines(
        [f"warning: {A} had not released the memory of the previous experiment, or another *"]
    )
    again = pytester.runpytest_subprocess("study.yaml", *LLEM, "--llem-results-dir=again", "-k", "n=1")
    again.assert_outcomes(passed=1)
    [fifth] = recorded(pytester.path / "again")
    assert fifth.memory_left_mb == {A: 2000.0}
    assert script.users() == 0


@pytest.mark.slow
def test_memory_of_the_attempt_before_is_waited_for(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    gpus: GiveGpus,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _let_in(monkeypatch, "rerunfailures")
    gpus(_used())
    write_study(sweep={"n": [1]}, noop={"fail_once": str(tmp_path / "failed")}, execution=ONE_CYCLE)
    pytester.makeconftest(
        MEMORY
        + """
    after = lambda count: None

    def pytest_runtest_teardown(item, seen=[]):
        if not seen:
            uses((0, 2500))
        seen.append(item)
"""
    )
    run = pytester.runpytest_subprocess("study.yaml", *LLEM, "--reruns=1")
    assert run.parseoutcomes()["rerun"] == 1
    [gap] = recorded()
    assert (gap.note, gap.memory_left_mb) == ("run again at once", {A: 2000.0})


def test_devices_are_handed_over_to_the_next_experiment() -> None:
    with owned([CPU], _owner("one"), Reports()) as ownership:
        ownership.note_used({CPU: 7})
        ownership.waited_seconds = 3.0
        assert ownership.hand_over(_owner("two"))
        note = json.loads(note_file(Path(tempfile.gettempdir(), FOLDER), CPU).read_text())
        assert (note["experiment"], note["used_bytes"], note["ended"]) == ("two", 7, None)
        assert (ownership.waited_seconds, ownership.waited_for) == (0.0, None)


def test_devices_are_not_handed_over_while_another_process_waits() -> None:
    waits, ready = os.pipe()
    with owned([CPU], _owner("one"), Reports()) as ownership:
        waiting = os.fork()
        if waiting == 0:
            status = 1
            try:
                with owned([CPU], Owner.of_this_process("other", "there"), Reports(lambda: os.write(ready, b"!"))):
                    status = 0
            finally:
                os._exit(status)
        assert os.read(waits, 1) == b"!"
        assert not ownership.hand_over(_owner("two"))
    assert os.waitpid(waiting, 0)[1] == 0
    os.close(waits)
    os.close(ready)
