"""Gaps between experiments: their duration, their reasons, and what does not count as a gap."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.hardware.gpu_state import GpuState
from pytest_llem.hardware.gpus import cuda_order
from pytest_llem.machine.cool_down import MAX_S, MAX_SLEEP_S, MIN_S, CoolDown
from pytest_llem.results.experiment import GapRecord
from tests.conftest import FORKSERVER, OTHER_PLUGINS, Results
from tests.support import nvml, sensors
from tests.support.marks import slow
from tests.support.nvml import Script, ScriptedGpu
from tests.support.processes import wait_until

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
UNREAD = GapRecord(seconds=0, reason="skipped", note="no GPU's temperature could be read")
UNWANTED = GapRecord(seconds=0, reason="skipped", note="no gap is configured")


Looked = dict[str, GpuState]
WriteStudy = Callable[..., Path]


def _at_once(gap: GapRecord) -> GapRecord:
    """Return the gap of an experiment whose devices were free."""
    return gap.model_copy(update={"waited_seconds": 0.0})


FIRST = _at_once(GapRecord(seconds=0, reason="skipped", note="the first experiment of its run"))
AN_HOUR = {"experiment_gap_seconds": 3600, "n_cycles": 1, "cycle_order": "sequential"}


class Host:
    """A clock that only sleeping advances, and GPUs that change with it.

    Attributes:
        course: The GPUs' states by UUID, from when on.
        now: In s.
        held: How many sensor contexts are open.
        looks: When it was looked at.
        sleeps: How long each sleep was.
    """

    def __init__(self, *course: tuple[float, Looked]) -> None:
        self.course = course
        self.now = 0.0
        self.held = 0
        self.looks: list[float] = []
        self.sleeps: list[float] = []
        self.cool_down = CoolDown(sensors=self._sensors, sleep=self._sleep, clock=lambda: self.now)
        self.cool_down.record_target()

    @contextmanager
    def _sensors(self) -> Iterator[Callable[[], Looked]]:
        self.held += 1
        yield self._look
        self.held -= 1

    def _look(self) -> Looked:
        assert self.held == 1
        self.looks.append(self.now)
        return [look for since, look in self.course if since <= self.now][-1]

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def wait(self, gap: float | Literal["auto"], at_least: float = 0.0) -> tuple[float, str]:
        assert self.held == 0
        before = self.now
        record = self.cool_down.wait(gap, at_least)
        assert self.held == 0, "NVML is released"
        assert record.seconds == self.now - before
        return record.seconds, record.reason


def _one(temperature: float | None, power: float | None = 70.0) -> Looked:
    return {A: GpuState(temperature, power)}


HOT = (1, _one(60, 300.0))


def _until(then: Looked, at: float = 30.0) -> Host:
    """Return a host whose GPU is first at 40 °C and 70 W, hot from 1 s on, and as in *then* from *at* on."""
    host = Host((0, _one(40)), HOT, (at, then))
    host.now = 2.0
    return host


def test_automatic_gap_ends_when_the_gpu_is_as_at_first() -> None:
    assert _until(_one(40)).wait("auto") == (28.0, "target")


def test_gap_waits_for_the_gpus_of_the_experiment_only() -> None:
    """Other GPUs may have experiments of other workers."""
    cool, hot = GpuState(40, 70.0), GpuState(90, 700.0)
    host = Host((0, {A: cool, B: cool}), (1, {A: cool, B: hot}))
    host.now = 2.0
    assert host.cool_down.wait("auto", uuids={A}).reason == "target"
    assert host.cool_down.wait("auto", uuids={B}).reason == "timeout"
    assert host.cool_down.wait("auto", uuids={"cpu"}).note == "it uses no GPU"
    assert [host.cool_down.will_wait("auto", uuids={name}) for name in (A, "cpu")] == [True, False]


def test_targets_of_another_process_are_used() -> None:
    host, other = Host((0, _one(60))), Host((0, _one(40)))
    host.cool_down.use_targets(json.loads(json.dumps(other.cool_down.targets)))
    assert host.wait("auto") == (MAX_S, "timeout")


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (_one(42, 73.0), "target"),
        (_one(30, 60.0), "target"),  # cooler than at first
        (_one(43, 70.0), "timeout"),
        (_one(40, 73.5), "timeout"),
        (_one(None, 70.0), "timeout"),  # unknown temperature
        (_one(40, None), "timeout"),
        ({}, "timeout"),
        ({B: GpuState(40, 70.0)}, "timeout"),
        ({**_one(40), B: GpuState(90, 700.0)}, "target"),  # appeared later
    ],
)
def test_automatic_gap_waits_for_temperature_and_power(then: dict[str, Any], reason: str) -> None:
    assert _until(then).wait("auto") == ((28.0, reason) if reason == "target" else (MAX_S, reason))


def test_automatic_gap_polls_and_has_a_minimum() -> None:
    host = Host((0, _one(40)))
    assert host.wait("auto") == (MIN_S, "target")
    assert max(host.sleeps) <= 0.5


def test_automatic_gap_takes_5_to_120_s() -> None:
    assert Host((0, _one(40))).wait("auto") == (5.0, "target")
    assert _until(_one(60)).wait("auto") == (120.0, "timeout")


def test_automatic_gap_waits_for_every_gpu() -> None:
    first = {A: GpuState(40, 70.0), B: GpuState(30, 60.0)}
    host = Host((0, first), (20, {**first, B: GpuState(35, 60.0)}), (60, first))
    host.now = 20.0
    assert host.wait("auto") == (40.0, "target")


def test_lower_of_two_first_readings_counts() -> None:
    for one, other in [(_one(60, 70.0), _one(40, 300.0)), (_one(40, 70.0), _one(60, 300.0))]:
        host = Host((0, one), (1, other), (2, _one(45, 90.0)), (20, _one(40, 70.0)))
        host.now = 1.0
        host.cool_down.record_target()
        host.now = 2.0
        assert host.wait("auto") == (18.0, "target")


def test_unreadable_power_is_not_waited_for() -> None:
    assert Host((0, _one(40, None))).wait("auto") == (MIN_S, "target")


def test_automatic_gap_without_temperature_is_skipped() -> None:
    for first in ({}, _one(None)):
        host = Host((0, first))
        assert host.cool_down.wait("auto") == UNREAD
        assert host.looks == [0.0], "at first, and never again"


def test_gpus_without_readings_are_not_waited_for() -> None:
    host = Host((0, _one(40)), (1, _one(None)))
    host.now = 2.0
    assert host.wait("auto") == (0.0, "skipped")


@pytest.mark.parametrize(("gap", "at_least", "seconds"), [(7.5, 0.0, 7.5), (7.5, 20.0, 20.0), (0.0, 3.0, 3.0)])
def test_fixed_gap_and_cycle_gap_take_the_longer(gap: float, at_least: float, seconds: float) -> None:
    host = Host((0, _one(90)))
    host.now = 1.0
    assert host.wait(gap, at_least) == (seconds, "fixed")
    assert host.looks == [0.0]


def test_fixed_gap_is_kept_though_a_sleep_ends_early() -> None:
    host = Host((0, {}))
    host.cool_down.sleep = lambda seconds: host._sleep(seconds / 2 if seconds > 0.01 else seconds)
    assert host.cool_down.wait(10.0).seconds >= 10.0
    assert len(host.sleeps) > 1


def test_gap_longer_than_one_sleep_is_kept() -> None:
    host = Host((0, {}))
    assert host.wait(1e8) == (1e8, "fixed")
    assert max(host.sleeps) == MAX_SLEEP_S


def test_gap_of_zero_is_skipped() -> None:
    host = Host((0, _one(90)))
    assert host.cool_down.wait(0.0) == UNWANTED
    assert host.sleeps == []


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(20.0, (28.0, "target")), (50.0, (50.0, "fixed"))],
)
def test_automatic_gap_is_extended_to_the_cycle_gap(at_least: float, expected: tuple[float, str]) -> None:
    assert _until(_one(40)).wait("auto", at_least) == expected


def test_cycle_gap_needs_no_temperature() -> None:
    assert Host((0, {})).wait("auto", 30.0) == (30.0, "fixed")


def test_interrupted_gap_releases_nvml() -> None:
    left = 0

    @contextmanager
    def sensors() -> Iterator[Any]:
        nonlocal left
        try:
            yield lambda: _one(40)
        finally:
            left += 1

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    cool_down = CoolDown(sensors=sensors, sleep=interrupt)
    cool_down.record_target()
    with pytest.raises(KeyboardInterrupt):
        cool_down.wait("auto")
    assert left == 2


# ---- the sensors, over the real nvidia-ml-py ----


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [A, B]),
        ("", []),
        ("0", [A]),
        ("1, 0", [B, A]),
        ("1,-1,0", [B]),
        ("1,7,0", [B]),
        ("1,1", []),  # this and the next three as CUDA does on two H200s
        (f"{A},{A}", []),
        (f"{A},1", [A]),
        (f"1,{A}", [B]),
        (A, [A]),
        ("GPU-bbbb", [B]),
        ("GPU-", []),  # ambiguous
        ("NoDevFiles", []),
    ],
)
def test_gpus_that_cuda_may_use(visible: str | None, found: list[Any]) -> None:
    assert cuda_order([A, B], visible) == (found, True)


def test_index_is_unknown_where_cuda_orders_otherwise() -> None:
    assert cuda_order([A, B], "1", is_bus_order=False) == ([A, B], False)
    assert cuda_order([A, B], None, is_bus_order=False) == ([A, B], True), "experiments get PCI_BUS_ID"
    assert cuda_order([A, B], f"{B},{A}", is_bus_order=False) == ([B, A], True)
    assert cuda_order([A, B], "MIG-GPU-aaaaaaaa/1/0") == ([A, B], False)


LookAt = Callable[..., tuple[Looked, int, int]]


@pytest.fixture
def look(nvml_library: Path, tmp_path: Path) -> LookAt:
    """Read scripted GPUs once, in a new process with the given environment."""

    def call(*gpus: ScriptedGpu, **env: str) -> tuple[Looked, int, int]:
        script = Script(tmp_path / "script", list(gpus))
        script.write()
        seen, held, left = nvml.run(nvml.environment(nvml_library, script) | env, sensors.read_and_release, script)
        return seen, held, left

    return call


def _gpu(uuid: str = A, celsius: int | None = 35, watts: float = 70.0, **more: Any) -> ScriptedGpu:
    return ScriptedGpu(uuid, [(0.0, watts)], {**({"temperature": f"0 {celsius}"} if celsius else {}), **more})


def test_temperature_and_power_of_every_gpu(look: LookAt) -> None:
    seen, held, left = look(_gpu(), _gpu(B, 48, 412.5, old_driver=1))
    assert seen == {A: GpuState(35.0, 70.0, 0), B: GpuState(48.0, 412.5, 0)}
    assert (held, left) == (1, 0)


def test_unsupported_readings_are_none(look: LookAt) -> None:
    seen, _, _ = look(_gpu(celsius=None, no_memory=1), _gpu(B, no_power_reading=1, used_mb="0 512"))
    assert seen == {A: GpuState(None, 70.0, None), B: GpuState(35.0, None, 512_000_000)}


def test_impossible_readings_are_none(look: LookAt) -> None:
    seen, _, _ = look(_gpu(celsius=4000, watts=4e6))
    assert seen == {A: GpuState(None, None, 0)}


def test_lost_gpu_is_left_out_and_keeps_its_index(look: LookAt) -> None:
    gpus = [_gpu(A, lost_at=0), _gpu(B)]
    assert set(look(*gpus)[0]) == {B}
    assert set(look(*gpus, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")[0]) == {B}


def test_only_visible_gpus_are_read(look: LookAt) -> None:
    assert set(look(_gpu(A), _gpu(B), CUDA_VISIBLE_DEVICES="1")[0]) == {B}
    different = [_gpu(A, name="Small"), _gpu(B, name="Large")]
    assert set(look(*different, CUDA_VISIBLE_DEVICES="1")[0]) == {A, B}
    assert set(look(*different, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")[0]) == {B}


@pytest.mark.slow
def test_without_nvml_there_is_no_reading(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    env = nvml.environment(tmp_path, Script(tmp_path / "script", []))
    assert nvml.run(env, sensors.read) == {}


# ---- whole runs ----


def gaps_of(results: Results) -> list[GapRecord]:
    """Return the recorded gaps of the completed experiments, in run order."""
    return [one.gap for one in results.experiments() if one.gap is not None]


def _seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def test_fixed_gap_is_kept_and_recorded(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1, 2, 3]}, execution={"n_cycles": 1, "experiment_gap_seconds": 0.4})
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER).assert_outcomes(passed=3)
    first, *others = gaps_of(results)
    assert first == FIRST
    assert [(gap.reason, gap.note) for gap in others] == [("fixed", None)] * 2
    assert all(gap.seconds >= 0.4 for gap in others)
    entries = results.manifest["experiments"]
    for before, after, gap in zip(entries, entries[1:], others, strict=False):
        between = _seconds_between(before["completed_at"], after["started_at"])
        assert between >= gap.seconds - 0.002, "the gap is before the experiment, not part of it"
    protocol = StudyResult.load(results.directory).measurement_protocol
    assert (protocol["experiment_gap_seconds"], protocol["cycle_gap_seconds"]) == (0.4, 0)


@pytest.mark.parametrize(
    ("order", "cycles"), [("interleaved", [False, True, False]), slow("sequential", [True, True, True])]
)
def test_cycle_gap_precedes_each_new_cycle(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    order: str,
    cycles: list[bool],
) -> None:
    """Return for each experiment from the second on whether its cycle differs from the one before."""
    write_study(
        sweep={"n": [1, 2]},
        execution={
            "n_cycles": 2,
            "cycle_order": order,
            "experiment_gap_seconds": 0,
            "cycle_gap_seconds": 0.1,
            "start_method": "forkserver",
        },
    )
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER).assert_outcomes(passed=4)
    first, *others = gaps_of(results)
    assert first == FIRST
    assert [gap.reason == "fixed" and gap.seconds >= 0.1 for gap in others] == cycles
    assert all(gap == _at_once(UNWANTED) for gap, new in zip(others, cycles, strict=True) if not new)


@pytest.mark.slow
def test_each_study_sets_its_own_gap(pytester: pytest.Pytester, write_study: WriteStudy, results: Results) -> None:
    one = {"sweep": {"n": [1, 2]}}
    write_study("a.yaml", name="a", execution={"n_cycles": 1, "experiment_gap_seconds": 0}, **one)
    write_study("b.yaml", name="b", execution={"n_cycles": 1, "experiment_gap_seconds": 0.2}, **one)
    pytester.runpytest_inprocess("a.yaml", "b.yaml", "-p", "llem").assert_outcomes(passed=4)
    seen = {}
    for path in results.root.glob("*_*"):
        entries = StudyResult.load(path).experiments
        found = [_gap_of(path / (entry.result_file or "")) for entry in entries]
        seen[path.name[0]] = [gap.reason for gap in found]
    assert seen == {"a": ["skipped", "skipped"], "b": ["fixed", "fixed"]}


def _gap_of(file: Path) -> GapRecord:
    gap = ExperimentResult.model_validate_json(file.read_text()).gap
    assert gap is not None
    return gap


@pytest.mark.slow
def test_automatic_gap_without_nvml_is_skipped(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path), prepend=os.pathsep)
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
    assert gaps_of(results) == [FIRST, _at_once(UNREAD)]


@pytest.fixture
def scripted(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Give later runs of pytest a GPU at 35 °C and 70 W."""
    return nvml.install(monkeypatch, nvml_library, Script(tmp_path / "script", [_gpu()]))


