"""Boundaries and validity of energies: counters, power scopes, mirrored zones, process trees."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.energy.account import Account, Meters, join_accounts
from pytest_llem.energy.estimate import WATTS_PER_BUSY_THREAD, EstimateMeter
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.energy.rapl import UPDATE_S, RaplMeter
from pytest_llem.measurement.accounting import energy
from pytest_llem.measurement.quality_warnings import energy_warnings
from pytest_llem.results.experiment import EngineRecord
from tests.support import nvml
from tests.support.nvml import Script, ScriptedGpu
from tests.support.powercap import Powercap, add
from tests.support.processes import wait_until
from tests.support.warned import texts

GPU = EngineRecord(name="e", device="cuda")


def _warnings(account: Account) -> list[str]:
    found = sorted(energy_warnings(account, {}), key=lambda one: one.rank)
    return texts(found)


# ---- counter and integral ----


class _Given:
    """A meter with a given reading."""

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
    assert account.total.invalid == account.of_boundary("gpu_board").invalid == invalid
    assert energy("energy_j", account.total).invalid == invalid
    assert _warnings(account) == warned


def test_counter_that_does_not_rise_is_contradicted_by_power() -> None:
    account = _account(_device(0.0, 3000.0))
    assert account.total.invalid == "counter_disagrees"
    assert _warnings(account)[0].startswith(
        "energy counter and sampled power disagree on GPU-1: 0 J and 3000 J: invalid"
    )


def test_one_invalid_gpu_makes_the_sum_invalid() -> None:
    fine = replace(_device(500.0, 500.0), device="GPU-2")
    assert _account(fine, _device(100.0, 110.0)).total.invalid == "counter_disagrees"


def test_disagreement_within_sampling_error_is_ignored() -> None:
    account = _account(_device(100.0, 112.0, integral_uncertainty_j=4.1))
    assert account.total.invalid is None
    assert _warnings(account) == []


def test_turns_whose_samples_are_all_late_agree_with_the_counter() -> None:
    """As on an H200: in each of 20 turns of 0.6 s the integral is 9 % below the counter."""
    turn = _device(380.0, 346.0, integral_uncertainty_j=32.0)
    account = join_accounts([_account(turn, seconds=0.6)] * 20)
    assert (account.total.energy_j, account.total.invalid) == (7600.0, None)
    assert _warnings(account) == []


def test_meter_of_unknown_tick_is_checked() -> None:
    account = _account(_device(100.0, 150.0), tick=None)
    assert account.total.invalid == "counter_disagrees"
    assert _warnings(account)[1:] == [
        "meter does not report the tick of nvml_total_energy: it was not checked that the window is long enough"
    ]


# ---- GPUs and modules ----

SECONDS = 1.0


def _gpu(
    name: str, /, gain: float = 1.0, tick_ms: float = 20, module_w: float | None = None, **more: Any
) -> ScriptedGpu:
    known = {"tick_ms": tick_ms, "counter_mj": 5e9, "counter_gain": gain, "name": "NVIDIA H100 80GB HBM3", **more}
    return ScriptedGpu(
        f"GPU-{name}", [(0.0, 300.0)], known, module_power=[] if module_w is None else [(0.0, module_w)]
    )


BOARDS = [
    _gpu("right"),
    _gpu("wrong", gain=0.57),
    _gpu("module", name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1),
    _gpu("board-of-module", name="NVIDIA GH200 480GB", module_w=520.0),
    _gpu("module-by-name", name="NVIDIA GB200", gain=520 / 300),
    _gpu("module-wrong", name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1, gain=0.8),
    _gpu("slow", tick_ms=1000),
    _gpu("slow-module", tick_ms=1000, name="NVIDIA GH200 480GB", module_w=520.0, counts_module=1),
]


def _measured(script: Script) -> tuple[Account, dict[str, str]]:
    meters = Meters.open("nvml", [gpu.uuid for gpu in script.gpus])
    meters.begin()
    time.sleep(SECONDS)
    account = meters.end()
    meters.close()
    return account, meters.refusals


@pytest.fixture(scope="module")
def measured(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DeviceReading]:
    """Return the readings of all GPUs, by name."""
    script = Script(tmp_path_factory.mktemp("boards") / "script", BOARDS)
    script.write()
    account, refusals = nvml.run(nvml.environment(nvml_library, script), _measured, script)
    assert refusals == {}
    by_name = {device.device.removeprefix("GPU-"): device for device in account.devices}
    assert [*by_name] == [gpu.uuid.removeprefix("GPU-") for gpu in BOARDS]
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


def test_module_counter_is_not_checked_against_gpu_power(
    measured: Callable[[str], DeviceReading],
) -> None:
    device = measured("module-by-name")
    assert device.integral_j is None
    assert _warnings(_alone(device)) == [
        "energy counter of GPU-module-by-name could not be checked: "
        "the driver reports the power of the GPU, but not of its module"
    ]


@pytest.mark.parametrize("name", ["slow", "slow-module"])
def test_slow_counter_falls_back_to_sampled_power(measured: Callable[[str], DeviceReading], name: str) -> None:
    """A tick of 1,000 ms used to give null, although power was sampled ten times a second."""
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


def test_few_samples_are_treated_like_few_ticks() -> None:
    sampled = DeviceReading("GPU-1", "gpu_board", 100.0, "sampled", "nvml_power_instant")
    assert _warnings(_account(sampled, seconds=1.0)) == [
        "the window holds 10 samples of power, fewer than 20: raise measurement.min_window_seconds"
    ]


# ---- CPU packages ----

RANGE_UJ = 1_000_000_000

#: Energy that each die's counter adds over the window, in J. If they mirror one counter, it is the first one's.
DIES: Any = {
    "mirrored": ([10.0, 10.0], ["package-0-die-0"], 10.0),
    "counters of their own": ([10.0, 4.0], ["package-0-die-0", "package-0-die-1"], 14.0),
}


@pytest.mark.parametrize("dies", DIES)
@pytest.mark.parametrize("wraps", [False, True])
def test_zones_that_mirror_one_counter_count_once(tmp_path: Path, dies: str, wraps: bool) -> None:
    added, devices, total_j = DIES[dies]
    zones = Powercap(tmp_path / "powercap")
    start = RANGE_UJ - 5_000_000 if wraps else 7_000_000
    counters = [
        zones.zone(f"intel-rapl:{die}", f"package-0-die-{die}", start, range_uj=RANGE_UJ) for die in range(2)
    ]
    memories = [zones.zone(f"intel-rapl:{die}:0", "dram", start, range_uj=RANGE_UJ) for die in range(2)]
    meter = RaplMeter(zones.root)
    meter.open([])
    meter.begin()
    for counter, memory, joules in zip(counters, memories, added, strict=True):
        add(counter, joules, RANGE_UJ)
        add(memory, joules / 10, RANGE_UJ)
    reading = meter.end()
    meter.close()
    packages = [one for one in reading.devices if one.boundary == "cpu_package"]
    assert [one.device for one in packages] == devices
    assert sum(one.energy_j or 0 for one in packages) == pytest.approx(total_j)
    assert sum(one.energy_j or 0 for one in reading.devices) == pytest.approx(1.1 * total_j)


def test_mirror_that_moves_between_two_reads_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One counter is read through two zones at different times, between which it rises."""
    zones = Powercap(tmp_path / "powercap")
    for die in range(3):
        zones.zone(f"intel-rapl:{die}", f"package-1-die-{die}")
    values = itertools.count(5_000_000, 61)
    monkeypatch.setattr("pytest_llem.energy.rapl.Zone.read", lambda zone: next(values))
    meter = RaplMeter(zones.root)
    meter.open([])
    meter.begin()
    [device] = meter.end().devices
    meter.close()
    assert device.device == "package-1-die-0"


