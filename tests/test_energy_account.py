"""The meters of an experiment: which are opened, and how their readings are summed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import registry
from pytest_llem.energy.account import Meters
from pytest_llem.energy.estimate import WATTS_PER_BUSY_THREAD, EstimateMeter
from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading
from tests.support.narrow import not_none
from tests.support.powercap import Powercap, add

GPU = "GPU-00000000-0000-0000-0000-000000000000"


@pytest.fixture(autouse=True)
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Powercap:
    """Replace the machine's powercap folder by an empty one."""
    folder = Powercap(tmp_path / "powercap")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(folder.root))
    return folder


@dataclass
class Fixed:
    """A meter with given results for its steps; an exception as a result is raised."""

    reading: Reading = field(default_factory=lambda: Reading((), 1.0))
    fails: dict[str, Exception] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    name: str = ""

    def _step(self, name: Any) -> None:
        self.log.append(self.name + name)
        if name in self.fails:
            raise self.fails[name]

    def open(self, gpus: Any) -> None:
        self._step("open")

    def begin(self) -> None:
        self._step("begin")

    def end(self) -> Any:
        self._step("end")
        return self.reading

    def close(self) -> None:
        self._step("close")


def _reading(*devices: Any) -> Any:
    return Reading(tuple(DeviceReading(*device) for device in devices), 2.0)


BOARD = ("GPU-1", "gpu_board", 100.0, "measured", "nvml_total_energy")
PACKAGE = ("package-0", "cpu_package", 10.0, "measured", "rapl_package")


def _work(seconds: float = 0.02) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def _measure(meters: Any) -> Any:
    meters.begin()
    _work()
    account = meters.end()
    meters.close()
    return account


# ---- selection of meters ----


def test_auto_on_a_cpu_reads_rapl(powercap: Powercap) -> None:
    counter = powercap.zone("intel-rapl:0", "package-0")
    meters = Meters.open("auto", [])
    meters.begin()
    add(counter, 12.5)
    account = meters.end()
    meters.close()
    assert (account.total.energy_j, account.total.method) == (12.5, "measured")
    assert (account.total.boundary, account.total.source) == ("cpu_package", "rapl_package")
    assert [device.device for device in account.devices] == ["package-0"], "and no estimate beside it"
    assert meters.refusals == {}


def test_auto_without_rapl_estimates_with_a_reason() -> None:
    meters = Meters.open("auto", [])
    assert "no package counter" in meters.refusals["rapl"]
    account = _measure(meters)
    total = account.total
    assert (total.method, total.boundary, total.source) == ("estimated", "cpu_package", "cpu_time_model")
    assert not_none(total.energy_j) >= 0.02 * WATTS_PER_BUSY_THREAD
    assert account.of_boundary("cpu_package") == total
    gpu = account.of_boundary("gpu_board")
    assert (gpu.energy_j, gpu.method, gpu.boundary) == (None, "unavailable", "gpu_board")


def test_the_estimate_counts_this_process_and_children_it_waited_for() -> None:
    busy = "import time\nwhile time.process_time() < 0.1: pass"
    meter = EstimateMeter()
    meter.open([])
    meter.begin()
    _work(0.05)
    subprocess.run([sys.executable, "-c", busy], check=True)
    reading = meter.end()
    meter.close()
    (device,) = reading.devices
    assert device.device == "process"
    assert not_none(device.energy_j) >= (0.05 + 0.1) * WATTS_PER_BUSY_THREAD
    assert reading.seconds > 0


def test_estimate_refuses_gpus() -> None:
    with pytest.raises(MeterUnavailableError, match="CPUs only"):
        EstimateMeter().open([GPU])
    meters = Meters.open("estimate", [GPU])
    assert set(meters.refusals) == {"estimate"}
    total = _measure(meters).total
    assert (total.energy_j, total.method) == (None, "unavailable")


def test_nvml_without_a_gpu_is_refused() -> None:
    meters = Meters.open("nvml", [])
    assert meters.refusals == {"nvml": "what is measured runs on no NVIDIA GPU"}


def test_backend_null_switches_metering_off() -> None:
    account = _measure(Meters.open(None, [GPU]))
    assert account.devices == ()
    assert account.seconds is None
    assert (account.total.energy_j, account.total.method) == (None, "unavailable")
    assert account.total.reason == "energy: switched off by energy.backend"


def test_an_unknown_meter_is_refused() -> None:
    total = _measure(Meters.open("wattmetre", [])).total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert total.reason.startswith("wattmetre: 'wattmetre' is not installed (there are: ")
    assert "rapl" in total.reason