SHORT_GAPS = """
    import pathlib, pytest_llem.machine.cool_down as gaps

    gaps.MIN_S, gaps.MAX_S, gaps.POLL_S = 0.2, 0.6, 0.1
"""


@pytest.mark.slow
def test_automatic_gap_of_a_run_ends_at_target_or_timeout(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    scripted: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first experiment leaves a GPU that never cools down, the second one a cool GPU."""
    # without notes of earlier runs about the GPU's memory
    monkeypatch.setenv("TMPDIR", str(pytester.mkdir("tmp")))
    write_study(sweep={"n": [1, 2, 3]}, execution={"n_cycles": 1, "cycle_order": "sequential"})
    text, path = scripted.path.read_text(), str(scripted.path)
    hot = text.replace("temperature 0 35", "temperature 0 60")
    assert hot != text
    pytester.makeconftest(
        SHORT_GAPS
        + f"""
    after = [{hot!r}, {text!r}, {text!r}]

    def pytest_llem_experiment_finished(result):
        pathlib.Path({path!r} + ".new").write_text(after.pop(0))
        pathlib.Path({path!r} + ".new").replace({path!r})
"""
    )
    done = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    done.assert_outcomes(passed=3)
    first, second, third = gaps_of(results)
    assert first == FIRST
    assert second.reason == "timeout"
    assert second.seconds >= 0.6
    assert third.reason == "target"
    assert third.seconds >= 0.2
    assert scripted.users() == 0
    functions = [call.function for call in scripted.calls()]
    # For the engine's possible devices, for each reading and gap, and for memory before each experiment.
    assert functions.count("nvmlShutdown") == 1 + 3 + 3, "it is not held between"
    warnings = [str(one) for one in StudyResult.load(results.directory).warnings if one.code == "gap_timeout"]
    assert warnings == [
        "the gap ended after 1 s with a GPU warmer or busier than before the first experiment (n=2)"
    ]
    done.stdout.fnmatch_lines([f"warning: {warnings[0]}"])


@pytest.mark.parametrize(
    ("execution", "points"),
    [slow({"experiment_gap_seconds": 0}, [1, 2]), slow({}, [1])],
    ids=["none-wanted", "alone"],
)
def test_nvml_is_not_read_where_no_gap_needs_it(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    scripted: Script,
    execution: dict[str, Any],
    points: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # or NVML would be called for the engine's possible GPUs
    write_study(sweep={"n": points}, execution={"n_cycles": 1, **execution})
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=len(points))
    assert not scripted.path.with_suffix(".trace").exists()


@pytest.mark.slow
def test_only_the_first_experiment_on_a_device_has_no_gap(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """In whichever worker the next one runs."""
    write_study(sweep={"n": [1, 2, 3, 4]}, execution={"n_cycles": 1, "experiment_gap_seconds": 0.2})
    pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-n", "2").assert_outcomes(passed=4)
    entries = sorted(results.manifest["experiments"], key=lambda entry: str(entry["started_at"]))
    first, *others = [_gap_of(results.directory / entry["result_file"]) for entry in entries]
    assert (first.reason, first.note) == ("skipped", FIRST.note)
    assert all(gap.reason == "fixed" and gap.seconds >= 0.2 for gap in others)


def test_skipped_experiments_have_no_gap(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """Neither before a skipped experiment nor before the first one that runs: a gap would take an hour."""
    write_study(sweep={"n": [1, 2, 3, 4]}, execution=AN_HOUR)
    pytester.makepyfile(test_plain="def test_plain(): pass")
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            skip = [pytest.mark.skip, pytest.mark.skipif(True, reason="so it is"), pytest.mark.skip("no")]
            for item, mark in zip([items[0], items[2], items[3]], skip):
                item.add_marker(mark)
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "test_plain.py", "-p", "llem", FORKSERVER)
    run.assert_outcomes(passed=2, skipped=3)
    assert list(results.statuses().values()) == ["skipped", "completed", "skipped", "skipped"]
    assert gaps_of(results) == [FIRST]


@pytest.mark.parametrize("option", ["--setup-only", "--setup-plan"])
def test_no_gap_where_nothing_runs(pytester: pytest.Pytester, write_study: WriteStudy, option: str) -> None:
    write_study(execution=AN_HOUR)
    assert pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, option).ret == 0


def test_time_limit_and_duration_do_not_count_the_gap(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = [name for name in OTHER_PLUGINS if name != "timeout"]
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in allowed))
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1, "experiment_gap_seconds": 0.2})
    pytester.makeconftest(
        """
        import pathlib
        from pytest_llem.execution.device_lease import LEASE

        def note(text):
            with pathlib.Path("seen").open("a") as seen:
                print(text, file=seen)

        def pytest_timeout_set_timer(item, settings):
            note(f"timer {item.stash[LEASE].gap.reason}")

        def pytest_runtest_logstart(nodeid):
            note("start")
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "--timeout=600")
    run.assert_outcomes(passed=2)
    seen = (pytester.path / "seen").read_text().splitlines()
    assert seen == ["timer skipped", "start", "timer fixed", "start"], "the gap is over before either begins"


