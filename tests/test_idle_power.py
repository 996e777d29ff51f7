"""Idle power: when it is measured, and the active energy of a pass without it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.measurement.idle_power import idle_power_metrics, measure_idle_power, measure_idle_power_after
from pytest_llem.measurement.pass_window import measure
from pytest_llem.measurement.progress import Progress
from pytest_llem.results.experiment import ExperimentResult, IdlePowerRecord
from pytest_llem.results.metrics import Method
from pytest_llem.study.config import BaselineConfig
from tests.conftest import NOOP_STUDY
from tests.support import nvml
from tests.support.measured import pass_window
from tests.support.powercap import Powercap

#: Shorter than a study allows.
SHORT = BaselineConfig.model_construct(enabled=True, duration_seconds=0.2)
MEASURED = Total(1.0, "measured", "rapl_package", "cpu_package", devices=("package-0",))


class Engine:
    """Logs its calls, into the same list as the meter."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def generate(self, batch: Any) -> None:
        self.log.append(f"generate {batch}")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def run_once(self) -> None:
        self.generate("b")
        self.synchronize()


class Meter:
    """Reads a constant power, or a list of powers in turn, over parts of equal length."""

    def __init__(self, log: Any, watts: float = 50.0, **device: Any) -> None:
        self.log, self.watts = log, cycle(watts if isinstance(watts, list) else [watts])
        self.device = {"boundary": "cpu_package", "method": "measured", "source": "rapl_package", **device}

    def begin(self) -> None:
        self.log.append("begin")
        self.began = time.monotonic()

    def end(self) -> Any:
        self.log.append("end")
        watts = next(self.watts)
        assert time.monotonic() - self.began >= SHORT.part_seconds
        energy_j = None if watts is None else watts * 2.0
        return Reading((DeviceReading("package-0", energy_j=energy_j, **self.device),), 2.0)

    def close(self) -> None:
        pass


def baseline(
    meter: Any = None,
    loading: Total = MEASURED,
    config: BaselineConfig = SHORT,
    known: IdlePowerRecord | None = None,
    **device: Any,
) -> Any:
    engine: Any = Engine()
    meter = Meter(engine.log, **device) if meter is None else meter
    meters = Meters({"one": meter} if meter else {})
    on_idle = partial(engine.log.append, "idle")
    record = measure_idle_power(engine.run_once, meters, loading, config, known=known, on_idle=on_idle)
    return record, engine.log


def test_idle_power_is_measured_after_one_batch() -> None:
    record, log = baseline()
    assert record.idle_power_w == pytest.approx(50.0)
    assert record.seconds == 10
    assert record.devices == ["package-0"]
    assert record.age_seconds == 0
    assert (datetime.now(UTC) - datetime.fromisoformat(record.measured_at)).total_seconds() < 60
    assert (record.method, record.source, record.boundary) == ("measured", "rapl_package", "cpu_package")
    assert record.reason is None
    assert log == ["generate b", "synchronize", "idle", *["begin", "end"] * 5], "in parts, back to back"


def test_sampling_meter_measures_idle_power() -> None:
    record, _ = baseline(method="sampled", loading=Total(1.0, "sampled"))
    assert (record.idle_power_w, record.method) == (pytest.approx(50.0), "sampled")


@pytest.mark.parametrize("method", ["estimated", "attributed"])
def test_estimating_meter_does_not_measure_idle_power(method: Method) -> None:
    record, log = baseline(loading=Total(1.0, method, "cpu_time_model", "cpu_package"))
    assert (record.idle_power_w, record.method) == (None, "unavailable")
    assert record.reason == f"energy is {method} (cpu_time_model), which cannot measure idle power"
    assert log == [], "and nobody waits for it"


def test_meter_that_falls_back_to_an_estimate_gives_no_idle_power() -> None:
    record, _ = baseline(loading=Total(None, "unavailable"), method="estimated")
    assert (record.idle_power_w, record.method) == (None, "unavailable")
    assert "energy is estimated" in record.reason


class _ChangingMeter(Meter):
    """A GPU's meter whose counter fails in the third part, in which power is sampled."""

    def __init__(self, log: Any, boundary: str) -> None:
        super().__init__(log, boundary="module", source="nvml_total_energy")
        self.sampled = {"boundary": boundary, "method": "sampled", "source": "nvml_power_instant"}

    def end(self) -> Any:
        counted = self.device
        if self.log.count("end") == 2:
            self.device = self.sampled
        try:
            return super().end()
        finally:
            self.device = counted


