"""CPU energy from RAPL, with powercap folders like those of real machines."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem.energy import rapl
from pytest_llem.energy.account import Meters
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.rapl import RaplMeter
from tests.support.narrow import not_none
from tests.support.powercap import RANGE_UJ, Powercap, add


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


class Clock:
    """The meter's clock, which only the test advances, and the event that its thread waits on.

    Attributes:
        now: In s.
        on_move: Called as it has moved.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.on_move: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._due: float | None = None
        self._is_set = False

    def advance(self, seconds: float) -> None:
        """Advance the clock; all reads that are due have been done on return."""
        target = self.now + seconds
        with self._changed:
            while True:
                assert self._changed.wait_for(lambda: self._due is not None, 30)
                due = not_none(self._due)
                self.now = min(due, target)
                self.on_move()
                if due > target:
                    return
                self._wake()

    def _wake(self) -> None:
        self._due = None
        self._changed.notify_all()

    # the part of threading.Event that the meter's thread uses

    def wait(self, timeout: float) -> bool:
        with self._changed:
            self._due = math.inf if self._is_set else self.now + timeout
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._due is None or self._is_set, 60)
            return self._is_set

    def set(self) -> None:
        with self._changed:
            self._is_set = True
            self._wake()

    def clear(self) -> None:
        self._is_set, self._due = False, None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    names = {name: getattr(threading, name) for name in ("Lock", "Thread", "TIMEOUT_MAX")}
    monkeypatch.setattr(rapl, "threading", SimpleNamespace(**names, Event=lambda: clock))
    monkeypatch.setattr(rapl, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def meter(powercap: Powercap, clock: Clock) -> Iterator[RaplMeter]:
    meter = RaplMeter(powercap.root)
    yield meter
    meter.close()


def _by_device(reading: Any) -> Any:
    return {device.device: device for device in reading.devices}


def _window(meter: Any, clock: Any, seconds: Any, change: Any) -> Any:
    """Return the devices of a window of the given seconds, within which *change* is called."""
    meter.open([])
    meter.begin()
    change()
    clock.advance(seconds)
    reading = meter.end()
    meter.close()
    assert reading.seconds == seconds
    assert {device.seconds for device in reading.devices} <= {seconds, None}
    return _by_device(reading)


def test_packages_and_memory_of_two_sockets(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    # Folder numbers differ from package numbers, because psys has a folder too.
    package_0 = powercap.zone("intel-rapl:0", "package-0")
    core_0 = powercap.zone("intel-rapl:0:0", "core")
    dram_0 = powercap.zone("intel-rapl:0:1", "dram", range_uj=65_712_999_613)
    psys = powercap.zone("intel-rapl:1", "psys")
    package_1 = powercap.zone("intel-rapl:2", "package-1")
    dram_1 = powercap.zone("intel-rapl:2:0", "dram", range_uj=65_712_999_613)
    (powercap.root / "intel-rapl").mkdir()  # the control type, which is not a zone
    again = powercap.zone("intel-rapl-mmio:0", "package-0")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    meters = Meters.open("rapl", [])
    meters.begin()
    for counter, joules in ((package_0, 40), (package_1, 30), (dram_0, 4), (dram_1, 3.000001)):
        add(counter, joules)
    for counter in (core_0, psys, again):
        add(counter, 1000)
    account = meters.end()
    meters.close()
    assert {device.device: (device.energy_j, device.boundary, device.source) for device in account.devices} == {
        "package-0": (40, "cpu_package", "rapl_package"),
        "dram-0": (4, "dram", "rapl_dram"),
        "package-1": (30, "cpu_package", "rapl_package"),
        "dram-1": (3.000001, "dram", "rapl_dram"),
    }
    assert {device.method for device in account.devices} == {"measured"}
    total = account.total
    assert total.energy_j == pytest.approx(77.000001)
    assert (total.method, total.boundary, total.source) == (
        "measured",
        "cpu_package+dram",
        "rapl_package+rapl_dram",
    )
    assert account.of_boundary("cpu_package").energy_j == 70
    assert account.of_boundary("dram").energy_j == pytest.approx(7.000001)
    assert account.tick_seconds == 0.001


def test_two_dies_in_one_package(powercap: Powercap, meter: RaplMeter, clock: Clock) -> None:
    for die in (0, 1):
        powercap.zone(f"intel-rapl:{die}", f"package-0-die-{die}", energy_uj=die)
        powercap.zone(f"intel-rapl:{die}:0", "dram", energy_uj=die)
    meter.open([])
    meter.begin()
    assert [device.device for device in meter.end().devices] == [
        "package-0-die-0",
        "dram-0-die-0",
        "package-0-die-1",
        "dram-0-die-1",
    ]


def test_a_counter_that_overflows_once_is_read_right(powercap: Powercap, meter: RaplMeter, clock: Clock) -> None:
    package = powercap.zone("intel-rapl:0", "package-0", energy_uj=RANGE_UJ - 100_000_000)
    devices = _window(meter, clock, 10.0, lambda: add(package, 1100))
    assert int(package.read_text()) == 1_000_000_000
    assert devices["package-0"].energy_j == pytest.approx(1100)


def test_windows_follow_each_other(powercap: Powercap, meter: RaplMeter, clock: Clock) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    meter.open([])
    for joules in (5, 7):
        meter.begin()
        add(package, joules)
        assert meter.end().devices[0].energy_j == joules


def _assert_none(device: Any, reason: Any) -> None:
    assert (device.energy_j, device.method) == (None, "unavailable")
    assert device.reason.startswith("RAPL: ")
    assert reason in device.reason


def test_counter_not_read_for_too_long_may_have_overflowed_twice(
    powercap: Powercap, meter: RaplMeter, clock: Clock
) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    dram = powercap.zone("intel-rapl:0:0", "dram")

    def the_thread_is_kept_from_running() -> None:
        clock.now += 300.0

    meter.open([])
    meter.begin()
    add(package, 9000)
    add(dram, 90)
    the_thread_is_kept_from_running()
    devices = _by_device(meter.end())
    reason = "it was not read for 300 s, in which a counter of 262143 J may overflow more than once"
    _assert_none(devices["package-0"], reason)
    assert devices["dram-0"].energy_j == 90, "which takes longer to go round"
    meter.begin()
    add(package, 5)
    assert meter.end().devices[0].energy_j == 5, "and the next window is whole"


def test_a_counter_that_falls_too_far_was_reset(powercap: Powercap, meter: RaplMeter, clock: Clock) -> None:
    package = powercap.zone("intel-rapl:0", "package-0", energy_uj=100_000_000_000)
    devices = _window(meter, clock, 10.0, lambda: package.write_text("5000000"))
    _assert_none(
        devices["package-0"],
        "the counter was reset, or a value was wrong (it went from 100000000000 to 5000000 µJ in 10.0 s)",
    )


def test_counter_that_stands_still_is_unavailable_not_zero(
    powercap: Powercap, meter: RaplMeter, clock: Clock
) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    powercap.zone("intel-rapl:0:0", "dram", energy_uj=0)
    devices = _window(meter, clock, 10.0, lambda: add(package, 500))
    assert devices["package-0"].energy_j == 500
    _assert_none(devices["dram-0"], "the counter did not rise (from 0 µJ)")


def test_counter_that_vanishes_in_the_window_is_unavailable(
    powercap: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    dram = powercap.zone("intel-rapl:0:0", "dram")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    meters = Meters.open("rapl", [])
    meters.begin()
    add(package, 20)
    dram.unlink()
    account = meters.end()
    meters.close()
    assert account.of_boundary("cpu_package").energy_j == 20
    _assert_none(account.devices[1], "No such file")
    total = account.total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert "dram-0: RAPL: " in not_none(total.reason)


def test_counter_that_is_not_a_number_is_unavailable(powercap: Powercap, meter: RaplMeter, clock: Clock) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    devices = _window(meter, clock, 10.0, lambda: package.write_text("\n"))
    _assert_none(devices["package-0"], "invalid literal")
    with pytest.raises(MeterUnavailableError, match="invalid literal"):
        meter.open([])


@pytest.mark.parametrize("span", [0, -1])
def test_counter_without_a_range_is_refused(powercap: Powercap, meter: RaplMeter, span: int) -> None:
    powercap.zone("intel-rapl:0", "package-0", range_uj=span)
    with pytest.raises(MeterUnavailableError, match=f"a counter with a range of {span} µJ"):
        meter.open([])


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make reads of the given counters fail. chmod would not: root may run this test."""
    denied: set[Path] = set()
    read_text = Path.read_text

    def read(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path in denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    return denied.update


@pytest.mark.parametrize("denied", [0, 1, 2, 3])
def test_counter_denied_within_a_window_leaves_the_others(
    powercap: Powercap, meter: RaplMeter, clock: Clock, deny: Callable[..., Any], denied: int
) -> None:
    counters = _two_sockets(powercap)

    def change() -> None:
        for counter in counters:
            add(counter, 25)
        deny([counters[denied]])

    devices = list(_window(meter, clock, 10.0, change).values())
    _assert_none(devices.pop(denied), "Permission denied")
    assert [device.energy_j for device in devices] == [25, 25, 25]


def test_failure_within_a_window_counts_even_if_it_ends(
    powercap: Powercap, meter: RaplMeter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rapl, "MAX_WATTS", {"cpu_package": 1e6, "dram": 300.0})
    package = powercap.zone("intel-rapl:0", "package-0")
    text = package.read_text()
    meter.open([])
    meter.begin()
    package.write_text("?")
    clock.advance(1.0)
    package.write_text(text)
    add(package, 10)
    _assert_none(meter.end().devices[0], "invalid literal")


# ---- energies compared with the script's exact integral ----


def _two_sockets(powercap: Any, starts: Any = (1_000_000,) * 4, spans: Any = (RANGE_UJ,) * 4) -> Any:
    folders = ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "intel-rapl:1:0")
    names = ("package-0", "dram", "package-1", "dram")
    zones = zip(folders, names, starts, spans, strict=True)
    return [powercap.zone(folder, name, start, span) for folder, name, start, span in zones]


#: Points of power in W by time in s since the window's start, with linear interpolation.
SCRIPTS = {
    "constant": [(0, 180.0)],
    "step": [(0, 60.0), (3, 60.0), (3, 350.0), (5, 350.0), (5, 60.0)],
    "ramp": [(0, 40.0), (20, 400.0)],
    "pulses": [(at, watts) for k in range(40) for at, watts in ((k / 2, 300.0), (k / 2 + 0.1, 30.0))],
    "nearly idle": [(0, 0.4)],
    "all it can": [(0, 999.0)],
}


def _integral(script: Any, until: Any) -> Any:
    points = [point for point in script if point[0] < until]
    last_at, last = points[-1]
    following = [point for point in script if point[0] >= until]
    end = last + (following[0][1] - last) * (until - last_at) / (following[0][0] - last_at) if following else last
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise([*points, (until, end)]))


#: Ranges that overflow after minutes, many times in every window here, and in between.
RANGES = [RANGE_UJ, 10_000_000_000, 1_000_000_000]


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_script_is_right_to_half_a_percent(
    powercap: Powercap, meter: RaplMeter, clock: Clock, script: list[Any], span: int
) -> None:
    seconds = 7.25
    shares = [1.0, 0.25, 0.7, 0.1]  # shares of the script's power: two packages, and the memory of each
    starts = [span - 1_000_000, 5_000_000, span // 2, span - 100_000]
    counters = _two_sockets(powercap, starts, [span] * 4)
    began = clock.now

    def move() -> None:
        energy_uj = _integral(script, clock.now - began) * 1e6 if clock.now > began else 0
        for counter, start, share in zip(counters, starts, shares, strict=True):
            counter.write_text(f"{int(start + share * energy_uj) % span}\n")

    clock.on_move = move
    devices = list(_window(meter, clock, seconds, lambda: None).values())
    exact = _integral(script, seconds)
    assert [device.energy_j for device in devices] == pytest.approx([share * exact for share in shares], rel=0.005)
    for device in devices:
        assert device.uncertainty_j == pytest.approx(device.energy_j / seconds * 0.001 * math.sqrt(1 / 6))


def test_counter_overflows_many_times_in_a_window_of_hours(
    powercap: Powercap, meter: RaplMeter, clock: Clock
) -> None:
    counters = _two_sockets(powercap)

    def move() -> None:
        for counter in counters:
            counter.write_text(f"{int(1e6 + 250e6 * (clock.now - 100)) % RANGE_UJ}\n")

    clock.on_move = move
    devices = _window(meter, clock, 7200.0, lambda: None)
    assert 5 * RANGE_UJ / 1e6 < 7200 * 250
    assert [device.energy_j for device in devices.values()] == pytest.approx([7200 * 250] * 4)


@pytest.mark.slow
def test_thread_reads_in_real_time_and_ends(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter could overflow within a second, and does in less than two."""
    monkeypatch.setattr(rapl, "MAX_WATTS", {"cpu_package": 100.0, "dram": 100.0})
    counter = powercap.zone("intel-rapl:0", "package-0", range_uj=100_000_000)
    read, seen = Path.read_text, []

    def read_text(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path != counter:
            return read(path, *args, **kwargs)
        seen.append(int(60 * time.monotonic() * 1e6))
        return f"{seen[-1] % 100_000_000}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    meter = RaplMeter(powercap.root)
    meter.open([])
    meter.begin()
    first = seen[-1]
    while seen[-1] < first + 150_000_000:  # one and a half times the range
        time.sleep(0.01)
    device = meter.end().devices[0]
    assert len(seen) >= 5
    assert device.energy_j == pytest.approx((seen[-1] - first) / 1e6)
    assert device.energy_j == pytest.approx(60 * not_none(device.seconds), rel=0.005)
    meter.close()
    assert "llem-rapl" not in [thread.name for thread in threading.enumerate()]


def test_a_counter_that_may_not_be_read_is_the_reason(
    powercap: Powercap, meter: RaplMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = powercap.zone("intel-rapl:0", "package-0")
    read_text = Path.read_text

    def denied(path: Any, *args: Any, **kwargs: Any) -> Any:  # chmod would not deny root, who may run this test
        if path.name == "energy_uj":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(MeterUnavailableError, match=r"permission denied for .*energy_uj.*only root") as raised:
        meter.open([])
    assert str(package) in str(raised.value)
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    assert "permission denied" in Meters.open("rapl", []).refusals["rapl"]


def test_without_a_powercap_folder_there_is_no_meter(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailableError, match=r"no package counter under .*nothing"):
        RaplMeter(tmp_path / "nothing").open([])


def test_without_a_package_counter_there_is_no_meter(powercap: Powercap, meter: RaplMeter) -> None:
    powercap.zone("intel-rapl:0", "psys")
    with pytest.raises(MeterUnavailableError, match="no package counter"):
        meter.open([])


def test_the_powercap_folder_is_that_of_the_variable_or_the_system(
    powercap: Powercap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    powercap.zone("intel-rapl:0", "package-0")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    RaplMeter().open([])
    with pytest.raises(MeterUnavailableError):
        RaplMeter(tmp_path / "nothing").open([])
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", "")
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "of the system")
    with pytest.raises(MeterUnavailableError, match="of the system"):
        RaplMeter().open([])
