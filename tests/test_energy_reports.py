"""Silent errors that users of other energy meters have reported."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator, ExperimentResult
from pytest_llem.energy import metering
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.metering import EnergyMeter, EnergyReading
from pytest_llem.energy.protocol import DeviceReading
from pytest_llem.energy.rapl import RaplMeter
from pytest_llem.execution.energy_budget import EnergyBudget
from pytest_llem.gates.regression import compare
from pytest_llem.hardware.gpus import Gpu, VisibleGpus
from pytest_llem.measurement import orchestrator
from pytest_llem.measurement.contention import with_prefill
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.reporting.html.formatting import details
from pytest_llem.results import facts
from pytest_llem.results.contention import Contention
from pytest_llem.results.cycles import summarise
from pytest_llem.results.experiment import IdlePowerRecord
from pytest_llem.results.findings import Findings
from pytest_llem.study.gates import GatesConfig
from tests.conftest import NOOP_STUDY, RunPytest, WriteStudy
from tests.support import nvml
from tests.support.marks import slow
from tests.support.nvml import Script
from tests.support.powercap import Powercap
from tests.support.study_results import H100, point, study_result
from tests.support.warned import texts

FIELDS = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
GOLDEN = Path(__file__).parent / "golden" / "1.0" / "experiments"
STEADY = [1.000, 1.001, 0.999, 1.0005, 0.9995]


# ---- a counter that jumps (Kepler 1344: 9 kW from two 35 W computers; CodeCarbon 309) ----


@pytest.mark.parametrize(("before", "after"), [(0, 150_000_000_000), (150_000_000_000, 0)])
def test_rapl_counter_that_jumps_gives_no_energy(tmp_path: Path, before: int, after: int) -> None:
    """150 kJ in no time, or 112 kJ if the counter has overflowed."""
    counter = Powercap(tmp_path / "powercap").zone("intel-rapl:0", "package-0", before)
    meter = RaplMeter(tmp_path / "powercap")
    meter.open([])
    meter.begin()
    counter.write_text(str(after))
    (device,) = meter.end().devices
    meter.close()
    assert device.energy_j is None
    assert f"a value was wrong (it went from {before} to {after} µJ in 0.0 s)" in str(device.reason)


# ---- emissions of other electricity (CodeCarbon 388: "unfair comparison due to different country") ----


EMISSIONS: dict[str, Any] = {
    "sweep": {"precision": ["bf16"]},
    "execution": {"n_cycles": 2},
    "noop": {"seconds": 0.02},
    "energy": {"backend": "estimate", "allow_estimated": True},
}


def test_emissions_of_other_carbon_intensity_are_not_compared(
    write_study: WriteStudy, pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    write_study(**EMISSIONS, gates={"metrics": ["gco2e_g"]})
    pytester.makeini("[pytest]\nllem_carbon_intensity = 400\n")
    run_pytest("--llem-save", "main").assert_outcomes(passed=2)
    pytester.makeini("[pytest]\nllem_carbon_intensity = 40\n")
    run = run_pytest("--llem-baseline", "main")
    run.assert_outcomes(passed=2, failed=1)
    run.stdout.fnmatch_lines(
        [
            "*cannot be judged: cannot be compared: carbon intensity and PUE: "
            "40 gCO2e/kWh, PUE 1 in the candidate, 400 gCO2e/kWh, PUE 1 in the reference*"
        ]
    )


def test_mean_of_two_carbon_intensities_is_not_judged(
    write_study: WriteStudy, pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    write_study(**EMISSIONS, budgets={"gco2e_g": 1e6})
    pytester.makeini("[pytest]\nllem_carbon_intensity = 400\n")
    run_pytest("-k", "cycle=1").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nllem_carbon_intensity = 40\n")
    run = run_pytest("--llem-resume")
    run.assert_outcomes(passed=2, failed=1)
    run.stdout.fnmatch_lines(
        [
            "  resume: 1 from * UTC), gco2e_g with 400 gCO2e/kWh, PUE 1",
            "*cannot be judged: its cycles differ in carbon intensity or PUE: 400 gCO2e/kWh, PUE 1; 40 g*",
        ]
    )


# ---- other programs while prefill or idle power is measured ----


def _measure(**changes: Any) -> ExperimentResult:
    return ExperimentOrchestrator(ExperimentConfig.model_validate({**FIELDS, **changes})).run().result


def test_contended_prefill_window_is_contended(monkeypatch: pytest.MonkeyPatch, noop_engine: None) -> None:
    busy = Contention(state="contended", reasons=["other processes used the CPUs: 40 % of 2 CPUs"])
    windows = iter([Contention(state="uncontended", cpus=2), busy])
    monkeypatch.setattr(WindowObservers, "contention", lambda *_: next(windows))
    result = _measure(measurement={"min_window_seconds": 0, "prefill_split": True})
    assert result.contention is not None
    assert (result.contention.state, result.contention.cpus) == ("contended", 2)
    text = "other processes used the CPUs in the prefill window"
    assert result.contention.reasons == [f"{text}: 40 % of 2 CPUs"]
    assert f"contended: {text}" in texts(result.warnings)


@pytest.mark.parametrize(
    ("window", "prefill", "state", "reasons"),
    [
        ("uncontended", "uncontended", "uncontended", []),
        ("contended", "unknown", "contended", ["a: w"]),
        ("contended", "contended", "contended", ["a: w", "a in the prefill window: p"]),
        ("uncontended", "unknown", "unknown", ["a in the prefill window: p"]),
        ("unknown", "contended", "contended", ["a in the prefill window: p"]),
    ],
)
def test_contention_of_two_windows_is_the_worse(
    window: Any, prefill: Any, state: str, reasons: Sequence[str]
) -> None:
    first = Contention(state=window, reasons=[] if window == "uncontended" else ["a: w"])
    second = Contention(state=prefill, reasons=[] if prefill == "uncontended" else ["a: p"])
    found = with_prefill(first, second)
    assert (found.state, found.reasons) == (state, reasons)


@pytest.mark.parametrize(("after_w", "warned"), [(70.0, True), (190.0, True), (160.0, False)])
def test_idle_power_that_changes_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, noop_engine: None, after_w: float, warned: bool
) -> None:
    """Kepler 1811: another program runs while idle power is measured, and its power is subtracted."""
    known = IdlePowerRecord(idle_power_w=170.0, after_w=after_w, method="measured", boundary="cpu_package")
    monkeypatch.setattr(orchestrator, "measure_idle_power", lambda *_, **__: known)
    monkeypatch.setattr(orchestrator, "measure_idle_power_after", lambda baseline, *_, **__: baseline)
    text = f"idle power changed from 170 W to {after_w:g} W: active_energy_j may be off by the difference"
    assert any(one.startswith(text) for one in texts(_measure().warnings)) is warned


# ---- settings of GPUs (Zeus leaves clocks and power limits behind) ----


@pytest.mark.parametrize(
    ("setting", "value", "difference"),
    [
        (
            "application_sm_clock_mhz",
            1410,
            "application clocks: 1980 and 2619 MHz in the candidate, 1410 and 2619 MHz in the",
        ),
        ("ecc_mode", False, "ECC: on in the candidate, off in the"),
    ],
)
def test_gpus_that_are_set_differently_are_not_compared(setting: str, value: Any, difference: str) -> None:
    data = json.loads(min(GOLDEN.glob("*.json")).read_text())
    gpu = {
        "uuid": "GPU-1",
        "ecc_mode": True,
        "application_sm_clock_mhz": 1980,
        "application_memory_clock_mhz": 2619,
    }

    def of_gpu(gpu: Any) -> Any:
        data["environment"]["gpus"], data["engine"]["device"] = [gpu], "cuda"
        found = facts.testbed_facts([ExperimentResult.model_validate(data)])
        return {**H100, "application_clocks": found["application_clocks"], "ecc": found["ecc"]}

    metric = {"seconds": STEADY}
    here = study_result(point({"batch": 1}, testbed=of_gpu(gpu), **metric))
    there = study_result(point({"batch": 1}, testbed=of_gpu({**gpu, setting: value}), **metric))
    (verdict,) = compare(here, there, GatesConfig(metrics=["seconds"]), name="main").verdicts
    assert verdict.verdict == "NOT JUDGED"
    assert difference in str(verdict.reason)


def test_cycles_under_different_power_limits_are_a_warning() -> None:
    """The power limit was changed between cycles: the mean describes neither limit."""
    found = Findings()
    limits = {**H100, "power_limit": ["700 W", "500 W"], "driver": ["580.1", "580.2"]}
    found.warn_of_differing([_result(), _result()], point({"batch": 1}, seconds=STEADY, testbed=limits))
    found.count = 2
    assert texts(found.study_warnings()) == ["cycles of a point differ in power limit"]


def test_energies_from_different_sources_are_not_compared() -> None:
    """Estimates by two models are not comparable."""
    here, there = (
        study_result(point({"batch": 1}, energy_j=STEADY, testbed={**H100, "energy_source": source}))
        for source in ("cpu_time_model", "tdp_model")
    )
    (verdict,) = compare(here, there, GatesConfig(metrics=["energy_j"]), name="main").verdicts
    assert verdict.verdict == "NOT JUDGED"
    assert "energy source: cpu_time_model in the candidate, tdp_model in the reference" in str(verdict.reason)


# ---- energy of other devices than the test's (CodeCarbon 567), and of other tests (CodeCarbon 681) ----


@pytest.mark.parametrize(
    ("properties", "metered"),
    [
        (
            {"uuid": "used"},
            "GPU-used",
        ),  # also if CUDA_VISIBLE_DEVICES has changed since
        ({}, "GPU-visible"),  # an older PyTorch does not have the UUID
    ],
)
def test_meter_reads_the_gpus_that_pytorch_was_initialised_with(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, str], metered: str
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda _: None,
        get_device_properties=lambda _: SimpleNamespace(**properties),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(metering, "visible_gpus", lambda: VisibleGpus((Gpu("GPU-visible"),)))
    asked: list[Sequence[str]] = []

    def opened(_: Any, gpus: Sequence[str]) -> Meters:
        asked.append(gpus)
        return Meters()

    monkeypatch.setattr(Meters, "open", opened)
    with EnergyMeter()():
        time.sleep(0)
    assert asked == [[metered]]


def test_estimate_by_name_ignores_gpus_that_are_only_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "visible_gpus", lambda: VisibleGpus((Gpu("GPU-unused"),)))
    monkeypatch.setattr(metering, "_own_gpus", lambda: None)
    with EnergyMeter()("estimate") as reading:
        sum(range(100_000))
    assert (reading.method, reading.reason) == ("estimated", None)


def test_energy_budget_of_short_test_names_the_time_of_enough_ticks() -> None:
    reading = EnergyReading()
    reading._complete(Account((), Total(20.0, "measured", "nvml_total_energy", "gpu_board"), 0.1, 0.1))
    reading._ended = reading._began + 0.01  # the meter waited for a tick at both ends
    [found] = EnergyBudget(joules=50).problems(reading)
    assert found.endswith("1 ticks of the energy counter, fewer than 20: have the test work for 2.00 s or more")


@pytest.mark.parametrize(
    ("workers", "method", "more"),
    [
        (2, "measured", ", with what 2 workers of -n used at the time"),
        (1, "measured", ""),
        (2, "estimated", ""),
    ],
)
def test_energy_budget_warns_of_other_workers(workers: int, method: Any, more: str) -> None:
    reading = EnergyReading()
    reading._complete(Account((), Total(31.2, method, "rapl_package", "cpu_package"), 1.0))
    assert list(EnergyBudget(joules=20, allow_estimated=True).problems(reading, workers)) == [
        f"used 31.2 J ({method}, rapl_package{more}), more than its budget of 20 J"
    ]


# ---- means of unlike things (CodeCarbon 533: in a container energy is estimated, outside of it measured) ----


def _result(**energy: Any) -> ExperimentResult:
    data = json.loads(min(GOLDEN.glob("*.json")).read_text())
    data["metrics"]["energy_j"] |= {"boundary": "cpu_package", "method": "measured", **energy}
    return ExperimentResult.model_validate(data)


def test_mean_of_measured_and_estimated_energy_is_not_judged() -> None:
    alike = summarise([_result(), _result(method="sampled")])["energy_j"]
    assert (alike.method, alike.not_judged) == ("sampled", None)
    unlike = summarise([_result(), _result(method="estimated")])["energy_j"]
    assert unlike.not_judged == "energy was estimated in some of its cycles and not in others"


def test_mean_over_two_boundaries_is_labelled_wherever_shown() -> None:
    mixed = summarise([_result(), _result(boundary="gpu_board", covers_engine=False)])["energy_j"]
    assert mixed.label == "measured, mixed"
    assert "measured, boundary differs between cycles" in details(mixed, "J")


# ---- time below 0 (optimum-benchmark 128: -744 tokens/s) ----


def test_decode_time_below_zero_is_not_judged(noop_engine: None) -> None:
    result = _measure(
        measurement={"min_window_seconds": 0, "prefill_split": True}, noop={"seconds": 0.0, "first_seconds": 0.05}
    )
    decode = result.metrics["decode_seconds"]
    assert decode.value is not None
    assert decode.value < 0
    assert re.fullmatch(r"prefill alone took \S+ s, but a whole pass took \S+ s", str(decode.not_judged))


# ---- power that is an average over a second (Zeus 45, kernel_tuner 247) ----


def _step(script: Script) -> tuple[DeviceReading, str | None]:
    """Measure 2.5 s in which the GPU draws more than before."""
    meters = Meters.open("nvml", [gpu.uuid for gpu in script.gpus])
    script.gpus[0].power.append((script.now() + 0.05, 500.0))
    script.write()
    meters.begin()
    time.sleep(2.5)
    account = meters.end()
    meters.close()
    return account.devices[0], account.total.invalid


@pytest.mark.parametrize(("capability", "averages"), [slow(8.6, 1), (8.0, 0)])
def test_counter_is_not_checked_against_averaged_power(
    nvml_library: Path, tmp_path: Path, capability: float, averages: int
) -> None:
    """The driver has only ``nvmlDeviceGetPowerUsage``, an average since Ampere except on GA100."""
    known: dict[str, str | float] = {"tick_ms": 20, "capability": capability, "averages": averages}
    gpu = nvml.ScriptedGpu("GPU-1", [(0, 100.0)], known, rules=["fail 186 3", "fail 185 3"])
    script = Script(tmp_path / "nvml.script", [gpu])
    script.write()
    device, invalid = nvml.run(nvml.environment(nvml_library, script), _step, script)
    assert device.method == "measured"
    assert invalid is None
    checked = device.integral_j is not None
    assert checked is not bool(averages)
    assert (device.integral_reason == "power is only reported as an average over a second") is bool(averages)
