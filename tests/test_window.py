"""The edges of a window, on a device that works asynchronously."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem.energy.account import Meters
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.measurement import orchestrator, pass_driver, pass_window
from pytest_llem.measurement.pass_driver import warm_up
from pytest_llem.measurement.pass_window import measure
from pytest_llem.study.config import WarmupConfig
from tests.support.clock import clock
from tests.support.narrow import not_none

#: Power of the device while it works, and while it is idle, in W.
BUSY_W, IDLE_W = 300.0, 100.0


class Device:
    """A device that needs 2 s for a batch; a call only queues the batch, in 0.1 s.

    Attributes:
        now: In s.
        log: What was asked of it, and when.
        drawn_j: Its energy so far.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[tuple[str, float]] = []
        self.drawn_j = 0.0
        self._busy_until = self.now

    def pass_time(self, seconds: float) -> None:
        busy = min(seconds, max(0.0, self._busy_until - self.now))
        self.drawn_j += busy * BUSY_W + (seconds - busy) * IDLE_W
        self.now += seconds

    # an engine

    def generate(self, batch: str) -> str:
        self.log.append((f"generate {batch}", self.now))
        self._busy_until = max(self.now, self._busy_until) + 2.0
        self.pass_time(0.1)
        return batch

    def synchronize(self) -> None:
        self.pass_time(max(0.0, self._busy_until - self.now))
        self.log.append(("synchronize", self.now))

    def seed(self, seed: int) -> None:
        self.log.append((f"seed {seed}", self.now))

    def positions(self, batch: str) -> int:
        return len(batch)

    # a meter

    def begin(self) -> None:
        self.pass_time(0.05)  # the meter waits for its tick
        self.log.append(("begin", self.now))
        self._edge = self.now, self.drawn_j

    def end(self) -> Reading:
        self.pass_time(0.05)
        self.log.append(("end", self.now))
        began, drawn_j = self._edge
        one = DeviceReading("d", "gpu_board", self.drawn_j - drawn_j, "measured", "nvml_total_energy")
        return Reading((one,), self.now - began)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    for module in (pass_window, pass_driver):
        monkeypatch.setattr(module, "time", clock(lambda: device.now))
    return device


def test_device_is_synchronized_before_both_edges(device: Any) -> None:
    """A window excludes work queued before it, and includes all work queued in it."""
    device.generate("left over from warming up")
    device.log.clear()
    window = measure(device, ["a", "b"], Meters({"m": device}), min_seconds=10, seed=7)
    assert [name for name, _ in device.log] == [
        "synchronize",
        "begin",
        *["seed 7", "generate a", "generate b", "synchronize"] * 3,
        "end",
    ]
    (_, drained), (_, began), *_, (_, done), (_, ended) = device.log
    assert drained == pytest.approx(102.0)
    # Three passes of two batches of 2 s are needed for 10 s.
    assert len(window.passes) == 3
    assert window.seconds == pytest.approx(12.0) == pytest.approx(done - began)
    assert window.pass_seconds == pytest.approx([4.0] * 3)
    assert window.account.seconds == pytest.approx(12.05) == pytest.approx(ended - began)
    assert window.account.total.energy_j == pytest.approx(12 * BUSY_W + 0.05 * IDLE_W)


@pytest.mark.parametrize("seconds", [0, 4, 4.001, 33])
def test_pass_duration_does_not_depend_on_window_length(device: Any, seconds: float) -> None:
    window = measure(device, ["a", "b"], Meters({"m": device}), min_seconds=seconds, seed=7)
    assert len(window.passes) == max(1, -(-seconds // 4))
    tail_j = (not_none(window.account.seconds) - window.seconds) * IDLE_W
    assert window.seconds / len(window.passes) == pytest.approx(4.0)
    assert (not_none(window.account.total.energy_j) - tail_j) / len(window.passes) == pytest.approx(4 * BUSY_W)


def test_load_time_includes_the_devices_work(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "time", SimpleNamespace(monotonic=lambda: device.now))
    device.load = lambda: device.generate("weights")
    seconds, account = orchestrator._load(device, Meters({"m": device}))
    assert [name for name, _ in device.log] == ["begin", "generate weights", "synchronize", "end"]
    assert seconds == pytest.approx(2.0)
    assert account.total.energy_j == pytest.approx(2 * BUSY_W + 0.05 * IDLE_W)


def test_warm_up_waits_for_the_device(device: Any) -> None:
    """Otherwise the warm-up would take queueing times for latencies, and settle at once."""
    config = WarmupConfig(n_warmup=2, convergence_detection=False)
    record = not_none(warm_up(device, ["a", "longer"], config, lambda run, most: None))
    assert record.runs == 4
    assert record.seconds == pytest.approx(8.0)
