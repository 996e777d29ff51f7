"""Idle power without a context is measured once; later cycles reuse idle power with a loaded model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.energy import rapl
from pytest_llem.execution.idle_power import keep_idle_power, known_idle_power, no_context_fields
from pytest_llem.machine.idle_power_no_context import SECONDS, measure_without_context, no_context_meter
from pytest_llem.study.config import ExperimentConfig
from tests.conftest import Results, WriteStudy
from tests.support import nvml
from tests.support.marks import slow
from tests.support.narrow import not_none
from tests.support.nvml import Script
from tests.support.powercap import Powercap, add
from tests.support.processes import wait_until

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@pytest.fixture(autouse=True)
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Powercap:
    """Replace the machine's powercap folder by an empty one."""
    folder = Powercap(tmp_path / "powercap")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(folder.root))
    return folder


# ---- selection of the meter ----


@pytest.mark.parametrize(
    ("backend", "gpus", "name"),
    [("auto", [A], "nvml"), ("auto", [], "rapl"), ("rapl", [A], "rapl"), ("nvml", [], "nvml")],
)
def test_meter_is_that_of_the_experiment(backend: str, gpus: list[Any], name: str) -> None:
    assert no_context_meter(
        ExperimentConfig.model_validate({"model": "m", "energy": {"backend": backend}}), gpus
    ) == (
        name,
        None,
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"baseline": {"enabled": False}}, "switched off by baseline.enabled"),
        ({"energy": {"backend": None}}, "switched off by energy.backend"),
        ({"energy": {"backend": "estimate"}}, "meter 'estimate' is used only in experiments"),
    ],
)
def test_reason_for_no_meter_is_kept(changes: dict[str, Any], reason: str) -> None:
    config = ExperimentConfig(model="m", **changes)
    assert no_context_meter(config, [A]) == (None, reason)
    assert no_context_fields(SharedState(), config, [A]) == {"no_context_reason": reason}


# ---- one measurement ----


MakeSleep = Callable[[Callable[[], object]], Callable[[float], None]]


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> MakeSleep:
    """Return a replacement of sleeping, which advances only the meter's clock and calls a function."""

    def make(meanwhile: Callable[[], object]) -> Callable[[float], None]:
        now = [100.0]
        monkeypatch.setattr(rapl, "time", SimpleNamespace(monotonic=lambda: now[0]))

        def sleep(seconds: float) -> None:
            now[0] += seconds
            meanwhile()

        return sleep

    return make


def test_packages_and_memory_are_measured_for_five_seconds(powercap: Powercap, sleep: MakeSleep) -> None:
    package, dram = powercap.zone("intel-rapl:0", "package-0"), powercap.zone("intel-rapl:0:0", "dram")
    log = []

    def meanwhile() -> None:
        log.append("asleep")
        add(package, 60.0)
        add(dram, 7.5)

    found = measure_without_context("rapl", [], on_idle=lambda: log.append("on_idle"), sleep=sleep(meanwhile))
    assert SECONDS == 5
    assert log == ["on_idle", "asleep"]
    assert found["idle_power_no_context_w"] == {"package-0": pytest.approx(12.0), "dram-0": pytest.approx(1.5)}
    assert found["no_context_method"] == "measured"
    assert found["no_context_source"] == "rapl_package+rapl_dram"
    assert found["no_context_reason"] is None


def test_failing_counter_is_left_out_with_its_reason(powercap: Powercap, sleep: MakeSleep) -> None:
    package, dram = powercap.zone("intel-rapl:0", "package-0"), powercap.zone("intel-rapl:0:0", "dram")

    def lose_dram() -> None:
        add(package, 60.0)
        dram.unlink()

    found = measure_without_context("rapl", [], sleep=sleep(lose_dram))
    assert found["idle_power_no_context_w"] == {"package-0": pytest.approx(12.0)}
    assert found["no_context_reason"].startswith("dram-0: ")
    package_1 = powercap.zone("intel-rapl:1", "package-1")
    dram.write_text("7")

    def lose_all() -> None:
        for counter in (package, package_1, dram):
            counter.unlink()

    found = measure_without_context("rapl", [], sleep=sleep(lose_all))
    assert (found["idle_power_no_context_w"], found["no_context_method"]) == (None, None)
    assert "package-1: " in found["no_context_reason"]


@pytest.mark.parametrize("name", ["rapl", "nvml"])
def test_without_a_meter_there_is_no_wait(name: str) -> None:
    def sleep(seconds: float) -> None:
        pytest.fail("it waits")

    found = measure_without_context(name, [], sleep=sleep)
    assert found.get("idle_power_no_context_w") is None
    assert found["no_context_reason"].startswith(f"{name}: ")


# ---- reuse in later cycles ----


def _result(**idle_power: Any) -> dict[str, Any]:
    return {"idle_power": {"idle_power_w": 40.0, "age_seconds": 0.0, **idle_power}}


def test_idle_power_is_known_to_cycles_of_its_point_only(tmp_path: Path) -> None:
    shared_state = SharedState()
    assert known_idle_power(shared_state, "abc", None) is None
    keep_idle_power(shared_state, "abc", None, _result())
    assert (known_idle_power(shared_state, "abc", None) or {})["idle_power_w"] == 40.0
    assert known_idle_power(shared_state, "abd", None) is None, "another point"
    assert known_idle_power(shared_state, "abc", tmp_path / "python") is None, "another interpreter"