def test_packages_of_equal_readings_are_two(tmp_path: Path) -> None:
    zones = Powercap(tmp_path / "powercap")
    counters = [zones.zone(f"intel-rapl:{number}", f"package-{number}") for number in range(2)]
    meter = RaplMeter(zones.root)
    meter.open([])
    meter.begin()
    for counter in counters:
        add(counter, 10.0)
    assert [one.energy_j for one in meter.end().devices] == [10.0, 10.0]
    meter.close()


def test_rapl_reports_its_tick(tmp_path: Path) -> None:
    """Without a tick, a window that is too short would be neither warned of nor rejected."""
    counter = Powercap(tmp_path / "powercap").zone("intel-rapl:0", "package-0")
    meter = RaplMeter(tmp_path / "powercap")
    meter.open([])
    meter.begin()
    add(counter, 10.0)
    reading = meter.end()
    meter.close()
    assert reading.tick_seconds == UPDATE_S
    assert _warnings(_account(*reading.devices, seconds=0.01, tick=reading.tick_seconds)) == [
        "the window holds 10 ticks of the energy counter, fewer than 20: raise measurement.min_window_seconds"
    ]


# ---- processes ----

#: A child that works as soon as it is written to, and reports when it is done.
WORKER = """
import os, sys, time
for line in sys.stdin:
    until = time.process_time() + float(line)
    while time.process_time() < until: pass
    print(flush=True)
"""


