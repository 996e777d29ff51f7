"""Contention of CPUs and GPUs: detection, repetition of contended cycles, and effect on verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_llem import StudyResult
from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.cli import main
from pytest_llem.execution import experiment
from pytest_llem.gates.baselines import BaselineError, load
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.regression import compare
from pytest_llem.gates.saving import save
from pytest_llem.gates.verdict_text import verdict_line
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.isolation.launcher import Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.contention import (
    THRESHOLDS,
    ContentionWatch,
    assess_contention,
    contention_warnings,
    with_prefill,
)
from pytest_llem.measurement.cpu_activity import CpuActivity, cpu_activity
from pytest_llem.measurement.cpu_counters import Snapshot, snapshot
from pytest_llem.measurement.gpu_activity import gpu_activity
from pytest_llem.reporting.html.provenance import Provenance
from pytest_llem.results.contention import Contention, GpuContention, PointContention
from pytest_llem.results.cycles import summarise_contention
from pytest_llem.results.experiment import ExperimentResult, GapRecord
from pytest_llem.results.findings import Findings
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.tabular import experiment_table, point_table
from pytest_llem.study.gates import Budget, GatesConfig
from tests.conftest import Results, WriteStudy
from tests.support.proc import Proc
from tests.support.study_results import H100, point, study_result
from tests.support.warned import texts

GOLDEN = Path(__file__).parent / "golden" / "1.0" / "experiments"


def near(value: float) -> Any:
    """Return an object that equals *value* up to rounding."""
    return pytest.approx(value)


ROOT, WORKER, CHILD, HARNESS, OTHER = 10, 11, 12, 20, 30


# ---- values from /proc ----


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    """A machine with two CPUs, a supervisor, its worker with two threads, a harness and another program."""
    found = Proc(tmp_path)
    found.cpus(100.0, 50.0, stolen=1.0)
    found.process(1, 0)
    found.process(ROOT, 1, 1.0, threads={10: (1.0, 0.5, 3)})
    found.process(WORKER, ROOT, 20.0, reaped=5.0, threads={11: (15.0, 1.0, 10), 110: (5.0, 0.0, 0)})
    found.process(HARNESS, 1, 7.0)
    found.process(OTHER, 1, 9.0, name="cc1 (x) y")
    found.pressure(30.0)
    return found


def look(proc: Proc, at: float) -> Snapshot:
    """Return a snapshot with the time *at*, in s."""
    return replace(snapshot([ROOT], proc.proc, proc.cgroups, cpus=(0, 1)), at=at)


def test_cpu_time_received_and_used_by_others(proc: Proc) -> None:
    before = look(proc, 100.0)
    proc.cpus(110.0, 56.0, stolen=1.5)
    proc.process(WORKER, ROOT, 28.0, reaped=5.0, threads={11: (22.0, 3.0, 40), 110: (6.0, 0.0, 0)})
    proc.process(HARNESS, 1, 7.5)
    proc.process(OTHER, 1, 16.5, name="cc1 (x) y")
    proc.pressure(34.0)
    found = cpu_activity(before, look(proc, 110.0), [HARNESS])
    assert found == CpuActivity(
        seconds=10.0,
        cpus=2,
        own_cpu_seconds=near(8.0),
        cpu_seconds=near(8.0),
        cpu_wait_seconds=near(2.0),
        involuntary_switches=30,
        others_cpu_share=near((16.0 - 8.0 - 0.5) / 20),
        others=(f"cc1 (x) y ({OTHER})",),
        steal_share=near(1.0 / 17.0),
        pressure_share=near(0.4),
    )


def test_a_child_counts_only_what_it_used_in_the_window(proc: Proc) -> None:
    """One child used 3 s before the window and is reaped in it; another starts and ends in it."""
    proc.process(CHILD, WORKER, 3.0)
    before = look(proc, 0.0)
    (proc.proc / str(CHILD) / "stat").unlink()
    proc.process(WORKER, ROOT, 20.0, reaped=5.0 + 3.2 + 1.0, threads={11: (15.0, 1.0, 10), 110: (5.0, 0.0, 0)})
    proc.cpus(101.2, 50.0)
    found = cpu_activity(before, look(proc, 1.0))
    assert found.own_cpu_seconds == near(1.2)
    assert found.others_cpu_share == near(0.0)


def test_processes_missed_by_ticks_count_by_their_own_cpu_time(proc: Proc) -> None:
    """The experiment sleeps at each tick: it used more CPU time than /proc/stat counts in total."""
    before = look(proc, 0.0)
    proc.process(WORKER, ROOT, 25.0, reaped=5.0)
    proc.process(OTHER, 1, 13.0)
    proc.cpus(104.0, 50.0)
    assert cpu_activity(before, look(proc, 10.0)).others_cpu_share == near(4.0 / 20)
    pinned = replace(before, covers_all_cpus=False), replace(look(proc, 10.0), covers_all_cpus=False)
    assert cpu_activity(*pinned).others_cpu_share == 0.0, "on which CPU that was is not known"


def test_threads_that_begin_in_the_window_count_from_zero(proc: Proc) -> None:
    before = look(proc, 0.0)
    threads = {11: (15.0, 1.0, 10), 111: (2.0, 0.5, 4), 110: (1.0, 0.25, 1)}  # 110 ended, and its id was reused
    proc.process(WORKER, ROOT, 23.0, threads=threads)
    found = cpu_activity(before, look(proc, 10.0))
    assert (found.cpu_seconds, found.cpu_wait_seconds, found.involuntary_switches) == (3.0, 0.75, 5)


def test_a_pid_that_is_used_again_is_another_process(proc: Proc) -> None:
    before = look(proc, 0.0)
    proc.process(OTHER, 1, 2.0, name="make", started=999)
    assert cpu_activity(before, look(proc, 10.0)).others == (f"make ({OTHER})",)


@pytest.mark.parametrize("text", ["0 0 0\n", "", None], ids=["zeros", "empty", "no file"])
def test_kernel_that_does_not_count_waiting_gives_none(proc: Proc, text: str | None) -> None:
    for file in proc.proc.glob("*/task/*/schedstat"):
        file.unlink()
        if text is not None:
            file.write_text(text)
    found = cpu_activity(look(proc, 0.0), look(proc, 10.0))
    assert (found.cpu_seconds, found.cpu_wait_seconds, found.involuntary_switches) == (None, None, None)
    assert assess_contention(found, [], 10.0).state == "unknown"


@pytest.mark.parametrize("text", [None, "", "cpu0 1 2 3\n", "cpu0 1 0 0 9 0 0 0 0 0 0\n"])
def test_proc_stat_without_every_cpu_gives_none(proc: Proc, text: str | None) -> None:
    (proc.proc / "stat").unlink()
    if text is not None:
        (proc.proc / "stat").write_text(text)
    found = cpu_activity(look(proc, 0.0), look(proc, 10.0))
    assert (found.others_cpu_share, found.steal_share) == (None, None)
    assert assess_contention(found, [], 10.0).state == "unknown"


def test_nothing_is_known_without_proc(tmp_path: Path) -> None:
    nowhere = snapshot([ROOT], tmp_path / "proc", tmp_path / "cgroup", cpus=(0,))
    found = cpu_activity(nowhere, replace(nowhere, at=nowhere.at + 10.0))
    assert assess_contention(found, [], 10.0).state == "unknown"
    figures = {name: value for name, value in vars(found).items() if name not in ("seconds", "cpus", "others")}
    assert set(figures.values()) == {None}


V2 = "nr_periods {}\nnr_throttled {}\nthrottled_usec {}000000\n"
V1 = "nr_periods {}\nnr_throttled {}\nthrottled_time {}000000000\n"


@pytest.mark.parametrize(
    ("line", "path", "text"),
    [("0::/a/b", "a", V2), ("0::/on/the/host", "", V2), ("3:cpu,cpuacct:/a", "cpu/a", V1)],
    ids=["version 2, a group around it", "version 2, in a container", "version 1"],
)
def test_throttling_by_the_quota_is_read(proc: Proc, line: str, path: str, text: str) -> None:
    proc.group(line, path, {"cpu.stat": f"usage_usec 5\n{text.format(100, 50, 20)}"})
    before = look(proc, 0.0)
    proc.group(line, path, {"cpu.stat": f"usage_usec 9\n{text.format(200, 80, 23)}"})
    found = cpu_activity(before, look(proc, 10.0))
    assert (found.throttled_share, found.throttled_seconds) == (near(0.3), near(3.0))
    still = cpu_activity(look(proc, 0.0), look(proc, 10.0))
    assert (still.throttled_share, still.throttled_seconds) == (0.0, 0.0)


def test_pressure_on_the_control_group_is_read(proc: Proc) -> None:
    proc.group("0::/a", "a", {"cpu.pressure": "some avg10=1.00 avg60=0.00 avg300=0.00 total=1000000\n"})
    before = look(proc, 0.0)
    proc.group("0::/a", "a", {"cpu.pressure": "some avg10=1.00 avg60=0.00 avg300=0.00 total=3500000\n"})
    assert cpu_activity(before, look(proc, 10.0)).cgroup_pressure_share == near(0.25)


# ---- values from the driver ----


class Driver:
    """The functions of NVML that are called here."""

    def __init__(
        self,
        used: Mapping[int, int] | None,
        holders: Mapping[int, int | None] | None,
        busy: Sequence[tuple[float, int]] = (),
    ) -> None:
        self.used, self.holders, self.busy = used, holders, busy
        self.since: list[int] = []

    def constant(self, name: str) -> int:
        return 1

    def ask(self, function: str, *arguments: Any) -> Any:
        if function == "nvmlDeviceGetHandleByUUID":
            return "handle"
        if function == "nvmlDeviceGetProcessUtilization" and self.used is not None:
            self.since.append(arguments[1])
            return [SimpleNamespace(pid=pid, smUtil=share) for pid, share in self.used.items()]
        if function == "nvmlDeviceGetComputeRunningProcesses" and self.holders is not None:
            return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.holders.items()]
        if function == "nvmlSystemGetProcessName":
            return f"/usr/bin/p{arguments[0]}"
        if function == "nvmlDeviceGetSamples" and self.busy:
            samples = [
                SimpleNamespace(timeStamp=int(at * 1e6), sampleValue=SimpleNamespace(uiVal=share))
                for at, share in self.busy
            ]
            return 1, samples
        return None


def gpu(*arguments: Any, **options: Any) -> GpuContention:
    (found,) = gpu_activity(cast(Nvml, Driver(*arguments, **options)), ["GPU-1"], {WORKER}, (1000.0, 1010.0))
    return found


def test_gpu_use_by_others_excludes_the_experiment() -> None:
    busy = [(1001.0, 90), (1005.0, 70), (1011.0, 0)]
    found = gpu({WORKER: 60, 500: 25, 501: 10}, {WORKER: 10_000_000, 500: 2_000_000}, busy)
    assert found == GpuContention.model_construct(
        device="GPU-1",
        busy_share=near(0.8),
        others_share=near(0.35),
        others_memory_mb=2.0,
        others=["p500 (500)", "unknown (501)"],
    )


def test_a_gpu_that_only_the_experiment_uses() -> None:
    alone = GpuContention(device="GPU-1", others_share=0, others_memory_mb=0.0)
    assert gpu({WORKER: 60}, {WORKER: 10_000_000}) == alone


@pytest.mark.parametrize(
    ("used", "holders"),
    [(None, None), (None, {}), ({}, {}), ({4711: 60}, {4711: 10_000_000})],
    ids=["no function", "nobody", "nobody either", "pids of the host"],
)
def test_use_by_others_is_unknown_where_the_experiment_is_not_listed(used: Any, holders: Any) -> None:
    found = gpu(used, holders)
    assert (found.others_share, found.others_memory_mb, found.others) == (None, None, [])
    assert assess_contention(QUIET, [found], 10.0).state == "unknown"


@pytest.mark.parametrize("used", [{WORKER: 60}, {WORKER: 60, 500: 0}], ids=["no sample", "a sample of 0"])
def test_use_that_the_drivers_samples_do_not_show_is_unknown(used: dict[int, int]) -> None:
    """As that by a process on an H200 that computed for 5 % of the time."""
    found = gpu(used, {WORKER: 10_000_000, 500: 2_000_000})
    assert found == GpuContention(device="GPU-1", others_memory_mb=2.0, others=["p500 (500)"])
    state, reasons = (judged := assess_contention(QUIET, [found], 10.0)).state, judged.reasons
    assert state == "unknown"
    what = "use of GPU-1 by other processes is not available"
    assert reasons == [f"{what}: the driver lists the memory of p500 (500), and not the use"]


def test_reason_of_the_prefill_window_names_a_process_with_colons() -> None:
    used = GpuContention(device="GPU-1", others=["VLLM::EngineCore (500)"])
    found = with_prefill(assess_contention(QUIET, [ALONE], 10.0), assess_contention(QUIET, [used], 10.0))
    assert found.reasons == [
        "use of GPU-1 by other processes is not available in the prefill window: "
        "the driver lists the memory of VLLM::EngineCore (500), and not the use"
    ]


def test_driver_is_queried_from_the_start_of_the_window() -> None:
    driver = Driver({WORKER: 1}, {})
    gpu_activity(cast(Nvml, driver), ["GPU-1"], {WORKER}, (1000.5, 1010.0))
    assert driver.since == [1_000_500_000]


# ---- thresholds ----

#: A busy thread for 10 s on 16 CPUs, as it was on a quiet machine.
QUIET = CpuActivity(
    10.0,
    16,
    own_cpu_seconds=10.0,
    cpu_seconds=10.0,
    cpu_wait_seconds=0.002,
    others_cpu_share=0.0025,
    steal_share=0.0,
    throttled_share=0.0,
)
ALONE = GpuContention(device="GPU-1", busy_share=0.9, others_share=0.0, others_memory_mb=0.0)


def share(received: float, seconds: float = 10.0) -> dict[str, Any]:
    return {"cpu_seconds": received * seconds, "cpu_wait_seconds": (1 - received) * seconds}


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({}, "uncontended", ""),
        (share(0.9966), "uncontended", ""),  # as many threads as CPUs, quiet
        (share(0.937) | {"others_cpu_share": 0.0593}, "contended", "waited for a CPU: received 94 %"),
        (share(0.5) | {"others_cpu_share": 0.5}, "contended", "waited for a CPU: received 50 %"),
        ({"others_cpu_share": 0.0625}, "contended", "other processes used the CPUs: 6 % of 16 CPUs"),
        ({"others_cpu_share": 0.03}, "uncontended", ""),
        ({"steal_share": 0.0038}, "uncontended", ""),
        ({"steal_share": 0.1}, "contended", "other virtual machines used the CPUs: 10 %"),
        ({"throttled_share": 0.4}, "contended", "the control group used up its CPU quota: throttled in 40 %"),
        # Twice as many threads as CPUs wait for each other, not for other processes.
        (share(0.5, 320.0) | {"own_cpu_seconds": 159.0, "others_cpu_share": 0.0105}, "uncontended", ""),
        (share(0.5), "unknown", "waited for a CPU, for an unknown reason: received 50 %"),
        # A process that sleeps, and waits for 2 ms in total, has lost nothing.
        ({"cpu_seconds": 0.002, "cpu_wait_seconds": 0.002}, "uncontended", ""),
        ({"cpu_seconds": 0.0, "cpu_wait_seconds": 0.0}, "uncontended", ""),
        ({"cpu_seconds": None, "cpu_wait_seconds": None}, "unknown", "time waited for a CPU is not available"),
        ({"others_cpu_share": None}, "unknown", "CPU time of other processes is not available"),
        # Known contention decides, even if other values are unknown.
        ({"others_cpu_share": None, "steal_share": 0.1}, "contended", "other virtual machines"),
        ({"steal_share": None, "throttled_share": None, "involuntary_switches": None}, "uncontended", ""),
    ],
)
def test_state_follows_from_the_thresholds(changes: dict[str, Any], state: str, reason: str) -> None:
    found = assess_contention(replace(QUIET, **changes), [], 10.0)
    assert found.state == state
    assert found.reasons == [] if not reason else found.reasons[0].startswith(reason)


def test_record_has_the_values_behind_the_state() -> None:
    found = assess_contention(replace(QUIET, others=("cc1 (30)",), involuntary_switches=7), [ALONE], 10.0)
    assert (found.cpu_received_share, found.involuntary_switches) == (near(0.9998), 7)
    assert (found.cpus, found.others, found.gpus) == (
        16,
        ["cc1 (30)"],
        [GpuContention(device="GPU-1", busy_share=0.9, others_share=0.0, others_memory_mb=0.0)],
    )


def test_gpu_engine_is_contended_only_if_it_waited_for_a_cpu() -> None:
    """An experiment on another GPU uses another CPU: that alone is not contention."""
    others = replace(QUIET, others_cpu_share=0.0625)
    assert assess_contention(others, [ALONE], 10.0).state == "uncontended"
    assert assess_contention(replace(others, **share(0.9)), [ALONE], 10.0).state == BAD


def test_another_process_on_the_gpu_is_contention() -> None:
    shared = ALONE.model_copy(update={"others_share": 0.35, "others": ["python (500)"]})
    found = assess_contention(QUIET, [ALONE, shared], 10.0)
    assert (found.state, found.reasons) == (
        "contended",
        ["other processes used GPU-1: 35 % of it, most by python (500)"],
    )


def test_a_short_window_is_unknown_however_busy_the_machine() -> None:
    busy = replace(QUIET, **share(0.1), others_cpu_share=0.9)
    found = assess_contention(busy, [], 0.0001)
    assert (found.state, found.reasons) == ("unknown", ["window shorter than 1 s: 0.0001 s"])
    assert assess_contention(busy, [], THRESHOLDS.min_window_seconds).state == "contended"


def test_contention_warnings_have_no_numbers() -> None:
    """Experiments with equal contention thus share one warning of the study."""
    busy = replace(QUIET, steal_share=0.5)
    found = assess_contention(busy, [ALONE.model_copy(update={"busy_share": 0.2})], 10.0)
    assert texts(contention_warnings(found)) == [
        "contended: other virtual machines used the CPUs",
        "host-bound: GPU-1 was busy for less than 50 % of the window",
    ]
    assert not list(contention_warnings(assess_contention(QUIET, [ALONE], 10.0)))
    assert not list(contention_warnings(assess_contention(busy, [], 0.1)))


def test_gpu_memory_of_others_is_not_attributed_to_the_experiment_before() -> None:
    gap = GapRecord(seconds=0.0, reason="target", memory_left_mb={"GPU-1": 900.0, "GPU-2": 70.0})
    gpus = [GpuContention(device="GPU-1", others_memory_mb=905.0), GpuContention(device="GPU-2")]
    result = golden().model_copy(
        update={"gap": gap, "contention": Contention(state="unknown", gpus=gpus), "warnings": []}
    )
    found = Findings()
    found.add(result, point({}, seconds=[1.0]))
    assert texts(found.study_warnings()) == [
        "GPU-2 had not released the memory of the previous experiment, or another process holds it: "
        "gap.memory_left_mb of the result says how much",
        "other processes hold memory of GPU-1: contention.gpus of the result says how much",
    ]


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Two busy processes for each CPU."""
    code = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    time.sleep(0.5)
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_busy_machine_is_contended(
    busy_machine: None, run: Callable[..., Outcome], job: Callable[..., Job], servers: object
) -> None:
    """An experiment that sleeps loses no CPU time, but other processes still use its CPUs."""
    one = job(seconds=1.2)
    found = run(one, timeout=60)
    assert found.result is not None, found.error
    contention = ExperimentResult.model_validate_json(found.result).contention
    assert contention is not None
    assert contention.state == "contended"
    assert contention.others_cpu_share is not None
    assert contention.others_cpu_share > 0.3


