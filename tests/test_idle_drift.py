"""Idle power drifts: the interval of a window's active energy contains zero if no work was done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.measurement.accounting import prefill_metrics
from pytest_llem.measurement.idle_power import idle_power_metrics, measure_idle_power, measure_idle_power_after
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.results.experiment import IdlePowerRecord
from pytest_llem.study.config import BaselineConfig
from tests.support.measured import pass_window

Power = NDArray[np.float64]

CONFIG = BaselineConfig()
BOUNDARY = {"source": "nvml_total_energy", "boundary": "gpu_board", "devices": ("GPU-1",)}

#: Idle power of an H200 with a context, in W, and the time between two values of its simulated drift, in s.
IDLE_W, STEP_S = 124.0, 0.1

#: Standard deviation of the drift of idle power within 30 s, in W.
DRIFT_W = 0.002 * IDLE_W

#: Uncertainty of reading a counter's edges over 6 s, in J.
READING_J = 0.1


class Machine:
    """A machine with simulated power and clock, and a meter that reads it."""

    def __init__(self, course: Power, noise: np.random.Generator) -> None:
        self.now, self._noise = 0.0, noise
        self._joules = np.concatenate([[0.0], np.cumsum(course) * STEP_S])
        self._began = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def _counter_j(self, at: float) -> float:
        return float(self._joules[round(at / STEP_S)])

    def open(self, gpus: Any) -> None: ...

    def close(self) -> None: ...

    def begin(self) -> None:
        self._began = self.now

    def end(self) -> Reading:
        seconds = self.now - self._began
        energy_j = self._counter_j(self.now) - self._counter_j(self._began) + self._noise.normal(0, READING_J)
        device = DeviceReading(
            "GPU-1", "gpu_board", energy_j, "measured", "nvml_total_energy", uncertainty_j=READING_J
        )
        return Reading((device,), seconds, tick_seconds=0.1)

    # the part of an engine that is used
    def generate(self, batch: Any) -> None: ...

    def synchronize(self) -> None: ...


def _course(kind: str, seconds: float, noise: np.random.Generator) -> Power:
    n = round(seconds / STEP_S)
    if kind == "random walk":
        steps = noise.normal(0, DRIFT_W * math.sqrt(STEP_S / 30), n)
        return np.asarray(IDLE_W + np.cumsum(steps))
    if kind == "slow ramp":
        return np.asarray(IDLE_W + noise.normal(0, DRIFT_W / 30) * STEP_S * np.arange(n))
    if kind == "step":
        return np.asarray(IDLE_W + 2 * DRIFT_W * (np.arange(n) > noise.integers(n)))
    if kind == "cools down":
        return np.asarray(IDLE_W + 10 * DRIFT_W * np.exp(-np.arange(n) * STEP_S / 30))
    assert kind == "constant"
    return np.full(n, IDLE_W)


@pytest.fixture
def idle_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[IdlePowerRecord, float, float, float]]:
    """Measure idle power like an experiment; return the record, and the active energy of a window in which
    nothing was done: value, uncertainty, and what an uncertainty without drift would be, in J.
    """

    def run(
        course: Power, noise: np.random.Generator, before: float, window: float, after: float
    ) -> tuple[IdlePowerRecord, float, float, float]:
        machine = Machine(course, noise)
        monkeypatch.setattr("pytest_llem.measurement.idle_power.time", machine)
        meters = Meters({"nvml": machine})
        loading = Total(1.0, "measured", **BOUNDARY)  # type: ignore[arg-type]  # of one type each
        record = measure_idle_power(lambda: None, meters, loading, CONFIG)
        machine.sleep(before)
        meters.begin()
        began = machine.now
        machine.sleep(window)
        measured = pass_window([[]], window, meters.end(), began=began)
        machine.sleep(after)
        record = measure_idle_power_after(record, meters, CONFIG, measured)
        active = idle_power_metrics(record, measured)["active_energy_j"]
        assert active.value is not None
        assert active.uncertainty is not None
        assert record.uncertainty_w is not None
        return record, active.value, active.uncertainty, math.hypot(READING_J, window * record.uncertainty_w)

    return run


#: Duration of the warm-up, of the window, and of a prefill window after it, in s.
TIMES = {"short": (5.0, 10.0, 0.0), "as on the H200": (15.0, 30.0, 0.0), "long": (15.0, 120.0, 0.0)}
TIMES |= {"prefill split": (15.0, 10.0, 10.0), "baseline of an earlier cycle": (400.0, 10.0, 0.0)}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", ["random walk", "slow ramp", "step", "cools down", "constant"])
def test_interval_of_active_energy_without_work_contains_zero(
    idle_run: Callable[..., Any], kind: str, times: str
) -> None:
    """In 95 of 100 runs. 30 s without work used to cost 8.5 J on an H200, with an uncertainty of 0.68 J."""
    noise = np.random.default_rng(15)
    before, window, after = TIMES[times]
    total = CONFIG.duration_seconds + before + window + after + CONFIG.part_seconds + 1.0
    runs = [idle_run(_course(kind, total, noise), noise, before, window, after) for _ in range(200)]
    covered = sum(abs(value) <= 1.96 * uncertainty for _, value, uncertainty, _ in runs)
    assert covered >= 0.95 * len(runs)
    if kind == "random walk":
        without = sum(abs(value) <= 1.96 * reading for _, value, _, reading in runs)
        assert without < 0.6 * len(runs), "drift is what it takes"
        spread = float(np.std([value for _, value, _, _ in runs]))
        assert np.median([uncertainty for _, _, uncertainty, _ in runs]) < 4 * spread, "and no more than that"


def test_record_has_the_drift(idle_run: Callable[..., Any]) -> None:
    noise = np.random.default_rng(1)
    course = np.full(1000, IDLE_W)
    course[500:] = IDLE_W + 1.0
    record, *_ = idle_run(course, noise, 5.0, 10.0, 5.0)
    assert record.after_w == pytest.approx(IDLE_W + 1.0, abs=0.1)
    assert record.after_seconds == pytest.approx(6.0)
    assert record.drift_w == pytest.approx(1.0, abs=0.15)
    assert len(record.parts_w) == 5


def test_unknown_drift_is_an_unknown_uncertainty() -> None:
    idle = IdlePowerRecord(idle_power_w=20.0, uncertainty_w=0.1, method="measured", boundary="gpu_board")
    total = Total(100.0, "measured", uncertainty_j=1.0, **BOUNDARY)  # type: ignore[arg-type]  # of one type each
    active = idle_power_metrics(idle, pass_window([[]], 1.0, Account((), total, 1.0)))["active_energy_j"]
    assert (active.value, active.uncertainty) == (80.0, None)


@pytest.mark.parametrize(("drift_w", "uncertainty"), [(0.5, math.sqrt(1 + 4 + (0.5 * 3.0) ** 2)), (None, None)])
def test_decode_energy_includes_drift_between_its_windows(
    drift_w: float | None, uncertainty: float | None
) -> None:
    def window(energy_j: float, uncertainty_j: float, seconds: float) -> PassWindow:
        total = Total(energy_j, "measured", uncertainty_j=uncertainty_j, **BOUNDARY)  # type: ignore[arg-type]  # likewise
        return pass_window([[]], seconds, Account((), total, seconds))

    found = prefill_metrics(window(100.0, 1.0, 9.0), window(30.0, 2.0, 3.0), 8, drift_w)
    assert found["decode_energy_j"].value == 70.0
    assert found["decode_energy_j"].uncertainty == (None if uncertainty is None else pytest.approx(uncertainty))
    assert found["prefill_energy_j"].uncertainty == 2.0, "nothing is subtracted from it"