class _Worker:
    """A child process, or with *deep* a grandchild."""

    def __init__(self, *, deep: bool = False) -> None:
        command = [sys.executable, "-S", "-c", WORKER]
        if deep:
            command = ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 & wait', "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.work(0.0)

    def work(self, seconds: float) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{seconds}\n".encode())
        self.process.stdin.flush()
        self.process.stdout.readline()

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _is_quiet() -> bool:
    """Return whether no process of an earlier test is still computing."""
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if one.status() == psutil.STATUS_RUNNING:
                return False
    return True


def _estimated_s(during: Callable[[], object], processes: Sequence[int] = ()) -> float | None:
    """Return the CPU time that an estimate counts during a call, in s: of *processes*, or else of this one."""
    wait_until(_is_quiet)
    meter = EstimateMeter()
    meter.set_processes(processes)
    meter.open([])
    meter.begin()
    during()
    [device] = meter.end().devices
    meter.close()
    if device.energy_j is None:
        assert device.method == "unavailable"
        assert device.reason is not None
        return None
    assert device.method == "estimated"
    return device.energy_j / WATTS_PER_BUSY_THREAD


@pytest.mark.parametrize("deep", [False, True])
def test_estimate_counts_running_descendants(deep: bool) -> None:
    """0.2 s used to count as 0.00042 J in a worker process, and as 0.700 J in the engine's own."""
    worker = _Worker(deep=deep)
    found = _estimated_s(lambda: worker.work(0.2))
    worker.end()
    assert found is not None
    assert 0.18 <= found < 0.4


def test_estimate_of_a_short_window_is_not_zero() -> None:
    """CPU times in clock ticks of 10 ms made it 0 J for a server in a short window."""
    worker = _Worker()
    found = [_estimated_s(lambda: worker.work(0.002), [worker.process.pid]) for _ in range(5)]
    worker.end()
    assert all(seconds is not None and seconds >= 0.002 for seconds in found)


def test_estimate_excludes_cpu_time_before_the_window() -> None:
    """A child that ended in the window used to add all its CPU time: 1.055 J for 3 s before it."""
    worker = _Worker()
    worker.work(0.3)

    def work_and_end() -> None:
        worker.work(0.1)
        worker.end()

    found = _estimated_s(work_and_end)
    assert found is not None
    assert 0.08 <= found < 0.28


def test_estimate_counts_child_that_starts_and_ends_within() -> None:
    def whole_life() -> None:
        worker = _Worker()
        worker.work(0.2)
        worker.end()

    found = _estimated_s(whole_life)
    assert found is not None
    assert 0.2 <= found < 0.4


def test_estimate_is_unavailable_if_a_child_is_not_waited_for() -> None:
    worker = _Worker()
    worker.work(0.1)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then discards the child's CPU time
    try:
        assert _estimated_s(worker.end) is None
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _orphan(in_session: bool) -> float | None:
    """Return the estimate for a grandchild that is orphaned in the window and works on."""
    if in_session:
        os.setsid()
    worker = _Worker(deep=True)

    def lose_parent() -> None:
        worker.process.kill()
        worker.process.wait()
        worker.work(0.2)

    found = _estimated_s(lose_parent)
    assert worker.process.stdin
    worker.process.stdin.close()
    return found


@pytest.mark.parametrize(("in_session", "counted"), [(True, pytest.approx(0.2, abs=0.06)), (False, None)])
def test_estimate_of_orphaned_process(in_session: bool, counted: Any) -> None:
    """In an experiment's session an orphan is known to belong to it; elsewhere it has left the tree."""
    assert nvml.run(os.environ, _orphan, in_session) == counted