@pytest.mark.slow
def test_a_busy_process_among_others_receives_less_than_it_wants(busy_machine: None) -> None:
    watch = ContentionWatch([0])  # no process belongs to the experiment
    code = """
import os, time
from pytest_llem.measurement.contention import ContentionWatch, assess_contention
watch, began = ContentionWatch([os.getpid()]), time.monotonic()
while time.monotonic() < began + 1.5: pass
print(assess_contention(*watch.activity([]), 1.5).model_dump_json())
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    found = Contention.model_validate_json(output)
    assert found.state == "contended"
    assert found.cpu_received_share is not None
    assert found.cpu_received_share < 0.9
    assert any(reason.startswith("waited for a CPU") for reason in found.reasons)
    assert assess_contention(*watch.activity([]), 1.5).state == "unknown", "its own processes cannot be seen"


# ---- a contended cycle is repeated ----

#: States of an experiment's runs by its id; "uncontended" after the last of them.
Script = Mapping[str, Sequence[str]]


class ScriptedRuns:
    """Replaces the launcher of experiment processes.

    Attributes:
        script: How each is contended.
        runs: The cycles that were run, in order.
    """

    def __init__(self, script: Script) -> None:
        self.script = {name: list(states) for name, states in script.items()}
        self.runs: list[int] = []

    def __call__(self, job: Job, **options: object) -> Outcome:
        self.runs.append(job.identity["cycle"])
        states = self.script.get(job.identity["experiment_id"]) or ["uncontended"]
        contention = {"state": states.pop(0), "reasons": ["others: 50 %"], "repeats": list(job.contended_runs)}
        result = golden().model_dump(mode="json") | {"identity": job.identity, "contention": contention}
        return Outcome(json.dumps(result), output=f"run {len(self.runs)}\n")


class Study:
    """A study of one point in three cycles."""

    def __init__(
        self, pytester: pytest.Pytester, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._pytester, self._write, self._monkeypatch = pytester, write, monkeypatch
        self.runs: list[int] = []

    def run(self, script: Script, *options: str, **execution: Any) -> pytest.RunResult:
        """Run the study with the contention states of *script*."""
        scripted = ScriptedRuns(script)
        self._monkeypatch.setattr(experiment, "run_isolated", scripted)
        self._write(sweep={"n": [1]}, execution={"n_cycles": 3, "cycle_order": "sequential", **execution})
        found = self._pytester.runpytest_inprocess("study.yaml", "-p", "llem", *options)
        self.runs = scripted.runs
        return found


@pytest.fixture
def study(pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch) -> Study:
    return Study(pytester, write_study, monkeypatch)


BAD = "contended"


def test_a_contended_cycle_is_repeated_once_a_point(study: Study, results: Results) -> None:
    found = study.run({"n=1-cycle=1": [BAD], "n=1-cycle=2": [BAD]}, "-rP")
    found.assert_outcomes(passed=3)
    assert study.runs == [1, 1, 2, 3]
    first, second, third = (
        ExperimentResult.model_validate_json(file.read_text()).contention
        for file in sorted((results.directory / "experiments").glob("*.json"))
    )
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.state, len(first.repeats), second.state, len(second.repeats)) == ("uncontended", 1, BAD, 0)
    assert first.repeats[0].reasons == ["others: 50 %"]
    assert first.repeats[0].seconds == golden().metrics["seconds"].value
    (summary,) = results.study_result["points"]
    assert summary["contention"] == {
        "contended": [2],
        "unknown": [],
        "reasons": ["others: 50 %"],
        "unknown_reasons": [],
    }
    found.stdout.fnmatch_lines(["llem: n=1-cycle=1 is contended and is measured again: others: 50 %"])
    found.stdout.fnmatch_lines(["run 1", "run 2"])  # output of both runs


@pytest.mark.parametrize(("retries", "first"), [(0, 1), (2, 3), (9, 7)])
def test_study_sets_how_often_contended_cycles_are_repeated(study: Study, retries: int, first: int) -> None:
    script = {"n=1-cycle=1": [BAD] * 6 + ["uncontended"], "n=1-cycle=2": ["unknown"]}
    study.run(script, contended_retries=retries).assert_outcomes(passed=3)
    assert study.runs == [*([1] * first), 2, 3]


def test_xdist_workers_share_the_count_of_repeats() -> None:
    one, other, alone = SharedState("together"), SharedState("together"), SharedState()
    try:
        assert [one.claim("s", "x"), other.claim("s", "x"), other.claim("s", "y"), one.claim("s", "y")] == [
            True,
            False,
            True,
            False,
        ]
        assert [alone.claim("s", "x"), alone.claim("s", "x")] == [True, False]
    finally:
        one.close()


def test_a_study_that_computes_nothing_is_unknown_and_not_repeated(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1, "start_method": "forkserver"})
    pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    (file,) = (results.directory / "experiments").glob("*.json")
    found = ExperimentResult.model_validate_json(file.read_text()).contention
    assert found is not None
    assert (found.state, found.repeats) == ("unknown", [])
    assert found.cpu_seconds is not None, "figures are kept all the same"


# ---- verdicts ----

SLOWER = [2.0, 2.001, 1.999]
SAME = [1.0, 1.001, 0.999]
WHY = "other processes used the CPUs: 48 % of 2 CPUs"
CONTENDED = PointContention(contended=[2], reasons=[WHY])
UNKNOWN = PointContention(unknown=[1, 2, 3], unknown_reasons=["window shorter than 1 s"])


def verdict(metric: str, candidate: PointResult, reference: PointResult, **options: Any) -> Any:
    found = compare(
        study_result(candidate), study_result(reference), GatesConfig(metrics=[metric]), name="main", **options
    )
    return found.verdicts[0]


def timed(values: Sequence[float], contention: PointContention | None = None) -> PointResult:
    return point({}, seconds=values, peak_memory_mb=values, contention=contention)


@pytest.mark.parametrize(
    ("values", "otherwise"), [(SLOWER, "REGRESSION"), (SAME, "SAME"), ([0.5] * 2 + [0.501], "IMPROVEMENT")]
)
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_contended_candidate_or_reference_is_inconclusive(values: list[float], otherwise: str, side: str) -> None:
    plain = {"candidate": timed(values), "reference": timed(SAME)}
    assert verdict("seconds", **plain).verdict == otherwise
    found = verdict("seconds", **plain | {side: plain[side].model_copy(update={"contention": CONTENDED})})
    assert (found.verdict, found.outcome, found.ratio) == ("INCONCLUSIVE", "skipped", None)
    where = "in the candidate" if side == "candidate" else "in the reference"
    assert found.contended == f"{where}, cycle 2 contended: {WHY}"
    assert verdict_line(found).count(WHY) == 1
    assert "repeat the measurement" in found.reason


def test_inconclusive_by_contention_fails_if_configured() -> None:
    found = verdict("seconds", timed(SAME, CONTENDED), timed(SAME), fail_on="inconclusive")
    assert (found.verdict, found.outcome) == ("INCONCLUSIVE", "failed")


def test_metric_unaffected_by_contention_is_judged() -> None:
    found = verdict("peak_memory_mb", timed(SLOWER, CONTENDED), timed(SAME))
    assert (found.verdict, found.contended) == ("REGRESSION", None)


@pytest.mark.parametrize("state", [UNKNOWN, None], ids=["unknown", "of an older version"])
def test_unknown_contention_is_judged(state: PointContention | None) -> None:
    assert verdict("seconds", timed(SLOWER, state), timed(SAME, state)).verdict == "REGRESSION"


def test_comparison_of_unknown_contention_says_why() -> None:
    candidate, reference = study_result(timed(SLOWER, UNKNOWN)), study_result(timed(SAME))
    gates = GatesConfig(metrics=["seconds", "peak_memory_mb"])
    found = compare(candidate, reference, gates, name="main").record.warnings
    assert found == ["judged though contention is unknown in the candidate: window shorter than 1 s"]
    assert not compare(candidate, reference, gates, name="main", paired=True).record.warnings


def test_reasons_of_unknown_contention_are_summarised_without_their_values() -> None:
    short = [assess_contention(QUIET, [], seconds) for seconds in (0.1, 0.2)]
    cycles = [golden().model_copy(update={"contention": contention}) for contention in short]
    found = summarise_contention(cycles)
    assert found is not None
    assert (found.reasons, found.unknown_reasons) == ([], ["window shorter than 1 s"])


@pytest.mark.parametrize(
    ("values", "word"), [(SLOWER, "REGRESSION"), (SAME, "SAME"), ([0.5, 1.0, 2.0], "INCONCLUSIVE")]
)
def test_interleaved_runs_are_judged_despite_contention(values: list[float], word: str) -> None:
    candidate, reference = timed(values, CONTENDED), timed(SAME, CONTENDED)
    found = compare(
        study_result(candidate), study_result(reference), GatesConfig(metrics=["seconds"]), name="x", paired=True
    )
    (judged,) = found.verdicts
    assert judged.verdict == word
    both = f"in the candidate, cycle 2 contended: {WHY}; in the reference, cycle 2 contended: {WHY}"
    assert verdict_line(judged).endswith(both)
    assert found.record.warnings == [f"judged though contended, since both sides were interleaved: {both}"]


@pytest.mark.parametrize(("limit", "word"), [(3.0, "WITHIN"), (0.5, "BEYOND")])
def test_budget_verdict_reports_contention(limit: float, word: str) -> None:
    budget = Budget(id="b", metric="seconds", point="", maximum=limit, minimum=None, line=1)
    found = judge_budget(budget, timed(SAME, CONTENDED), file=None)
    assert found.verdict == word
    assert verdict_line(found).endswith(f"; cycle 2 contended: {WHY}")
    assert judge_budget(budget, timed(SAME), file=None).contended is None


def test_llem_compare_of_a_contended_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, one in (("a", timed(SAME)), ("b", timed(SLOWER, CONTENDED))):
        (tmp_path / f"{name}.json").write_text(study_result(one).model_dump_json())
    arguments = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--metric", "seconds"]
    assert main([*arguments, "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert found["verdict"] == "INCONCLUSIVE"
    assert main(arguments) == 0
    assert WHY in " ".join(capsys.readouterr().out.split())


# ---- saving a baseline ----


def result(*points: PointResult, **fields: Any) -> StudyResult:
    return study_result(*points, **fields)


FEW_TICKS = point({"n": 1}, energy_j=[1.0, 1.1, 1.2], testbed={**H100, "energy_ticks": 5.0})
REPLAYED = ManifestEntry(
    experiment_id="n=1-cycle=1",
    config_hash="0" * 16,
    config_summary="n=1",
    cycle=1,
    status="completed",
    replayed_from="study_2026-01-01",
)


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (result(point({"n": 1}, seconds=SAME, contention=CONTENDED)), f"contended: n=1: {WHY}"),
        (result(timed(SAME), experiments=[REPLAYED]), "replayed from study_2026-01-01: n=1-cycle=1"),
        (result(FEW_TICKS), "energy_j of n=1 is invalid: a window holds 5 ticks"),
    ],
    ids=["contended", "replayed", "invalid"],
)
def test_contended_result_is_not_saved(tmp_path: Path, unfit: StudyResult, reason: str) -> None:
    with pytest.raises(BaselineError) as caught:
        save(unfit, "main", tmp_path)
    assert str(caught.value).startswith(reason)
    assert not (tmp_path / ".llem").exists()
    save(unfit, "main", tmp_path, force=True)
    assert load("main", tmp_path, "made-up").points[0].contention == unfit.points[0].contention


def test_llem_save_of_a_contended_run(study: Study, pytester: pytest.Pytester) -> None:
    script = {"n=1-cycle=1": [BAD, BAD]}
    refused = study.run(script, "--llem-save", "main")
    assert refused.ret == 1
    refused.stdout.fnmatch_lines(
        [
            "results: *",  # the only reason of the exit status is near it
            "noop: --llem-save: contended: n=1: others: 50 % (--llem-save-force saves it despite this)",
            "*3 passed*",
        ]
    )
    assert study.run(script, "--llem-save", "main", "--llem-save-force").ret == 0
    assert load("main", pytester.path / ".llem/baselines").points[0].contention is not None
    assert study.run(script, "--llem-save-force").ret == pytest.ExitCode.USAGE_ERROR


# ---- the plan and tables ----


@pytest.mark.parametrize(("load_average", "cpus", "warned"), [(7.33, 2, True), (0.2, 2, False), (7.33, 64, False)])
def test_the_plan_warns_of_a_load_above_the_machines_cpus(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    monkeypatch: pytest.MonkeyPatch,
    load_average: float,
    cpus: int,
    warned: bool,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load_average, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    write_study()
    found = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json")
    line = (
        "load 7.33 on 2 CPUs in the last minute: other programs may slow down what is measured; stop them and wait"
    )
    assert json.loads((pytester.path / "plan.json").read_text())["host_load_warning"] == (line if warned else None)
    assert (f"llem: warning: {line}" in found.outlines) == warned


def test_tables_show_which_cycles_were_contended() -> None:
    states = PointContention(contended=[2], unknown=[3], reasons=[WHY])
    whole = study_result(
        point({"n": 1}, seconds=SAME, contention=states), point({"n": 2}, seconds=SAME, config_hash="1")
    )

    def cells(table: Any, name: str) -> list[Any]:
        return [row[table.columns.index(name)] for row in table.rows]

    assert cells(point_table(whole), "contended_cycles") == [1, None]
    assert cells(experiment_table(whole), "contention") == ["uncontended", BAD, "unknown", None, None, None]


def golden() -> ExperimentResult:
    """Return a result of a version without contention."""
    return ExperimentResult.model_validate_json(min(GOLDEN.glob("*.json")).read_text())


def test_results_of_older_schemas_have_no_contention() -> None:
    assert golden().contention is None
    assert (
        PointResult.model_validate(
            {"id": "", "axes": {}, "config": {}, "config_hash": "", "metrics": {}}
        ).contention
        is None
    )


def test_page_shows_how_often_devices_were_contended() -> None:
    seen = Provenance()
    for state, others in (("contended", 0.5), ("uncontended", 0.0)):
        contention = Contention.model_validate({"state": state, "others_cpu_share": others})
        seen.add(golden().model_copy(update={"contention": contention}))
    rows = dict(seen.rows())
    assert rows["Contention by other processes"] == "contended in 1, uncontended in 1"
    assert rows["Share of the CPUs used by other processes"] == "0 to 0.500"