@pytest.mark.parametrize("idle_power", [{"idle_power_w": None}, {"age_seconds": 12.0}, {"age_seconds": None}])
def test_only_measured_idle_power_is_kept(idle_power: dict[str, Any]) -> None:
    shared_state = SharedState()
    keep_idle_power(shared_state, "abc", None, _result(**idle_power))
    keep_idle_power(shared_state, "abc", None, {"idle_power": None})
    assert known_idle_power(shared_state, "abc", None) is None


def test_newest_measured_idle_power_counts() -> None:
    shared_state = SharedState()
    for watts in (40.0, 45.0):  # the second was measured because the first was not reusable
        keep_idle_power(shared_state, "abc", None, _result(idle_power_w=watts))
    assert (known_idle_power(shared_state, "abc", None) or {})["idle_power_w"] == 45.0


# ---- whole runs ----


@pytest.fixture
def gpus(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_build: None) -> Script:
    """Give new processes two scripted GPUs, and a torch that looks like a CUDA build."""
    gpus = [nvml.ScriptedGpu(uuid, [(0.0, watts)], {"tick_ms": 20}) for uuid, watts in ((A, 70.0), (B, 95.0))]
    return nvml.install(monkeypatch, nvml_library, nvml.Script(tmp_path / "script", gpus))


STUDY = {"energy": {"backend": "auto"}, "sweep": {"n": [1, 2]}, "baseline": {"duration_seconds": 5}}
NO_GAPS = {"n_cycles": 1, "experiment_gap_seconds": 0}


def _shorter(seconds: float) -> str:
    return f"""
        import sys
        import pytest_llem.machine.idle_power_no_context as bare

        bare.SECONDS = {seconds}

        def pytest_unconfigure():
            assert not {{"torch", "transformers"}} & set(sys.modules)
    """


def _reads(script: Script) -> int:
    """Return how often the GPUs' counters were read."""
    return sum(call.function == COUNTER for call in script.calls()) if script._trace.exists() else 0


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_each_gpu_is_measured_once_before_the_first_experiment(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    gpus: Script,
    workers: tuple[str, ...],
) -> None:
    write_study(**STUDY, execution=NO_GAPS)
    pytester.makeconftest(_shorter(0.5))
    pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=2)
    found = [not_none(one.idle_power) for one in results.experiments()]
    assert len(found) == 2
    watts = found[0].idle_power_no_context_w
    assert watts is not None
    assert watts == pytest.approx({A: 70.0, B: 95.0}, rel=0.02)
    assert all(one.idle_power_no_context_w == watts for one in found), "the very same figures"
    assert {(one.no_context_method, one.no_context_source) for one in found} == {("measured", "nvml_total_energy")}
    ages = sorted(one.no_context_age_seconds or 0.0 for one in found)
    assert 0 < ages[0] < ages[1]
    assert gpus.users() == 0
    assert len({call.pid for call in gpus.calls() if call.function == COUNTER}) == 1
    assert found[0].idle_power_w is None, "the engine runs on no GPU"


@pytest.mark.slow
def test_idle_machine_is_not_measured_where_nothing_needs_it(
    pytester: pytest.Pytester, write_study: WriteStudy, gpus: Script
) -> None:
    """A measurement would take an hour."""
    study = {**STUDY, "sweep": {"n": [1]}, "execution": NO_GAPS}
    write_study("off.yaml", **{**study, "name": "off", "baseline": {"enabled": False}})
    write_study("no_energy.yaml", **{**study, "name": "no_energy", "energy": {"backend": None}})
    write_study("skipped.yaml", **{**study, "name": "skipped", "skip": [{"where": {"n": 1}}]})
    pytester.makeconftest(_shorter(3600))
    run = pytester.runpytest_subprocess("off.yaml", "no_energy.yaml", "skipped.yaml", "-p", "llem", timeout=120)
    run.assert_outcomes(passed=2, skipped=1)
    write_study(**study)
    assert pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--collect-only", timeout=120).ret == 0
    assert _reads(gpus) == 0


@pytest.mark.slow
def test_resume_does_not_measure_the_idle_machine_again(
    pytester: pytest.Pytester, write_study: WriteStudy, gpus: Script
) -> None:
    write_study(**{**STUDY, "sweep": {"n": [1]}}, execution=NO_GAPS)
    pytester.makeconftest(_shorter(0.1))
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    before = _reads(gpus)
    assert before
    pytester.makeconftest(_shorter(3600))
    again = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-resume", timeout=120)
    again.assert_outcomes(passed=1)
    assert _reads(gpus) == before


@pytest.mark.slow
def test_ctrl_c_ends_the_measurement(
    pytester: pytest.Pytester, write_study: WriteStudy, gpus: Script, results: Results
) -> None:
    write_study(**{**STUDY, "sweep": {"n": [1]}}, execution=NO_GAPS)
    pytester.makeconftest(_shorter(3600))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as run:
        wait_until(lambda: _reads(gpus))
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == pytest.ExitCode.INTERRUPTED
    assert gpus.users() == 0
    assert set(results.statuses().values()) == {"pending"}
