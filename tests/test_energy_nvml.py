"""GPU energy: the real nvidia-ml-py, in real processes, over boards whose energy is known exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.energy.account import Account, Meters
from pytest_llem.energy.nvml import NvmlMeter
from pytest_llem.energy.protocol import MeterUnavailableError, Reading
from pytest_llem.measurement.environment import environment as gpu_environment
from tests.support import nvml
from tests.support.nvml import Board, Call, Script
from tests.support.powercap import Powercap, add

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
WORK_S = 2.05  # which ends between two ticks


@pytest.fixture
def run(nvml_library, tmp_path):
    """Call a function in a new process that finds the boards; the script is its first argument."""

    def call(function: Callable[..., Any], *boards: Board, args: tuple[Any, ...] = (), **script: Any) -> Any:
        written = Script(tmp_path / "script", list(boards), **script)
        written.write()
        env = nvml.environment(nvml_library, written) | {"LLEM_POWERCAP_ROOT": str(tmp_path / "powercap")}
        return nvml.run(env, function, written, *args)

    return call


def _board(uuid: str = A, watts: float = 300.0, **more: str | float) -> Board:
    return Board(uuid, [(0.0, watts)], {"tick_ms": 20, "counter_mj": 5_000_000_000, **more})


@dataclass(frozen=True)
class Seen:
    """A reading, and what it can be checked against.

    Attributes:
        reading: What the meter gave.
        expected_j: What the first board drew over the reading's seconds, up to when it ended.
        blur_s: How far from a tick the edges may lie: since the last look at the counter that still gave the
            value before it, for both. A few ms, and more where the scheduler kept the process waiting.
        unseen_s: The longest time between two looks while ticks were probed, likewise.
        users: Of NVML, once the meter was closed.
    """

    reading: Reading
    expected_j: float
    blur_s: float
    unseen_s: float
    users: int


def _watch(script: Script, step_w: float | None) -> Seen:
    """Measure the first board in a window; it may step up to another power in its middle."""
    (board,) = script.boards
    meter = NvmlMeter()
    meter.open([board.uuid])
    probed = [look.at for look in _looks(script, 0.0, math.inf)] + [time.monotonic()]
    time.sleep(0.05)  # off the tick that the probing ended on
    edges = [time.monotonic()]
    meter.begin()
    edges.append(time.monotonic())
    if step_w is not None:
        board.power.append((script.now() + WORK_S / 2, step_w))
        script.write()
    time.sleep(WORK_S)
    edges.append(time.monotonic())
    reading = meter.end()
    edges.append(time.monotonic())
    meter.close()
    ended = edges[3] - script.start
    return Seen(
        reading,
        board.energy_j(ended - reading.seconds, ended),
        blur_s=_blur(script, *edges[:2]) + _blur(script, *edges[2:]),
        unseen_s=max(after - before for before, after in pairwise(probed)),
        users=script.users(),
    )


def _blur(script: Script, before: float, after: float) -> float:
    looks = _looks(script, before, after)
    return after - max((look.at for look in looks if look.value != looks[-1].value), default=before)


def _looks(script: Script, before: float, after: float) -> list[Call]:
    """Return the readings of energy counters in a span of the monotonic clock."""
    calls = [call for call in script.calls() if before <= call.at <= after]
    return [call for call in calls if call.function == "nvmlDeviceGetTotalEnergyConsumption"]


@pytest.mark.parametrize(
    ("tick_ms", "call_ms", "step_w"),
    [
        pytest.param(20, 0, None, id="constant"),
        pytest.param(20, 0, 100.0, id="step"),
        pytest.param(100, 0, 400.0, id="slow-ticks"),
        pytest.param(100, 4, None, id="slow-calls"),
    ],
)
def test_energy_is_the_integral_of_power_between_the_edges(run, tick_ms, call_ms, step_w):
    seen = run(_watch, _board(tick_ms=tick_ms), args=(step_w,), call_ms=call_ms)
    reading = seen.reading
    (device,) = reading.devices
    assert (device.device, device.boundary, device.reason) == (A, "gpu_board", None)
    assert (device.method, device.source) == ("measured", "nvml_total_energy")
    assert reading.seconds >= WORK_S
    blurred_j = seen.blur_s * max(300.0, step_w or 0.0)
    assert device.energy_j == pytest.approx(seen.expected_j, rel=0.005, abs=blurred_j)
    if step_w is None:
        assert device.energy_j / reading.seconds == pytest.approx(300, rel=0.005, abs=blurred_j / reading.seconds)
    # A tick is seen by the next look, and noted before the one after that.
    assert reading.tick_seconds == pytest.approx(tick_ms / 1000, rel=0.2, abs=2 * seen.unseen_s)
    assert seen.users == 0, "NVML was let go"


@dataclass(frozen=True)
class Run:
    """What the meters saw in a window.

    Attributes:
        account: What they gave.
        refusals: Why the others gave nothing.
        least_s, most_s: Between which a device's window lies that is cut at ticks of 20 ms.
        waited: For a tick of which boards, at the end.
        users: Of NVML, once they were closed.
    """

    account: Account
    refusals: dict[str, str]
    least_s: float
    most_s: float
    waited: set[str]
    users: int


def _measure(script: Script, backend: str, uuids: list[str], change: dict[str, float] | None = None) -> Run:
    """Open the meters and measure a window, at whose end the first board changes."""
    meters = Meters.open(backend, uuids)
    edges = [time.monotonic()]
    meters.begin()
    edges.append(time.monotonic())
    for counter in Path(os.environ["LLEM_POWERCAP_ROOT"]).glob("*/energy_uj"):
        add(counter, 2.0)
    time.sleep(0.2)
    if change is not None:
        script.boards[0].more |= change
        script.write()
    edges.append(time.monotonic())
    account = meters.end()
    edges.append(time.monotonic())
    meters.close()
    looks = {(look.uuid, look.value) for look in _looks(script, *edges[2:])}
    return Run(
        account,
        meters.refusals,
        least_s=edges[2] - edges[1] - 0.02,
        most_s=edges[3] - edges[0] + 0.02,
        waited={uuid for uuid in uuids if len([look for look in looks if look[0] == uuid]) > 1},
        users=script.users(),
    )


def test_two_boards_and_their_sum(run):
    seen = run(_measure, _board(A, 300), _board(B, 100), args=("nvml", [A, B]))
    assert (seen.refusals, seen.users) == ({}, 0)
    first, second = seen.account.devices
    assert (first.device, second.device) == (A, B)
    assert seen.least_s <= first.energy_j / 300 <= seen.most_s
    assert seen.least_s <= second.energy_j / 100 <= seen.most_s
    assert A in seen.waited
    total = seen.account.total
    assert total.energy_j == first.energy_j + second.energy_j
    assert (total.method, total.boundary, total.source) == ("measured", "gpu_board", "nvml_total_energy")


def test_a_board_asked_for_twice_counts_once(run):
    seen = run(_measure, _board(), args=("nvml", [A, A]))
    assert [device.device for device in seen.account.devices] == [A]


def _assert_lost(account: Account, reason: str) -> None:
    lost = account.devices[0]
    assert (lost.device, lost.energy_j, lost.method) == (A, None, "unavailable")
    assert reason in lost.reason
    total = account.total
    assert (total.energy_j, total.method, total.boundary) == (None, "unavailable", "gpu_board")
    assert reason in total.reason
    assert A in total.reason


def test_a_board_lost_in_the_window_has_no_energy(run):
    seen = run(_measure, _board(A), _board(B), args=("nvml", [A, B], {"lost_at": 0.0}))
    _assert_lost(seen.account, "NVML: GPU is lost")
    other = seen.account.devices[1]
    assert seen.least_s <= other.energy_j / 300 <= seen.most_s, "it is read all the same"
    assert seen.waited == {B}, "and the edge is on its tick"
    assert seen.users == 0


def test_a_counter_reset_in_the_window_gives_no_energy(run):
    seen = run(_measure, _board(), args=("nvml", [A], {"reset_at": 0.0}))
    _assert_lost(seen.account, "the energy counter did not rise (from 5")


def test_a_counter_that_stands_still_gives_no_energy(run):
    seen = run(_measure, _board(watts=0), args=("nvml", [A]))
    _assert_lost(seen.account, "the energy counter did not rise")
    assert seen.account.tick_seconds is None


def _lost_between_windows(script: Script) -> list[Account]:
    meters = Meters.open("nvml", [A])
    accounts = []
    for lost_at in (1e9, 0.0, 1e9):
        script.boards[0].more["lost_at"] = lost_at
        script.write()
        meters.begin()
        accounts.append(meters.end())
    meters.close()
    meters.close()  # does nothing more
    return accounts


def test_every_window_stands_for_itself(run):
    first, second, third = run(_lost_between_windows, _board())
    assert first.total.energy_j > 0
    _assert_lost(second, "GPU is lost")
    assert third.total.energy_j > 0


def _refusal(script: Script, uuids: list[str]) -> tuple[str, int]:
    meter = NvmlMeter()
    try:
        meter.open(uuids)
    except MeterUnavailableError as error:
        return str(error), script.users()
    raise AssertionError("it opened")


@pytest.mark.parametrize(
    ("boards", "reason"),
    [
        pytest.param(
            [_board(no_counter=1)], f"NVML: {A}: no energy counter (boards have one from Volta on)", id="old"
        ),
        pytest.param([_board(mig=1)], f"NVML: {A}: MIG is on", id="mig"),
        pytest.param([_board(lost_at=0)], f"NVML: {A}: GPU is lost", id="lost"),
        pytest.param([_board(B)], f"NVML: {A}: Not Found", id="unknown"),
        pytest.param([_board(A), _board(B, mig=1)], f"NVML: {B}: MIG is on", id="second"),
    ],
)
def test_refused_with_a_reason_and_nothing_held(run, boards, reason):
    message, users = run(_refusal, *boards, args=([A, B] if len(boards) == 2 else [A],))
    assert message.startswith(reason)
    assert users == 0


def test_no_nvml(tmp_path):
    # What cannot be loaded hides whatever is installed.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libnvidia-ml.so.1").write_text("not a library")
    script = Script(tmp_path / "script", [])
    env = nvml.environment(broken, script)
    assert nvml.run(env, _no_nvml) == "NVML: NVML Shared Library Not Found"


def _no_nvml() -> str:
    meter = NvmlMeter()
    try:
        meter.open([A])
    except MeterUnavailableError as error:
        meter.close()
        return str(error)
    raise AssertionError("it opened")


def test_no_gpu_no_nvml():
    meter = NvmlMeter()
    with pytest.raises(MeterUnavailableError, match="no NVIDIA GPU"):
        meter.open([])
    meter.close()


def test_auto_reads_the_board_first_and_rapl_beside_it(run, tmp_path):
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    seen = run(_measure, _board(), args=("auto", [A]))
    account = seen.account
    assert seen.refusals == {}
    assert account.total.boundary == "gpu_board"
    assert account.total.energy_j == account.over("gpu_board").energy_j > 0
    assert account.over("cpu_package").energy_j == pytest.approx(2.0)
    assert account.tick_seconds is not None


def test_auto_without_rapl_says_so(run):
    seen = run(_measure, _board(), args=("auto", [A]))
    assert seen.account.total.boundary == "gpu_board"
    assert set(seen.refusals) == {"rapl"}
    cpu = seen.account.over("cpu_package")
    assert (cpu.energy_j, cpu.method, cpu.reason) == (None, "unavailable", "no meter read cpu_package")


def test_auto_on_a_board_without_a_counter(run, tmp_path):
    seen = run(_measure, _board(no_counter=1), args=("auto", [A]))
    assert set(seen.refusals) == {"nvml", "rapl", "estimate"}
    total = seen.account.total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert "no energy counter" in total.reason
    Powercap(tmp_path / "powercap").zone("intel-rapl:0", "package-0")
    seen = run(_measure, _board(no_counter=1), args=("auto", [A]))
    assert set(seen.refusals) == {"nvml"}
    assert seen.account.total.boundary == "cpu_package"


def _environment(script: Script, uuids: list[str]) -> tuple[list[dict[str, Any]], int]:
    return gpu_environment(uuids)["gpus"], script.users()


def test_the_environment_names_board_and_driver(run):
    board = _board(name="Scripted H100 80GB", power_limit_w=700, memory_mb=85_520, persistence=1)
    gpus, users = run(_environment, board, args=([A, B],), driver="580.1")
    assert gpus == [
        {
            "uuid": A,
            "name": "Scripted H100 80GB",
            "driver": "580.1",
            "power_limit_w": 700,
            "memory_mb": 85_520,
            "persistence_mode": True,
        },
        {"uuid": B, "nvml": "Not Found"},
    ]
    assert users == 0