def test_idle_power_has_the_sources_of_all_its_parts() -> None:
    record, _ = baseline(meter=_ChangingMeter([], "module"))
    assert record.idle_power_w == pytest.approx(50.0)
    assert (record.method, record.source) == ("sampled", "nvml_total_energy+nvml_power_instant")


def test_idle_power_over_different_boundaries_is_not_available() -> None:
    record, _ = baseline(meter=_ChangingMeter([], "gpu_board"))
    assert (record.idle_power_w, record.method) == (None, "unavailable")
    assert "not read in every window" in record.reason


def test_idle_power_may_be_switched_off() -> None:
    record, log = baseline(config=BaselineConfig(enabled=False))
    assert (record.idle_power_w, record.reason) == (None, "switched off by baseline.enabled")
    assert log == []


def test_without_a_meter_there_is_no_idle_power() -> None:
    record, log = baseline(meter=False, loading=Total(None, "unavailable", reason="rapl: permission denied"))
    assert (record.idle_power_w, record.reason) == (None, "rapl: permission denied")
    assert log == []


def test_counter_that_failed_while_loading_is_tried_again() -> None:
    record, _ = baseline(loading=Total(None, "unavailable", reason="it did not rise"))
    assert record.idle_power_w == pytest.approx(50.0)


def test_failing_counter_gives_no_idle_power() -> None:
    record, _ = baseline(watts=None, method="unavailable", reason="GPU is lost")
    assert (record.idle_power_w, record.seconds, record.method) == (None, None, "unavailable")
    assert "GPU is lost" in record.reason


def test_one_failing_part_gives_no_idle_power() -> None:
    record, _ = baseline(watts=[50.0, 50.0, None, 50.0, 50.0], reason="GPU is lost")
    assert (record.idle_power_w, record.uncertainty_w, record.age_seconds) == (None, None, None)
    assert "GPU is lost" in record.reason


PARTS_W = [49.0, 51.0, 50.5, 52.0, 48.0]


@pytest.mark.parametrize("edges_j", [None, 0.0, 3.0])
def test_uncertainty_combines_scatter_and_reading(edges_j: float | None) -> None:
    record, _ = baseline(watts=PARTS_W, uncertainty_j=edges_j)
    assert record.idle_power_w == pytest.approx(50.1)
    scatter = statistics.stdev(PARTS_W) / math.sqrt(5)
    reading = math.sqrt(5) * (edges_j or 0) / 10
    assert record.uncertainty_w == pytest.approx(math.hypot(scatter, reading))


# ---- reuse in later cycles ----

EARLIER = IdlePowerRecord(
    idle_power_w=48.0,
    uncertainty_w=0.5,
    seconds=30.0,
    method="measured",
    source="rapl_package",
    boundary="cpu_package",
    devices=["package-0"],
    measured_at="2026-11-24T10:00:00.000Z",
    age_seconds=0.0,
    parts_w=[48.0] * 5,
)


def test_idle_power_of_an_earlier_cycle_is_reused_with_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls(2026, 11, 24, 10, 1, 30, tzinfo=tz)

    monkeypatch.setattr("pytest_llem.measurement.idle_power.datetime", Later)
    record, log = baseline(known=EARLIER)
    assert log == [], "nobody waits"
    assert record == EARLIER.model_copy(update={"age_seconds": 90.0})


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "nvml_total_energy"},
        {"boundary": "cpu_package+dram"},
        {"devices": ["package-1"]},
        {"devices": ["package-0", "package-1"]},
        {"idle_power_w": None, "reason": "GPU is lost"},
        {"invalid": "counter_disagrees"},
        {"parts_w": []},
    ],
)
def test_idle_power_of_other_meter_or_devices_is_not_reused(changes: dict[str, Any]) -> None:
    record, log = baseline(known=EARLIER.model_copy(update=changes))
    assert (record.idle_power_w, record.age_seconds) == (pytest.approx(50.0), 0.0)
    assert "idle" in log


def test_idle_power_is_not_reused_if_switched_off_or_missing() -> None:
    off = BaselineConfig(enabled=False)
    assert baseline(known=EARLIER, config=off)[0].idle_power_w is None
    estimate = Total(1.0, "estimated", "rapl_package", "cpu_package", devices=("package-0",))
    assert baseline(known=EARLIER, loading=estimate)[0].idle_power_w is None


# ---- active energy ----

IDLE = IdlePowerRecord(
    idle_power_w=20.0,
    seconds=30.0,
    method="measured",
    source="nvml_total_energy",
    boundary="gpu_board",
    drift_w=0.0,
)


