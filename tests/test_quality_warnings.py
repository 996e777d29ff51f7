"""The quality warnings of a result, and their order."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.protocol import Conditions, DeviceReading
from pytest_llem.measurement import accounting, records
from pytest_llem.measurement.pass_window import measure
from pytest_llem.measurement.quality_warnings import pass_warnings
from pytest_llem.results.document import upgrade
from pytest_llem.results.experiment import EngineRecord, WarmupRecord
from pytest_llem.results.metrics import metric
from pytest_llem.results.quality_warnings import WARNINGS, QualityWarning, StudyWarning, worst
from tests.support.clock import clock
from tests.support.measured import pass_window, window_warnings
from tests.support.warned import texts

CPU = EngineRecord(name="e", device="cpu")
GPU = EngineRecord(name="e", device="cuda", device_names=["A GPU"])


def device(energy_j: float | None = 100.0, integral_j: Any = None, name: str = "GPU-1", **conditions: Any) -> Any:
    known = Conditions(**conditions) if conditions else None
    return DeviceReading(
        name, "gpu_board", energy_j, "measured", "nvml_total_energy", integral_j=integral_j, conditions=known
    )


def window(
    *devices: Any, seconds: float = 10.0, tick: float = 0.1, pass_seconds: Any = (), total: Any = None
) -> Any:
    total = total or Total(100.0, "measured", "nvml_total_energy", "gpu_board")
    return pass_window([[]], seconds, Account(devices, total, seconds, tick), pass_seconds)


def warnings(
    *devices: Any,
    refusals: Any = None,
    warmup: Any = None,
    engine: Any = GPU,
    total: Any = None,
    pass_seconds: Any = (),
    tick: float = 0.1,
    cut: tuple[int, int] = (0, 0),
    **given: Any,
) -> Any:
    one = window(*devices, total=total, pass_seconds=pass_seconds, tick=tick)
    others = pass_warnings(one, cut)
    return texts(window_warnings(one, engine, refusals=refusals, others=others, warmup=warmup, **given))


def test_a_steady_measurement_has_no_warnings() -> None:
    fine = device(
        integral_j=102.9,
        start_temperature_c=60,
        end_temperature_c=65,
        throttled_seconds={"sw_power_cap": 0.0, "hw_slowdown": 0.0},
    )
    steady = [1.0, 1.0, 1.04, 1.04]
    assert warnings(fine, pass_seconds=steady, roofline_slowdown=metric("roofline_slowdown", 1.0)) == []


# ---- single warnings ----


def test_counter_and_integral_that_disagree() -> None:
    (one,) = warnings(device(integral_j=103.1), device(200.0, 200.0, name="GPU-2"))
    assert one == "energy counter and sampled power disagree on GPU-1: 100 J and 103.1 J (+3.1%)"
    (one,) = warnings(device(integral_j=96.0))
    assert one.endswith("100 J and 96 J (-4.0%)")
    assert warnings(device(None, 96.0)) == warnings(device(96.0, None)) == []


def test_window_of_few_ticks_is_not_compared_with_its_integral() -> None:
    (one,) = warnings(device(integral_j=150.0), tick=0.51)
    assert one.startswith("the window holds 19 ticks of the energy counter, fewer than 20")
    (one,) = warnings(device(integral_j=150.0), tick=0.5)
    assert one.startswith("energy counter and sampled power disagree")


def test_throttling_is_reported_with_its_time_and_reason() -> None:
    throttled = {"sw_power_cap": 2.345, "hw_slowdown": 0.0, "sw_thermal": 0.5}
    assert warnings(device(throttled_seconds=throttled)) == [
        "throttled: GPU-1 for 2.3 s of the window by sw_power_cap",
        "throttled: GPU-1 for 0.5 s of the window by sw_thermal",
    ]


@pytest.mark.parametrize("end", [54.9, 65.1])
def test_a_temperature_that_drifts(end: float) -> None:
    (one,) = warnings(device(start_temperature_c=60.0, end_temperature_c=end))
    assert one == f"temperature of GPU-1 went from 60 to {end:.0f} °C within the window"
    assert warnings(device(start_temperature_c=60.0)) == warnings(device(end_temperature_c=60.0)) == []


def test_long_times_have_no_exponent() -> None:
    [found] = warnings(device(throttled_seconds={"power": 1234.5}))
    assert found == "throttled: GPU-1 for 1,234 s of the window by power"


def test_almost_enough_ticks_are_rounded_down() -> None:
    [found] = warnings(device(), tick=10 / 19.6)
    assert found.startswith("the window holds 19 ticks of the energy counter, fewer than 20: ")


def test_passes_that_drift_are_a_warning() -> None:
    (one,) = warnings(pass_seconds=[1.0, 1.0, 1.1, 1.1])
    assert one == "drift: passes took 10% longer in the second half of the window"
    (one,) = warnings(pass_seconds=[1.0, 1.0, 0.9, 0.9])
    assert one == "drift: passes took 10% less in the second half of the window"
    assert warnings(pass_seconds=[1.0, 2.0, 3.0]) == []


def test_pass_faster_than_the_roofline_is_a_warning() -> None:
    (one,) = warnings(roofline_slowdown=metric("roofline_slowdown", 0.97))
    assert one.startswith("roofline_slowdown is 0.97, and less than 1 is impossible: a bug of pytest-llem")
    assert warnings(roofline_slowdown=metric("roofline_slowdown", None, reason="no peak is known")) == []


LOST = Total(None, "unavailable", "nvml_total_energy", "gpu_board", "GPU-1: GPU is lost")


def test_a_missing_energy_is_a_warning_whatever_else_was_refused() -> None:
    """On most machines with a GPU, users cannot read RAPL."""
    assert warnings(refusals={"rapl": "permission denied"}, total=LOST) == [
        "no energy: GPU-1: GPU is lost",
        "meter rapl: permission denied",
    ]
    assert warnings(total=LOST) == ["no energy: GPU-1: GPU is lost"]


def test_reason_for_no_meter_is_reported_once() -> None:
    refusals = {"nvml": "Driver Not Loaded", "rapl": "permission denied"}
    with_none = Meters(refusals=refusals).end().total
    assert warnings(refusals=refusals, total=with_none) == [
        "no energy: nvml: Driver Not Loaded; rapl: permission denied"
    ]


def test_metering_switched_off_is_not_a_warning() -> None:
    meters = Meters.open(None, [])
    assert warnings(refusals=meters.refusals, total=meters.end().total, engine=CPU) == []


# ---- order ----


def all_of_them() -> Any:
    hot = device(
        integral_j=200.0,
        start_temperature_c=40,
        end_temperature_c=60,
        throttled_seconds={"hw_slowdown": 1.0},
    )
    return warnings(
        hot,
        warmup=WarmupRecord(runs=20, seconds=1.0, converged=False),
        engine=GPU.model_copy(update={"random_weights": True}),
        refusals={"rapl": "no package counter"},
        total=Total(1.0, "estimated", "cpu_time_model", "cpu_package"),
        pass_seconds=[1.0, 1.0, 2.0, 2.0],
        prefill=window(seconds=1.0),
        covers_engine=False,
        roofline_slowdown=metric("roofline_slowdown", 0.5),
        cut=(1, 2),
    )


BEGINNINGS = [
    "energy counter and sampled power disagree",
    "the engine ran on cuda, and the energy covers cpu_package only",
    "throttled",
    "the prefill window holds 10 ticks",
    "roofline_slowdown is 0.50",
    "warm-up stopped after 20 runs",
    "drift: passes took 100% longer",
    "temperature of GPU-1 went from 40 to 60",
    "meter rapl: no package counter",
    "energy is estimated from CPU time",
    "1 of 2 prompts were cut",
    "random weights",
]


def test_the_worst_warnings_come_first() -> None:
    found = all_of_them()
    assert len(found) == len(BEGINNINGS)
    assert [one.startswith(beginning) for one, beginning in zip(found, BEGINNINGS, strict=True)] == [True] * 12


def test_errors_come_before_warnings_and_those_before_notes() -> None:
    order = ["error", "warning", "note"]
    ranks = [order.index(kind.severity) for kind in WARNINGS.values()]
    assert ranks == sorted(ranks)


def test_code_of_a_newer_version_is_ranked_as_unclassified() -> None:
    newer = QualityWarning(code="unheard_of", severity="error", text="text")
    assert newer.rank == QualityWarning.of("unclassified", "text").rank


def test_sentence_of_an_older_result_is_read_as_unclassified() -> None:
    read = StudyWarning.model_validate(upgrade({"warnings": ["a sentence (n=1)"]})["warnings"][0])
    assert (read.code, str(read), read.experiments) == ("unclassified", "a sentence (n=1)", [])


def test_a_terminal_shows_one_of_each_code_first() -> None:
    """The experiments were throttled for different times."""
    throttled = [QualityWarning.of("throttled", f"GPU-1 for {number} s") for number in range(1, 41)]
    others = [QualityWarning.of("unclassified", text) for text in ("a", "b")]
    rest = [QualityWarning.of("warmup_not_converged", "w"), *others, QualityWarning.of("random_weights", "r")]
    assert worst([*throttled, *rest], 5) == [throttled[0], *rest]
    assert worst([*throttled, *rest], 6) == [*throttled[:2], *rest]
    assert worst([*throttled, *rest], 2) == [throttled[0], rest[0]], "the worst codes"
    assert worst(throttled, 5) == throttled[:5]
    assert worst(rest, 50) == rest
    assert worst(rest[:0], 5) == []


# ---- values of the window ----


class Engine:
    """An engine with a given duration of each pass."""

    def __init__(self, now: Any, durations: Any) -> None:
        self.now, self.durations = now, iter(durations)

    def seed(self, seed: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def generate(self, batch: Any) -> None:
        self.now[0] += next(self.durations)


def measured(monkeypatch: pytest.MonkeyPatch, durations: Any, min_seconds: Any) -> Any:
    now = [100.0]
    monkeypatch.setattr("pytest_llem.measurement.pass_window.time", clock(lambda: now[0]))
    engine: Any = Engine(now, durations)
    return measure(engine, ["batch"], Meters(), min_seconds=min_seconds, seed=0)


def test_the_times_of_passes_and_their_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    one = measured(monkeypatch, [1.0, 2.0, 99.0, 2.0, 4.0, 7.0], 108)
    assert one.pass_seconds == [1.0, 2.0, 99.0, 2.0, 4.0]
    assert one.seconds == 108.0
    assert one.drift == pytest.approx(3.0 / 1.5 - 1), "the pass in the middle belongs to neither half"
    record = records.window_record(measured(monkeypatch, [1.0, 1.0, 1.0, 3.0], 6))
    assert [record.drift, record.pass_seconds_cv] == pytest.approx([1.0, 1.0 / 1.5])


def test_few_passes_have_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    record = records.window_record(measured(monkeypatch, [1.0, 3.0, 5.0], 9))
    assert (record.passes, record.drift) == (3, None)
    assert record.pass_seconds_cv == pytest.approx(2 / 3)
    record = records.window_record(measured(monkeypatch, [1.0], 0))
    assert (record.drift, record.pass_seconds_cv) == (None, None)


def test_temperature_and_throttling_are_those_of_the_worst_device(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(
        (
            device(peak_temperature_c=70.0, throttled_seconds={"a": 1.0, "b": 2.0}),
            device(name="GPU-2", peak_temperature_c=81.0),
            device(name="GPU-3", throttled_seconds={"a": 1.5}),
            device(name="GPU-4", throttled_seconds={}),
            device(name="package-0"),
        ),
        Total(1.0, "measured"),
    )
    found = accounting.condition_metrics(account)
    assert found["peak_temperature_c"].value == 81.0
    assert found["throttled_seconds"].value == 2.0
    cool = accounting.condition_metrics(Account((device(throttled_seconds={"a": 0.0}),), Total(1.0, "measured")))
    assert cool["throttled_seconds"].value == 0.0
    assert (cool["peak_temperature_c"].value, cool["peak_temperature_c"].reason) == (
        None,
        "no meter reports a temperature",
    )
    nobody = accounting.condition_metrics(Account((device(throttled_seconds={}),), Total(1.0, "measured")))
    assert nobody["throttled_seconds"].value is None
    assert nobody["throttled_seconds"].reason == "no meter reports throttled time"