# ---- a third-party meter ----


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Install a distribution with a meter ``plug`` whose module has the given source."""

    def install(source: Any) -> None:
        site = tmp_path / "site"
        info = site / "llem_plug-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llem-plug\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.METER_GROUP}]\nplug = llem_plug:PlugMeter\n")
        (site / "llem_plug.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(site)
        monkeypatch.setitem(sys.modules, "llem_plug", None)  # monkeypatch then removes it again
        del sys.modules["llem_plug"]

    return install


def test_meter_is_found_by_its_entry_point(outside: Callable[..., Any]) -> None:
    outside(
        """
        from pytest_llem.energy.protocol import DeviceReading, Reading

        class PlugMeter:
            def open(self, gpus):
                self.gpus = list(gpus)

            def begin(self):
                pass

            def end(self):
                device = DeviceReading("plug-1", "wall", 250.0, "sampled", "plug_power")
                return Reading((device,), 2.5, 1.0)

            def close(self):
                pass
        """
    )
    assert "plug" in registry.installed(registry.METER_GROUP)
    account = _measure(Meters.open("plug", [GPU]))
    assert (account.total.energy_j, account.total.method) == (250.0, "sampled")
    assert (account.total.boundary, account.total.source) == ("wall", "plug_power")
    assert (account.seconds, account.tick_seconds) == (2.5, 1.0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param(
            "import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'", id="import"
        ),
        pytest.param("", "there is no 'PlugMeter' in *llem_plug.py", id="attribute"),
        pytest.param(
            """
            class PlugMeter:
                def open(self, gpus):
                    raise OSError("no plug at /dev/ttyUSB0")
            """,
            "OSError: no plug at /dev/ttyUSB0",
            id="open",
        ),
        pytest.param(
            """
            class PlugMeter:
                def open(self, gpus):
                    {}["PLUG_PORT"]
            """,
            "KeyError: 'PLUG_PORT'",
            id="lookup",
        ),
        pytest.param('{}["PLUG_PORT"]', "llem_plug raises KeyError: 'PLUG_PORT'", id="module"),
    ],
)
def test_third_party_meter_that_does_not_open_is_refused(
    outside: Callable[..., Any], source: str, reason: str
) -> None:
    outside(source)
    meters = Meters.open("plug", [])
    assert fnmatch(meters.refusals["plug"], reason)
    assert _measure(meters).total.reason == f"plug: {meters.refusals['plug']}"


# ---- sums ----


@pytest.mark.parametrize(
    ("methods", "weakest"),
    [
        (["measured", "measured"], "measured"),
        (["measured", "sampled"], "sampled"),
        (["attributed", "sampled"], "attributed"),
        (["estimated", "measured", "attributed"], "estimated"),
    ],
)
def test_sum_has_the_weakest_method_of_its_parts(methods: list[str], weakest: str) -> None:
    parts = [(f"part-{i}", "wall", 1.5, method, "plug_power") for i, method in enumerate(methods)]
    account = _measure(Meters({"fixed": Fixed(_reading(*parts))}))
    assert account.total.method == weakest
    assert account.total.energy_j == 1.5 * len(methods)
    assert account.of_boundary("wall") == account.total


def test_boundary_of_a_device_with_a_plus_is_refused() -> None:
    with pytest.raises(ValueError, match=r"boundary must have no \+ \(got 'gpu_board\+fans'\)"):
        DeviceReading("GPU-1", "gpu_board+fans", 1.0, "measured", "plug_power")


def test_sum_with_a_missing_part_is_unavailable() -> None:
    lost = ("GPU-2", "gpu_board", None, "unavailable", "nvml_total_energy", "NVML: GPU is lost")
    account = _measure(Meters({"fixed": Fixed(_reading(BOARD, lost))}))
    total = account.total
    assert (total.energy_j, total.method, total.boundary) == (None, "unavailable", "gpu_board")
    assert total.reason == "GPU-2: NVML: GPU is lost"
    assert account.of_boundary("gpu_board") == total


def test_sum_of_no_parts_is_unavailable() -> None:
    total = _measure(Meters({"fixed": Fixed()})).total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert total.reason == "the meter read no device"


def test_without_any_meter_energy_is_unavailable() -> None:
    total = _measure(Meters()).total
    assert (total.energy_j, total.method, total.reason) == (None, "unavailable", "there is no meter")


def test_total_is_of_the_first_meter_which_begins_and_ends_first() -> None:
    log: list[str] = []
    board, cpu = Fixed(_reading(BOARD), name="board ", log=log), Fixed(_reading(PACKAGE), name="cpu ", log=log)
    meters = Meters({"board": board, "cpu": cpu})
    account = _measure(meters)
    assert (account.total.energy_j, account.total.boundary) == (100.0, "gpu_board")
    assert account.of_boundary("cpu_package").energy_j == 10.0
    assert [device.device for device in account.devices] == ["GPU-1", "package-0"]
    assert log == ["board begin", "cpu begin", "board end", "cpu end", "cpu close", "board close"]
    assert meters.meters == {}


# ---- meters that fail ----


@pytest.mark.parametrize("step", ["begin", "end"])
def test_first_meter_that_fails_leaves_no_total(step: str) -> None:
    failing = Fixed(_reading(BOARD), fails={step: RuntimeError("out of order")})
    meters = Meters({"board": failing, "cpu": Fixed(_reading(PACKAGE))})
    account = _measure(meters)
    assert (account.total.energy_j, account.total.method) == (None, "unavailable"), (
        "and not the CPU's in its place"
    )
    assert account.total.reason == "board: RuntimeError: out of order"
    assert account.seconds is None
    assert account.of_boundary("cpu_package").energy_j == 10.0
    assert failing.log[-1] == "close"
    assert ("end" in failing.log) is (step == "end"), "a window that did not begin does not end"


def test_other_meter_that_fails_leaves_the_total() -> None:
    meters = Meters({"board": Fixed(_reading(BOARD)), "cpu": Fixed(fails={"end": OSError("gone")})})
    account = _measure(meters)
    assert account.total.energy_j == 100.0
    assert account.of_boundary("cpu_package").energy_j is None
    assert meters.refusals == {"cpu": "OSError: gone"}


def test_window_after_a_failed_one_is_complete() -> None:
    meter = Fixed(_reading(BOARD), fails={"begin": OSError("not now")})
    meters = Meters({"board": meter})
    meters.begin()
    assert meters.end().total.energy_j is None
    meter.fails.clear()
    assert _measure(meters).total.energy_j == 100.0


def test_every_meter_is_closed() -> None:
    first, second = (Fixed(fails={"close": OSError("stuck")}) for _ in range(2))
    Meters({"first": first, "second": second}).close()
    assert (first.log, second.log) == (["close"], ["close"])