def _metrics(
    record: IdlePowerRecord,
    energy_j: float | None = 100.0,
    method: Method = "measured",
    reason: Any = None,
    edges_j: Any = None,
) -> Any:
    total = Total(energy_j, method, "nvml_total_energy", "gpu_board", reason, uncertainty_j=edges_j)
    return idle_power_metrics(record, pass_window([[]] * 4, 1.9, Account((), total, seconds=2.0)))


def test_active_energy_is_a_pass_without_its_idle_energy() -> None:
    metrics = _metrics(IDLE)
    active = metrics["active_energy_j"]
    assert metrics["idle_power_w"].value == 20.0
    assert metrics["idle_power_w"].boundary == "gpu_board"
    assert active.value == pytest.approx((100.0 - 20.0 * 2.0) / 4)
    assert (active.method, active.source, active.boundary) == ("measured", "nvml_total_energy", "gpu_board")


def test_active_energy_may_be_below_zero() -> None:
    assert _metrics(IDLE, energy_j=30.0)["active_energy_j"].value == pytest.approx(-2.5)


@pytest.mark.parametrize(("energy_j", "value"), [(100.0, 15.0), (30.0, -2.5)])
def test_uncertainty_of_active_energy_combines_window_and_idle_power(energy_j: float, value: float) -> None:
    idle = IDLE.model_copy(update={"uncertainty_w": 0.5})
    metrics = _metrics(idle, energy_j, edges_j=0.8)
    assert metrics["idle_power_w"].uncertainty == 0.5
    active = metrics["active_energy_j"]
    u = math.sqrt(0.8**2 + (2.0 * 0.5) ** 2) / 4
    assert active.uncertainty == pytest.approx(u)
    assert active.interval95 == pytest.approx((value - 1.96 * u, value + 1.96 * u))


@pytest.mark.parametrize(("idle_w", "edges_j"), [(None, 0.8), (0.5, None)])
def test_uncertainty_with_an_unknown_part_is_unknown(idle_w: float | None, edges_j: float | None) -> None:
    active = _metrics(IDLE.model_copy(update={"uncertainty_w": idle_w}), edges_j=edges_j)["active_energy_j"]
    assert (active.value, active.uncertainty, active.interval95) == (15.0, None, None)


def test_active_energy_has_the_weakest_method() -> None:
    assert _metrics(IDLE.model_copy(update={"method": "sampled"}))["active_energy_j"].method == "sampled"


def test_without_idle_power_active_energy_is_null_with_the_reason() -> None:
    metrics = _metrics(IdlePowerRecord(reason="switched off by baseline.enabled"))
    assert {name: metric.value for name, metric in metrics.items()} == {
        "idle_power_w": None,
        "active_energy_j": None,
    }
    assert metrics["idle_power_w"].reason == "switched off by baseline.enabled"
    assert metrics["active_energy_j"].reason == "no idle power: switched off by baseline.enabled"
    assert {metric.method for metric in metrics.values()} == {"unavailable"}


def test_without_energy_active_energy_is_null_with_the_reason() -> None:
    active = _metrics(IDLE, None, "unavailable", "GPU is lost")["active_energy_j"]
    assert (active.value, active.reason) == (None, "GPU is lost")


def test_idle_power_of_another_boundary_is_not_subtracted() -> None:
    active = _metrics(IDLE.model_copy(update={"boundary": "cpu_package"}))["active_energy_j"]
    assert (active.value, active.method) == (None, "unavailable")
    assert active.reason == "idle power covers cpu_package, and the window gpu_board"


# ---- a GPU that follows a script ----

A = "GPU-aaaaaaaa-0000-0000-0000-000000000001"


def _idle_and_window(script: Any, busy_s: Any) -> Any:
    """Return a GPU's idle power and the metrics of a window with *busy_s* of work in each pass.

    The baseline begins on a full second of the script's.
    """
    script.start = time.monotonic()
    script.write()
    engine: Any = Engine()
    engine.seed = engine.log.append
    engine.generate = lambda batch: time.sleep(busy_s)
    meters = Meters.open("nvml", [A])
    meters.begin()
    loading = meters.end().total
    config = BaselineConfig.model_construct(enabled=True, duration_seconds=2.5)
    time.sleep(1.0 - (script.now() + busy_s) % 1.0)
    record = measure_idle_power(partial(engine.generate, "b"), meters, loading, config)
    window = measure(engine, ["b"], meters, min_seconds=1.0, seed=1)
    record = measure_idle_power_after(record, meters, config, window)
    meters.close()
    assert not meters.refusals
    metrics = idle_power_metrics(record, window)
    return record, metrics, window


