"""CPU energy from RAPL, over powercap folders like those of real machines."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_llem.energy import rapl
from pytest_llem.energy.account import Meters
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.rapl import RaplMeter
from tests.support.powercap import RANGE_UJ, Powercap, add


@pytest.fixture
def powercap(tmp_path):
    return Powercap(tmp_path / "powercap")


@pytest.fixture
def clock(monkeypatch):
    """Return a clock of the meter's that moves only when told to, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(rapl, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def meter(powercap):
    return RaplMeter(powercap.root)


def _by_device(reading):
    return {device.device: device for device in reading.devices}


def _window(meter, clock, seconds, change):
    """Return the devices of a window of so many seconds in which *change* happens."""
    meter.open([])
    meter.begin()
    change()
    clock[0] += seconds
    reading = meter.end()
    meter.close()
    assert reading.seconds == seconds
    return _by_device(reading)


def test_packages_and_memory_of_two_sockets(powercap, monkeypatch):
    # The folders' numbers are not the packages': psys has one of them too.
    package_0 = powercap.zone("intel-rapl:0", "package-0")
    core_0 = powercap.zone("intel-rapl:0:0", "core")
    dram_0 = powercap.zone("intel-rapl:0:1", "dram", range_uj=65_712_999_613)
    psys = powercap.zone("intel-rapl:1", "psys")
    package_1 = powercap.zone("intel-rapl:2", "package-1")
    dram_1 = powercap.zone("intel-rapl:2:0", "dram", range_uj=65_712_999_613)
    (powercap.root / "intel-rapl").mkdir()  # the control type, a zone of nothing
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
    assert account.over("cpu_package").energy_j == 70
    assert account.over("dram").energy_j == pytest.approx(7.000001)
    assert account.tick_seconds is None


def test_two_dies_in_one_package(powercap, meter, clock):
    for die in (0, 1):
        powercap.zone(f"intel-rapl:{die}", f"package-0-die-{die}")
        powercap.zone(f"intel-rapl:{die}:0", "dram")
    meter.open([])
    meter.begin()
    assert [device.device for device in meter.end().devices] == [
        "package-0-die-0",
        "dram-0-die-0",
        "package-0-die-1",
        "dram-0-die-1",
    ]


def test_a_counter_goes_round(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0", energy_uj=RANGE_UJ - 100_000_000)
    devices = _window(meter, clock, 10.0, lambda: add(package, 1100))
    assert int(package.read_text()) == 1_000_000_000
    assert devices["package-0"].energy_j == pytest.approx(1100)


def test_windows_follow_each_other(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0")
    meter.open([])
    for joules in (5, 7):
        meter.begin()
        add(package, joules)
        assert meter.end().devices[0].energy_j == joules


def _assert_none(device, reason):
    assert (device.energy_j, device.method) == (None, "unavailable")
    assert device.reason.startswith("RAPL: ")
    assert reason in device.reason


def test_too_long_a_window_may_hold_two_rounds(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0")
    powercap.zone("intel-rapl:0:0", "dram")
    devices = _window(meter, clock, 300.0, lambda: add(package, 9000))
    _assert_none(devices["package-0"], "300 s may hold more than one round of a counter of 262143 J")


def test_a_counter_that_falls_too_far_was_reset(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0", energy_uj=100_000_000_000)
    devices = _window(meter, clock, 10.0, lambda: package.write_text("5000000"))
    _assert_none(devices["package-0"], "the counter was reset (it fell from 100000000000 to 5000000 µJ in 10.0 s)")


def test_a_counter_that_stands_still_is_no_zero(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0")
    powercap.zone("intel-rapl:0:0", "dram", energy_uj=0)
    devices = _window(meter, clock, 10.0, lambda: add(package, 500))
    assert devices["package-0"].energy_j == 500
    _assert_none(devices["dram-0"], "the counter did not rise (from 0 µJ)")


def test_a_counter_that_vanishes_in_the_window(powercap, monkeypatch):
    package = powercap.zone("intel-rapl:0", "package-0")
    dram = powercap.zone("intel-rapl:0:0", "dram")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    meters = Meters.open("rapl", [])
    meters.begin()
    add(package, 20)
    dram.unlink()
    account = meters.end()
    meters.close()
    assert account.over("cpu_package").energy_j == 20
    _assert_none(account.devices[1], "No such file")
    total = account.total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert "dram-0: RAPL: " in total.reason


def test_a_counter_that_is_no_number(powercap, meter, clock):
    package = powercap.zone("intel-rapl:0", "package-0")
    devices = _window(meter, clock, 10.0, lambda: package.write_text("\n"))
    _assert_none(devices["package-0"], "invalid literal")
    with pytest.raises(MeterUnavailableError, match="RAPL: invalid literal"):
        meter.open([])


def test_permission_denied(powercap, meter, monkeypatch):
    package = powercap.zone("intel-rapl:0", "package-0")
    read_text = Path.read_text

    def denied(path, *args, **kwargs):  # root, who may run this, reads what chmod forbids
        if path.name == "energy_uj":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(MeterUnavailableError, match=r"permission denied for .*energy_uj.*only root") as raised:
        meter.open([])
    assert str(package) in str(raised.value)
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    assert "permission denied" in Meters.open("rapl", []).refusals["rapl"]


def test_no_folder(tmp_path):
    with pytest.raises(MeterUnavailableError, match=r"no package counter under .*nothing"):
        RaplMeter(tmp_path / "nothing").open([])


def test_no_package(powercap, meter):
    powercap.zone("intel-rapl:0", "psys")
    with pytest.raises(MeterUnavailableError, match="no package counter"):
        meter.open([])


def test_where_it_looks(powercap, tmp_path, monkeypatch):
    powercap.zone("intel-rapl:0", "package-0")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(powercap.root))
    RaplMeter().open([])
    with pytest.raises(MeterUnavailableError):
        RaplMeter(tmp_path / "nothing").open([])
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", "")
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "of the system")
    with pytest.raises(MeterUnavailableError, match="of the system"):
        RaplMeter().open([])
