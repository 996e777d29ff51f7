"""What an energy is of, and whether it can be right: counters, power scopes, mirrored zones, process trees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.energy.account import Account, Meters
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.caveats import find_warnings
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import EngineRecord
from tests.support import nvml
from tests.support.nvml import Board, Script

GPU = EngineRecord(name="e", device="cuda")


def _warnings(account: Account) -> list[str]:
    return find_warnings(Window([[]], account.seconds or 1.0, account), None, GPU, {})


# ---- counter and integral ----


class _Given:
    """A meter that gives what it was made with."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def open(self, gpus: Any) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> Reading:
        return self.reading

    def close(self) -> None: ...


def _account(*devices: DeviceReading, seconds: float = 10.0, tick: float | None = 0.1) -> Account:
    meters = Meters({"given": _Given(Reading(devices, seconds, tick))})
    meters.begin()
    return meters.end()


def _device(energy_j: float, integral_j: float, **fields: Any) -> DeviceReading:
    known = {"uncertainty_j": 0.1, "integral_uncertainty_j": 0.1, **fields}
    return DeviceReading(
        "GPU-1", "gpu_board", energy_j, "measured", "nvml_total_energy", integral_j=integral_j, **known
    )


@pytest.mark.parametrize(
    ("integral_j", "invalid", "warned"),
    [
        (102.9, None, []),
        (103.1, None, ["energy counter and sampled power disagree on GPU-1: 100 J and 103.1 J (+3.1%)"]),
        (95.1, None, ["energy counter and sampled power disagree on GPU-1: 100 J and 95.1 J (-4.9%)"]),
        (
            105.1,
            "counter_disagrees",
            [
                "energy counter and sampled power disagree on GPU-1: 100 J and 105.1 J (+5.1%): "
                "invalid, no gate judges it"
            ],
        ),
    ],
)
def test_counter_that_disagrees_with_sampled_power(
    integral_j: float, invalid: str | None, warned: list[str]
) -> None:
    account = _account(_device(100.0, integral_j))
    assert account.total.energy_j == 100.0, "it is shown"
    assert account.total.invalid == account.over("gpu_board").invalid == invalid
    assert energy("energy_j", account.total).invalid == invalid
    assert _warnings(account) == warned


def test_one_invalid_board_makes_the_sum_invalid() -> None:
    fine = replace(_device(500.0, 500.0), device="GPU-2")
    assert _account(fine, _device(100.0, 110.0)).total.invalid == "counter_disagrees"


def test_disagreement_within_sampling_error_is_none() -> None:
    account = _account(_device(100.0, 112.0, integral_uncertainty_j=4.1))
    assert account.total.invalid is None
    assert _warnings(account) == []


def test_meter_of_unknown_tick_is_checked() -> None:
    account = _account(_device(100.0, 150.0), tick=None)
    assert account.total.invalid == "counter_disagrees"
    assert _warnings(account)[1:] == [
        "meter states no tick of nvml_total_energy: whether the window is long enough for it was not checked"
    ]


# ---- boards ----

SECONDS = 1.0


def _board(
    name: str, /, gain: float = 1.0, tick_ms: float = 20, module_w: float | None = None, **more: Any
) -> Board:
    known = {"tick_ms": tick_ms, "counter_mj": 5e9, "counter_gain": gain, "name": "NVIDIA H100 80GB HBM3", **more}
    return Board(f"GPU-{name}", [(0.0, 300.0)], known, module_power=[] if module_w is None else [(0.0, module_w)])


BOARDS = [
    _board("right"),
    _board("wrong", gain=0.57),
    _board("module", name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1),
    _board("board-of-module", name="NVIDIA GH200 480GB", module_w=520.0),
    _board("module-by-name", name="NVIDIA GB200", gain=520 / 300),
    _board("module-wrong", name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1, gain=0.8),
    _board("slow", tick_ms=1000),
    _board("slow-module", tick_ms=1000, name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1),
]


def _measured(script: Script) -> tuple[Account, dict[str, str]]:
    meters = Meters.open("nvml", [board.uuid for board in script.boards])
    meters.begin()
    time.sleep(SECONDS)
    account = meters.end()
    meters.close()
    return account, meters.refusals


@pytest.fixture(scope="module")
def measured(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DeviceReading]:
    """Return what was measured of a board, by its name: all of them at once."""
    script = Script(tmp_path_factory.mktemp("boards") / "script", BOARDS)
    script.write()
    account, refusals = nvml.run(nvml.environment(nvml_library, script), _measured, script)
    assert refusals == {}
    by_name = {device.device.removeprefix("GPU-"): device for device in account.devices}
    assert [*by_name] == [board.uuid.removeprefix("GPU-") for board in BOARDS]
    return lambda name: by_name[name]


def _alone(device: DeviceReading) -> Account:
    return _account(device, seconds=device.seconds or 0.0, tick=0.02)


@pytest.mark.parametrize(
    ("name", "watts", "boundary", "invalid"),
    [
        ("right", 300.0, "gpu_board", None),
        ("wrong", 0.57 * 300.0, "gpu_board", "counter_disagrees"),
        ("module", 520.0, "module", None),
        ("board-of-module", 300.0, "gpu_board", None),
        ("module-by-name", 520.0, "module", None),
        ("module-wrong", 0.8 * 520.0, "module", "counter_disagrees"),
    ],
)
def test_counter_is_labelled_by_the_scope_it_follows(
    measured: Callable[[str], DeviceReading], name: str, watts: float, boundary: str, invalid: str | None
) -> None:
    device = measured(name)
    assert device.energy_j is not None
    assert device.seconds is not None
    assert device.energy_j / device.seconds == pytest.approx(watts, rel=0.02)
    assert (device.method, device.boundary) == ("measured", boundary)
    assert _alone(device).total.invalid == invalid


def test_module_of_unread_power_is_not_checked_against_the_boards(
    measured: Callable[[str], DeviceReading],
) -> None:
    device = measured("module-by-name")
    assert device.integral_j is None
    assert _warnings(_alone(device)) == [
        "energy counter of GPU-module-by-name could not be checked: "
        "the driver reads the GPU's power, and not that of its module"
    ]


@pytest.mark.parametrize("name", ["slow", "slow-module"])
def test_slow_counter_falls_back_to_sampled_power(measured: Callable[[str], DeviceReading], name: str) -> None:
    """Its tick of 1,000 ms gave null, though its power was sampled ten times a second."""
    device = measured(name)
    assert device.energy_j is not None
    assert device.seconds is not None
    assert device.energy_j == pytest.approx(300.0 * device.seconds, rel=0.001)
    assert (device.method, device.source, device.boundary) == ("sampled", "nvml_power_instant", "gpu_board")
    assert device.reason is None
    [warning] = _warnings(_alone(device))
    assert warning.startswith(
        f"energy counter of GPU-{name} was not used, its power was sampled: "
        "the energy counter stood still for 0.5 s"
    )