@pytest.fixture
def on_gpu(nvml_library: Path, tmp_path: Path) -> Callable[..., Any]:
    def call(*power: Any, **more: Any) -> Any:
        gpu = nvml.ScriptedGpu(A, list(power), {"tick_ms": 20, "counter_mj": 5_000_000_000, **more})
        script = nvml.Script(tmp_path / "script", [gpu])
        script.write()
        return nvml.run(nvml.environment(nvml_library, script), _idle_and_window, script, 0.05)

    return call


@pytest.mark.slow
def test_the_idle_power_of_a_scripted_gpu_is_right_to_a_percent(on_gpu: Callable[..., Any]) -> None:
    record, metrics, window = on_gpu((0.0, 121.5))
    assert record.idle_power_w == pytest.approx(121.5, rel=0.01)
    assert (record.devices, record.method, record.source) == ([A], "measured", "nvml_total_energy")
    assert 0 < record.uncertainty_w < 0.02 * 121.5
    active = metrics["active_energy_j"]
    low, high = active.interval95
    assert low < active.value < high
    assert abs(active.value) < 0.02 * 121.5 * window.account.seconds


@pytest.mark.slow
def test_interval_of_a_window_without_work_contains_zero(on_gpu: Callable[..., Any]) -> None:
    """Idle power is not quite constant: it changes with each part of the measurement."""
    record, metrics, window = on_gpu(*((k / 2, 124.0 if k % 2 else 118.0) for k in range(32)))
    low, high = metrics["active_energy_j"].interval95
    assert low < 0 < high
    assert high - low < 0.4 * window.account.total.energy_j, "and is not so wide that anything would be"
    assert record.idle_power_w == pytest.approx(121, rel=0.01)


# ---- a whole experiment ----


def _run(phases: Any = None, **changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    config = ExperimentConfig.model_validate({**fields, **changes})
    note = phases.append if phases is not None else lambda progress: None
    return ExperimentOrchestrator(config, on_progress=note).run().result


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that draws 40 W, and 60 W more while the engine generates."""
    import noop_engine

    busy = [0.0]
    counter = Powercap(tmp_path / "powercap").zone("intel-rapl:0", "package-0")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path / "powercap"))
    read, generate = Path.read_text, noop_engine.NoopEngine.generate

    def read_text(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == counter:
            return f"{round((40 * time.monotonic() + 60 * busy[0]) * 1e6) % 262_143_328_850}\n"
        return read(path, *args, **kwargs)

    def timed(self: Any, batch: Any) -> Any:
        began = time.monotonic()
        generated = generate(self, batch)
        busy[0] += time.monotonic() - began
        return generated

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(noop_engine.NoopEngine, "generate", timed)


@pytest.mark.slow
@pytest.mark.usefixtures("noop_engine", "machine")
def test_run_on_a_machine_of_known_power() -> None:
    phases: list[Progress] = []
    result = _run(
        phases,
        energy={"backend": "rapl"},
        baseline={"duration_seconds": 5},
        noop={"seconds": 0.1},
        measurement={"min_window_seconds": 0.5},
        warmup={"n_warmup": 1, "convergence_detection": False},
    )
    names = [progress.phase for progress in phases]
    assert names.index("preparing") < names.index("measuring the idle machine") < names.index("warming up")
    assert Progress("measuring the idle machine", total=5.0, unit="s") in phases
    assert [progress for progress in phases if progress.phase == "warming up"] == [
        Progress("warming up", done, 2, "runs") for done in (1, 2)
    ]
    assert result.idle_power.idle_power_w == pytest.approx(40.0, rel=0.01)
    assert result.idle_power.uncertainty_w > 0
    assert result.metrics["active_energy_j"].uncertainty > 0
    assert 5 <= result.idle_power.seconds < 10
    value = {name: metric.value for name, metric in result.metrics.items()}
    assert value["idle_power_w"] == result.idle_power.idle_power_w
    assert value["mean_power_w"] == pytest.approx(100.0, rel=0.05)
    idle_j = value["idle_power_w"] * result.window.energy_seconds / result.window.passes
    assert value["active_energy_j"] == pytest.approx(value["energy_j"] - idle_j)
    assert value["active_energy_j"] == pytest.approx(60 * value["seconds"], rel=0.1)
    assert ExperimentResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.usefixtures("noop_engine")
def test_estimate_has_no_idle_power_and_does_not_wait() -> None:
    phases: list[Progress] = []
    result = _run(phases)
    assert "measuring the idle machine" not in {progress.phase for progress in phases}
    assert result.metrics["energy_j"].method == "estimated"
    assert result.idle_power.reason == "energy is estimated (cpu_time_model), which cannot measure idle power"
    assert result.metrics["active_energy_j"].value is None
    assert result.idle_power.reason in result.metrics["active_energy_j"].reason