def test_rerun_has_no_gap(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = [name for name in OTHER_PLUGINS if name != "rerunfailures"]
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in allowed))
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1, "experiment_gap_seconds": 0.2})
    pytester.makeconftest(
        """
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_pyfunc_call(pyfuncitem, seen=[]):
            yield
            seen.append(pyfuncitem.name)
            if len(seen) == 2:
                pytest.fail("once")
            return True
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "--reruns=1")
    assert run.parseoutcomes() == {"passed": 2, "rerun": 1}
    first, again = gaps_of(results)
    assert first == FIRST
    assert (again.seconds, again.reason, again.note) == (0, "skipped", "run again at once")


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_ctrl_c_ends_the_gap(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results, workers: tuple[str, ...]
) -> None:
    write_study(sweep={"n": [1, 2, 3]}, execution=AN_HOUR)
    pytester.makeconftest(
        """
        import os, pathlib, time
        sleep = time.sleep

        def noted(seconds):
            if seconds > 600:
                pathlib.Path(f"asleep-{os.getpid()}").touch()
            sleep(seconds)

        time.sleep = noted
        """
    )
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *workers]
    run = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    # a second worker waits for the device at the same time
    wait_until(lambda: list(pytester.path.glob("asleep-*")))
    for _ in range(2):  # a third one may come when pytest has ended and Python's own handler is back
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.05)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert results.manifest["status"] == "interrupted"
    counts = Counter(results.statuses().values())
    assert counts["completed"] + counts["pending"] == 3, "what waits has not begun"
    assert 1 <= counts["completed"] <= (2 if workers else 1)
    if not workers:
        assert re.search(r"interrupts.py:\d+: KeyboardInterrupt", output)
