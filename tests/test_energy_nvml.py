"""GPU energy with the real nvidia-ml-py, in real processes, on scripted GPUs of exactly known energy."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from pytest_llem.energy import ticks
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.nvml import NvmlMeter, _skew, _Span
from pytest_llem.energy.protocol import MeterUnavailableError, Reading
from pytest_llem.hardware.environment import environment as gpu_environment
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import PowerSource, averages_power, power_sources, power_w
from pytest_llem.measurement.quality_warnings import energy_warnings
from pytest_llem.results.experiment import EngineRecord
from tests.support import nvml
from tests.support.marks import slow
from tests.support.narrow import not_none
from tests.support.nvml import Ramp, Script, ScriptedGpu
from tests.support.powercap import Powercap, add

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"
GPU = EngineRecord(name="e", device="cuda")
WORK_S = 1.05  # ends between two ticks


@pytest.fixture
def run(nvml_library: Path, tmp_path: Path) -> Callable[..., Any]:
    """Call a function in a new process with scripted GPUs; the script is its first argument."""

    def call(function: Callable[..., Any], *gpus: ScriptedGpu, args: tuple[Any, ...] = (), **script: Any) -> Any:
        written = Script(tmp_path / "script", list(gpus), **script)
        written.write()
        env = nvml.environment(nvml_library, written) | {"LLEM_POWERCAP_ROOT": str(tmp_path / "powercap")}
        return nvml.run(env, function, written, *args)

    return call


def _gpu(uuid: str = A, watts: float = 300.0, **more: str | float) -> ScriptedGpu:
    return ScriptedGpu(uuid, [(0.0, watts)], {"tick_ms": 20, "counter_mj": 5_000_000_000, **more})


#: Power of a GPU over a window: points in W, each at a share of the window.
COURSES: dict[str, list[tuple[float, float] | Ramp]] = {
    "constant": [],
    "step": [(0.5, 100.0)],
    "steps": [(0.2, 650.0), (0.4, 90.0), (0.6, 650.0), (0.8, 90.0)],
    "ramp": [(0.1, 200.0), Ramp(0.9, 700.0)],
    "triangle": [(0.0, 100.0), Ramp(0.5, 600.0), Ramp(1.0, 100.0)],
}


@dataclass(frozen=True)
class Seen:
    """A reading, with the values to check it against.

    Attributes:
        reading: What the meter gave.
        gpus: As they were in the end.
        spans: For each GPU that counts, from which of its ticks to which other the window has to go.
        within: Between which instants the whole window lies, in s since the start.
        unseen_s: The longest time between two looks at a counter while ticks were probed.
        users: Of NVML, once the meter was closed.
    """

    reading: Reading
    gpus: list[ScriptedGpu]
    spans: dict[str, tuple[float, float]]
    within: tuple[float, float]
    unseen_s: float
    users: int


def _watch(script: Script, seconds: float, courses: dict[str, str]) -> Seen:
    """Measure all GPUs over a window in which each has its scripted power."""
    uuids = [gpu.uuid for gpu in script.gpus]
    meter = NvmlMeter()
    meter.open(uuids)
    probed = [[look.at for look in script.looks(0.0, math.inf, uuid)] for uuid in uuids]
    time.sleep(0.033)  # the probe ended at a tick
    before = time.monotonic()
    meter.begin()
    begun = time.monotonic()
    now = script.now() + 0.01
    for gpu in script.gpus:
        points = COURSES[courses.get(gpu.uuid, "constant")]
        for point in points:
            kind = Ramp if isinstance(point, Ramp) else lambda *plain: plain
            gpu.power.append(kind(now + point[0] * seconds, point[1]))
    script.write()
    time.sleep(seconds)
    ending = time.monotonic()
    reading = meter.end()
    after = time.monotonic()
    meter.close()
    spans = {}
    for gpu in script.gpus:
        first, last = script.looks(before, begun, gpu.uuid), script.looks(ending, after, gpu.uuid)
        if first and last:
            spans[gpu.uuid] = (
                gpu.tick_before(first[-1].at - script.start),
                gpu.tick_before(last[-1].at - script.start),
            )
    return Seen(
        reading,
        script.gpus,
        spans,
        (before - script.start, after - script.start),
        max((next_one - one for looks in probed for one, next_one in pairwise(looks)), default=0.0),
        script.users(),
    )


def _assert_right(seen: Seen, uuids: list[str]) -> None:
    """Assert that the energy is the integral of power between two ticks, and the time the time between them."""
    assert [device.device for device in seen.reading.devices] == uuids
    for device, gpu in zip(seen.reading.devices, seen.gpus, strict=True):
        began, ended = seen.spans[gpu.uuid]
        exact_j = gpu.energy_j(began, ended)
        assert (device.method, device.source, device.reason) == ("measured", "nvml_total_energy", None)
        assert device.boundary == "gpu_board"
        assert device.energy_j == pytest.approx(exact_j, abs=0.003), "to the counter's last digits"
        energy_j, seconds, uncertainty_j = map(not_none, (device.energy_j, device.seconds, device.uncertainty_j))
        # The error of both ticks is at most √6 times the uncertainty.
        blur = 2.5 * uncertainty_j / energy_j
        assert seconds == pytest.approx(ended - began, rel=max(0.005, blur))
        power_w = energy_j / seconds
        assert power_w == pytest.approx(exact_j / (ended - began), rel=max(0.005, blur))
        assert device.gain_error == 0.05
        sampling_j = 3 * not_none(device.integral_uncertainty_j)
        assert device.integral_j == pytest.approx(energy_j, abs=sampling_j + 2.5 * uncertainty_j)
    lengths = [not_none(one.seconds) for one in seen.reading.devices]
    assert min(lengths) <= not_none(seen.reading.seconds) <= max(lengths)
    assert seen.users == 0, "NVML was let go"


def _eight(tick_ms: tuple[int, ...] = (20, 100)) -> tuple[list[ScriptedGpu], dict[str, str]]:
    """Return eight GPUs with different ticks, phases and powers."""
    gpus, courses = [], {}
    for number in range(8):
        uuid = f"GPU-{number:08d}-0000-0000-0000-000000000000"
        tick = tick_ms[number % len(tick_ms)]
        gpus.append(_gpu(uuid, 45.0 + 80 * number, tick_ms=tick, phase_ms=13 * number % tick))
        courses[uuid] = list(COURSES)[number % len(COURSES)]
    return gpus, courses


@pytest.mark.parametrize(("tick_ms", "call_ms"), [slow(20, 0), (100, 4)])
def test_energy_is_the_integral_of_power_between_two_ticks(
    run: Callable[..., Any], tick_ms: int, call_ms: int
) -> None:
    seen = run(_watch, _gpu(tick_ms=tick_ms), args=(WORK_S, {A: "step"}), call_ms=call_ms)
    _assert_right(seen, [A])
    assert seen.reading.seconds >= WORK_S
    assert seen.reading.read_skew_seconds is None
    # A tick is detected by the next read, and recorded before the one after that.
    assert seen.reading.tick_seconds == pytest.approx(tick_ms / 1000, rel=0.2, abs=2 * seen.unseen_s)


@pytest.mark.slow
def test_windows_of_gpus_start_and_end_at_their_own_ticks(run: Callable[..., Any]) -> None:
    gpus = [_gpu(A, tick_ms=100), _gpu(B, 100.0, tick_ms=100, phase_ms=50)]
    seen = run(_watch, *gpus, args=(WORK_S, {A: "ramp"}))
    _assert_right(seen, [A, B])
    (a, b), (c, d) = seen.spans[A], seen.spans[B]
    blur = sum(2.5 * one.uncertainty_j / one.energy_j * one.seconds for one in seen.reading.devices)
    assert seen.reading.read_skew_seconds == pytest.approx(max(abs(a - c), abs(b - d)), abs=blur + 0.005)
    assert max(abs(a - c), abs(b - d)) == pytest.approx(0.05)


def test_tick_lies_in_its_interval_if_the_call_before_it_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call takes 10 ms, and reads the counter at once; the counter ticks while it returns."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(ticks, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    durations = iter([0.01, *[0.0002] * 10])

    def read() -> int:
        value = int(now[0] > 0.003)
        now[0] += next(durations)
        return value

    found = ticks.wait_for_ticks({A: read})[A]
    assert isinstance(found, list)
    [tick] = found
    assert abs(tick.at - 0.003) <= tick.width / 2


def test_skew_is_the_largest_difference_of_edges() -> None:
    assert _skew([_Span(1.0, 9.0), _Span(1.02, 9.05), _Span(1.01, 9.01)]) == pytest.approx(0.05)
    assert _skew([_Span(1.0, 9.0), _Span(1.05, 9.01)]) == pytest.approx(0.05)
    assert _skew([_Span(1.0, 9.0)]) is _skew([]) is None


@pytest.mark.parametrize("call_ms", [slow(0), 4])
@pytest.mark.slow
def test_eight_gpus_of_different_ticks_and_powers_are_each_right(run: Callable[..., Any], call_ms: int) -> None:
    gpus, courses = _eight()
    _assert_right(run(_watch, *gpus, args=(WORK_S, courses), call_ms=call_ms), [one.uuid for one in gpus])


@pytest.mark.slow
def test_long_windows_are_right_to_half_a_percent(nvml_library: Path, tmp_path: Path) -> None:
    """The windows run in parallel: they mostly sleep."""
    cases: list[tuple[tuple[int, ...], float]] = [((20, 100), 0), ((100,), 4)]

    def watch(number: int) -> Seen:
        tick_ms, call_ms = cases[number]
        gpus, courses = _eight(tick_ms)
        script = Script(tmp_path / f"script{number}", gpus, call_ms)
        script.write()
        seen = nvml.run(nvml.environment(nvml_library, script), _watch, script, 10.0, courses)
        assert isinstance(seen, Seen)
        return seen

    with ThreadPoolExecutor(len(cases)) as pool:
        for seen in pool.map(watch, range(len(cases))):
            _assert_right(seen, [gpu.uuid for gpu in seen.gpus])


@pytest.mark.slow
def test_gpu_without_a_counter_is_sampled(run: Callable[..., Any]) -> None:
    """The more power changes from sample to sample, the larger is the uncertainty."""
    watts = {"constant": 70.0, "step": 300.0, "steps": 90.0, "ramp": 200.0}
    sources: dict[str, list[str]] = {"nvml_power_instant": [], "nvml_power_usage": ["fail 186 3", "fail 185 3"]}
    gpus = [
        ScriptedGpu(f"GPU-{source}-{course}", [(0.0, watts[course])], {"no_counter": 1}, rules=rules)
        for source, rules in sources.items()
        for course in watts
    ]
    courses = {gpu.uuid: gpu.uuid.rpartition("-")[2] for gpu in gpus}
    seen = run(_watch, *gpus, args=(2.05, courses))
    assert seen.reading.tick_seconds == 0.1, "from sample to sample"
    for device, gpu in zip(seen.reading.devices, seen.gpus, strict=True):
        assert (device.method, device.reason, device.gain_error) == ("sampled", None, 0.05)
        assert device.source == device.device.split("-")[1]
        assert (device.integral_j, device.integral_reason) == (None, None), "it would be checked against itself"
        assert 2.05 <= device.seconds <= seen.within[1] - seen.within[0]
        # The window is known to the caller to a few ms only, and power is a constant around its edges.
        slack_s = seen.within[1] - seen.within[0] - device.seconds
        exact_j = gpu.energy_j(*seen.within) - slack_s * _watts_around(gpu)
        assert device.energy_j == pytest.approx(exact_j, abs=2.5 * device.uncertainty_j)
        assert 0 < device.uncertainty_j < (0.02 if courses[gpu.uuid] == "constant" else 0.25) * device.energy_j
        if courses[gpu.uuid] == "constant":
            assert device.energy_j == pytest.approx(70 * device.seconds, rel=1e-6)
    assert seen.users == 0


def _watts_around(gpu: ScriptedGpu) -> float:
    return (gpu.power[0][1] + gpu.power[-1][1]) / 2


@dataclass(frozen=True)
class Run:
    """The meters' readings of a window.

    Attributes:
        account: What they gave.
        refusals: Why the others gave nothing.
        least_s, most_s: Between which a device's window lies that is cut at ticks of 20 ms.
        waited: For a tick of which GPUs, at the end.
        users: Of NVML, once they were closed.
    """

    account: Account
    refusals: dict[str, str]
    least_s: float
    most_s: float
    waited: set[str]
    users: int


def _measure(script: Script, backend: str, uuids: list[str], change: dict[str, float] | None = None) -> Run:
    """Open the meters and measure a window, at whose end the first GPU changes."""
    meters = Meters.open(backend, uuids)
    before = time.monotonic()
    meters.begin()
    begun = time.monotonic()
    for counter in Path(os.environ["LLEM_POWERCAP_ROOT"]).glob("*/energy_uj"):
        add(counter, 2.0)
    time.sleep(0.2)
    if change is not None:
        script.gpus[0].more |= change
        script.write()
    ending = time.monotonic()
    account = meters.end()
    after = time.monotonic()
    meters.close()
    looks = {(look.uuid, look.value) for look in script.looks(ending, after)}
    return Run(
        account,
        meters.refusals,
        least_s=ending - begun - 0.02,
        most_s=after - before + 0.02,
        waited={uuid for uuid in uuids if len([look for look in looks if look[0] == uuid]) > 1},
        users=script.users(),
    )


def test_energy_of_two_gpus_is_their_sum(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(A, 300), _gpu(B, 100), args=("nvml", [A, B]))
    assert (seen.refusals, seen.users) == ({}, 0)
    first, second = seen.account.devices
    assert (first.device, second.device) == (A, B)
    assert seen.least_s <= first.energy_j / 300 <= seen.most_s
    assert seen.least_s <= second.energy_j / 100 <= seen.most_s
    assert A in seen.waited
    total = seen.account.total
    assert total.energy_j == first.energy_j + second.energy_j
    assert (total.method, total.boundary, total.source) == ("measured", "gpu_board", "nvml_total_energy")


def test_gpu_listed_twice_counts_once(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(), args=("nvml", [A, A]))
    assert [device.device for device in seen.account.devices] == [A]


def _assert_lost(account: Account, reason: str) -> None:
    lost = account.devices[0]
    assert (lost.device, lost.energy_j, lost.method) == (A, None, "unavailable")
    assert reason in not_none(lost.reason)
    total = account.total
    assert (total.energy_j, total.method, total.boundary) == (None, "unavailable", "gpu_board")
    assert reason in not_none(total.reason)
    assert A in not_none(total.reason)


def test_gpu_lost_in_the_window_has_no_energy(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(A), _gpu(B), args=("nvml", [A, B], {"lost_at": 0.0}))
    _assert_lost(seen.account, "nvmlDeviceGetTotalEnergyConsumption: GPU is lost")
    other = seen.account.devices[1]
    assert seen.least_s <= other.energy_j / 300 <= seen.most_s, "it is read all the same"
    assert seen.waited == {B}, "and its edge is on its tick"
    assert seen.users == 0


def test_a_counter_reset_in_the_window_leaves_sampled_power(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(), args=("nvml", [A], {"reset_at": 0.0}))
    (device,) = seen.account.devices
    assert (device.method, device.source) == ("sampled", "nvml_power_instant")
    assert device.counter_reason.startswith("the energy counter did not rise (from 5")
    assert device.energy_j == pytest.approx(300 * device.seconds, rel=0.001)


def _reset_unseen(script: Script) -> Reading:
    """Measure a window in which a low counter is reset, and rises beyond its earlier value."""
    script.start = time.monotonic()  # do not count the start of this process
    script.write()
    meter = NvmlMeter()
    meter.open([A])
    meter.begin()
    script.gpus[0].more["reset_at"] = script.now() + 1
    script.write()
    time.sleep(2.2)
    reading = meter.end()
    meter.close()
    return reading


@pytest.mark.slow
def test_hidden_counter_reset_is_detected_by_the_integral(run: Callable[..., Any]) -> None:
    """The counter rose by half of the energy: sampled power disagrees, which is a warning."""
    (device,) = run(_reset_unseen, _gpu(counter_mj=0)).devices
    assert device.energy_j < 0.7 * 300 * device.seconds
    assert device.integral_j == pytest.approx(300 * device.seconds, rel=0.03)
    account = Account((device,), Total(device.energy_j, "measured"), device.seconds, 0.02)
    (warning,) = energy_warnings(account, {})
    assert warning.text.startswith(f"energy counter and sampled power disagree on {A}: ")


def _short(script: Script) -> Reading:
    meter = NvmlMeter()
    meter.open([A])
    meter.begin()
    time.sleep(0.6)
    reading = meter.end()
    meter.close()
    return reading


@pytest.mark.parametrize("more", [{}, {"busy": 1.0}])
def test_power_of_a_busy_gpu_contradicts_the_counter(run: Callable[..., Any], more: dict[str, Any]) -> None:
    (device,) = run(_short, _gpu(counter_gain=1.4, **more)).devices
    assert device.energy_j == pytest.approx(1.4 * 300 * device.seconds, rel=0.01)
    assert device.integral_j == pytest.approx(300 * device.seconds, rel=0.05)
    assert device.integral_reason is None


def test_bursts_that_samples_may_miss_do_not_contradict_the_counter(run: Callable[..., Any]) -> None:
    """The counter rises by more than sampled power, as with bursts of work that no sample shows."""
    (device,) = run(_short, _gpu(counter_gain=1.4, busy=0.35)).devices
    assert device.energy_j == pytest.approx(1.4 * 300 * device.seconds, rel=0.01)
    assert device.integral_j is None
    assert device.integral_reason == "busy for less than 90 %, so that sampled power may miss bursts of work"


def test_agreeing_power_of_a_gpu_that_is_rarely_busy_is_a_check(run: Callable[..., Any]) -> None:
    (device,) = run(_short, _gpu(busy=0.35)).devices
    assert device.integral_j == pytest.approx(300 * device.seconds, rel=0.05)
    assert device.integral_reason is None


def test_a_counter_that_stands_still_gives_no_energy(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(watts=0), args=("nvml", [A]))
    _assert_lost(seen.account, "the energy counter stood still for 0.5 s (at 5000000000 mJ)")
    assert seen.account.tick_seconds is None


def _lost_between_windows(script: Script) -> list[Account]:
    meters = Meters.open("nvml", [A])
    accounts = []
    for lost_at in (1e9, 0.0, 1e9):
        script.gpus[0].more["lost_at"] = lost_at
        script.write()
        meters.begin()
        accounts.append(meters.end())
    meters.close()
    meters.close()  # a second call does nothing
    return accounts


def test_windows_are_independent(run: Callable[..., Any]) -> None:
    first, second, third = run(_lost_between_windows, _gpu())
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
    ("gpus", "reason"),
    [
        pytest.param(
            [_gpu(no_counter=1, no_power_reading=1)],
            f"{A}: no energy counter (GPUs have one since Volta), and power cannot be read",
            id="old",
        ),
        pytest.param([_gpu(mig=1)], f"{A}: MIG is on", id="mig"),
        pytest.param([_gpu(lost_at=0)], f"{A}: nvmlDeviceGetHandleByUUID: GPU is lost", id="lost"),
        pytest.param([_gpu(B)], f"{A}: nvmlDeviceGetHandleByUUID: Not Found", id="unknown"),
        pytest.param([_gpu(A), _gpu(B, mig=1)], f"{B}: MIG is on", id="second"),
        pytest.param(
            [
                ScriptedGpu(
                    A, [(0.0, 300.0)], {"tick_ms": 20}, rules=["fail nvmlDeviceGetTotalEnergyConsumption 999"]
                )
            ],
            f"{A}: nvmlDeviceGetTotalEnergyConsumption: Unknown Error",
            id="unknown error of a counter, which does not mean a GPU without one",
        ),
    ],
)
def test_gpu_that_cannot_be_metered_is_refused_with_a_reason(
    run: Callable[..., Any], gpus: list[ScriptedGpu], reason: str
) -> None:
    message, users = run(_refusal, *gpus, args=([A, B] if len(gpus) == 2 else [A],))
    assert message.startswith(reason)
    assert users == 0


def test_a_driver_that_is_not_loaded_is_the_reason(run: Callable[..., Any]) -> None:
    message, users = run(_refusal, args=([A],), rules=["fail nvmlInit 9"])
    assert message == "nvmlInit: Driver Not Loaded"
    assert users == 0


def test_a_library_that_cannot_be_loaded_is_the_reason(tmp_path: Path) -> None:
    # A broken module hides the installed one.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libnvidia-ml.so.1").write_text("not a library")
    script = Script(tmp_path / "script", [])
    code = f"from pytest_llem.energy.nvml import NvmlMeter; NvmlMeter().open([{A!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=nvml.environment(broken, script),
        capture_output=True,
        text=True,
        check=False,
    )
    message = "MeterUnavailableError: nvmlInit: NVML Shared Library Not Found"
    assert done.stderr.splitlines()[-1].endswith(message)


def test_without_a_gpu_the_meter_refuses_to_open() -> None:
    meter = NvmlMeter()
    with pytest.raises(MeterUnavailableError, match="no NVIDIA GPU"):
        meter.open([])
    meter.close()


def test_auto_reads_nvml_first_and_rapl_too(run: Callable[..., Any], tmp_path: Path) -> None:
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    seen = run(_measure, _gpu(), args=("auto", [A]))
    account = seen.account
    assert seen.refusals == {}
    assert account.total.boundary == "gpu_board"
    assert account.total.energy_j == account.of_boundary("gpu_board").energy_j > 0
    assert account.of_boundary("cpu_package").energy_j == pytest.approx(2.0)
    assert account.tick_seconds is not None


def test_auto_without_rapl_has_a_reason_for_no_cpu_energy(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(), args=("auto", [A]))
    assert seen.account.total.boundary == "gpu_board"
    assert set(seen.refusals) == {"rapl"}
    cpu = seen.account.of_boundary("cpu_package")
    assert (cpu.energy_j, cpu.method, cpu.reason) == (None, "unavailable", "no meter read cpu_package")


def test_auto_reads_rapl_if_the_gpu_cannot_be_metered(run: Callable[..., Any], tmp_path: Path) -> None:
    gpu = _gpu(no_counter=1, no_power_reading=1)
    seen = run(_measure, gpu, args=("auto", [A]))
    assert set(seen.refusals) == {"nvml", "rapl", "estimate"}
    total = seen.account.total
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert "no energy counter" in total.reason
    Powercap(tmp_path / "powercap").zone("intel-rapl:0", "package-0")
    seen = run(_measure, gpu, args=("auto", [A]))
    assert set(seen.refusals) == {"nvml"}
    assert seen.account.total.boundary == "cpu_package"


def test_sum_with_a_sampled_gpu_is_sampled(run: Callable[..., Any]) -> None:
    seen = run(_measure, _gpu(A), _gpu(B, no_counter=1), args=("nvml", [A, B]))
    total = seen.account.total
    assert (total.method, total.source) == ("sampled", "nvml_total_energy+nvml_power_instant")
    assert total.energy_j == sum(device.energy_j for device in seen.account.devices)


CODES = [*range(1, 30), 999]  # all of nvmlReturn_t except success


def _with_errors(script: Script) -> Seen:
    """Measure GPUs whose counter fails before or within the window; their UUID determines which."""
    meter = NvmlMeter()
    meter.open([gpu.uuid for gpu in script.gpus])
    for moment in ("begin", "end"):
        for gpu in script.gpus:
            _, when, code = gpu.uuid.split("-")
            if when == moment:
                gpu.rules.append(f"fail nvmlDeviceGetTotalEnergyConsumption {code}")
        script.write()
        if moment == "begin":
            meter.begin()
            time.sleep(0.1)
    reading = meter.end()
    meter.close()
    return Seen(reading, script.gpus, {}, (0.0, 0.0), 0.0, script.users())


def test_every_error_of_the_counter_leaves_sampled_power_and_its_reason(run: Callable[..., Any]) -> None:
    uuids = [f"GPU-{moment}-{code}" for moment in ("begin", "end") for code in CODES]
    seen = run(_with_errors, *map(_gpu, [*uuids, "GPU-no-error"]))
    *failed, fine = seen.reading.devices
    for device in failed:
        code = int(device.device.rpartition("-")[2])
        assert (device.method, device.reason) == ("sampled", None), code
        assert device.energy_j == pytest.approx(300 * device.seconds, rel=0.001), code
        assert device.counter_reason.startswith("nvmlDeviceGetTotalEnergyConsumption: "), code
        assert len(device.counter_reason) > len("nvmlDeviceGetTotalEnergyConsumption: "), code
    assert fine.energy_j / fine.seconds == pytest.approx(
        300, rel=max(0.02, 2.5 * fine.uncertainty_j / fine.energy_j)
    )
    assert len({device.counter_reason for device in failed}) >= 20, "each error has its own reason"
    assert seen.users == 0


CALLS = {
    "no-fields": ["nvmlDeviceGetFieldValues"],
    "no-instant": ["186"],
    "no-power": ["nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage"],
    "no-temperature": ["nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"],
    "old-temperature": ["nvmlDeviceGetTemperatureV"],
    "no-clocks": ["nvmlDeviceGetClockInfo"],
    "no-throttling": ["74", "269", "nvmlDeviceGetViolationStatus"],
    "no-mig": ["nvmlDeviceGetMigMode"],
}


def _whole_board(name: str, code: int) -> ScriptedGpu:
    """Return a GPU whose calls of *name* fail with *code*."""
    rules = [f"fail {function} {code}" for function in CALLS[name]]
    rules += ["sm_clock 0 1980", "memory_clock 0 2619", "throttle power 0 0.5", "throttle sw_thermal 0 0"]
    return ScriptedGpu(f"GPU-{name}-{code}", [(0.0, 300.0)], {"tick_ms": 20, "temperature": "0 60"}, rules=rules)


def test_failing_call_loses_only_its_own_values(run: Callable[..., Any]) -> None:
    """An unsupported call is remembered; a call with an unknown error may work the next time."""
    cases = [(name, code) for code in (3, 999) for name in CALLS]
    seen = run(_watch, *(_whole_board(*case) for case in cases), args=(0.7, {}))
    for (name, code), device in zip(cases, seen.reading.devices, strict=True):
        case = f"{name} {code}"
        began, ended = seen.spans[device.device]
        assert device.energy_j == pytest.approx(300 * (ended - began), abs=0.003), case
        known = device.conditions
        assert (known.start_temperature_c, known.end_temperature_c, known.peak_temperature_c) == (
            (None, None, None) if name == "no-temperature" else (60, 60, 60)
        ), case
        clocks = (None, None) if name == "no-clocks" else (1980, 2619)
        assert (known.mean_sm_clock_mhz, known.mean_memory_clock_mhz) == clocks, case
        if name == "no-throttling":
            assert known.throttled_seconds is None, case
        else:
            reasons = {"power", "sw_thermal"} if "field" not in "".join(CALLS[name]).lower() else {"power"}
            assert set(known.throttled_seconds) == reasons, case
        watts = {one.power_w for one in seen.reading.samples if one.device == device.device}
        assert watts == ({None} if name == "no-power" else {300.0}), case
        if name == "no-power":
            assert "0 samples of power" in device.integral_reason, case
        elif name in ("no-instant", "no-fields"):
            assert "average over a second" in device.integral_reason, case
        else:
            assert device.integral_j == pytest.approx(300 * device.seconds, rel=1e-6), case
        assert (device.integral_j is None) == (name in ("no-power", "no-instant", "no-fields")), case


def _warming(script: Script) -> tuple[Reading, float]:
    """Measure a GPU that warms up, is hottest within the window, and is throttled in its second half."""
    meter = NvmlMeter()
    meter.open([A])
    now = script.now()
    (gpu,) = script.gpus
    gpu.rules += [
        "temperature 0 40",
        f"temperature {now + 0.6} 83",
        f"temperature {now + 1.7} 70",
        "sm_clock 0 1000",
        f"throttle power {now + 1} 1",
        "throttle low_utilization 0 1",
        "throttle hw_thermal 0 0",
    ]
    script.write()
    meter.begin()
    throttled_from = script.start + now + 1
    time.sleep(max(0.0, script.start + now + 2 - time.monotonic()))
    reading = meter.end()
    ended = time.monotonic()
    meter.close()
    return reading, ended - throttled_from


@pytest.mark.slow
def test_conditions_are_those_of_the_window(run: Callable[..., Any]) -> None:
    reading, most_s = run(_warming, _gpu())
    (device,) = reading.devices
    known = device.conditions
    assert (known.start_temperature_c, known.peak_temperature_c, known.end_temperature_c) == (40, 83, 70)
    assert (known.mean_sm_clock_mhz, known.mean_memory_clock_mhz) == (1000, None)
    assert set(known.throttled_seconds) == {"power", "hw_thermal"}, "low utilisation is not throttling"
    assert known.throttled_seconds["hw_thermal"] == 0
    assert 1 <= known.throttled_seconds["power"] <= most_s


#: Share of the time for which each reason throttles the GPU.
SHARES = {
    "power": 0.8,
    "thermal": 0.1,
    "sync_boost": 0.2,
    "board_limit": 0.3,
    "low_utilization": 0.4,
    "reliability": 0.5,
    "sw_thermal": 0.6,
    "hw_thermal": 0.7,
    "hw_power_brake": 0.9,
}


@pytest.mark.parametrize(
    ("rules", "unreported"),
    [
        ([], {"low_utilization"}),
        (["fail nvmlDeviceGetFieldValues 3"], {"low_utilization", "sw_thermal", "hw_thermal", "hw_power_brake"}),
    ],
    ids=["fields", "violations"],
)
def test_every_throttle_reason_is_reported_by_name(
    run: Callable[..., Any], rules: list[Any], unreported: set[str]
) -> None:
    gpu = _gpu()
    gpu.rules += [*rules, *(f"throttle {reason} 0 {share}" for reason, share in SHARES.items())]
    (device,) = run(_watch, gpu, args=(0.5, {})).reading.devices
    throttled = device.conditions.throttled_seconds
    assert set(throttled) == SHARES.keys() - unreported
    for reason, seconds in throttled.items():
        assert seconds / throttled["power"] == pytest.approx(SHARES[reason] / SHARES["power"], rel=0.05), reason


def test_early_drivers_settings_are_not_taken_for_counters(run: Callable[..., Any]) -> None:
    """Later drivers have counters under these field ids, the first ones of their branches do not."""
    gpu = _gpu(early_driver=1)
    gpu.rules += ["throttle power 0 0.5", "throttle sw_thermal 0 0.5"]
    (device,) = run(_watch, gpu, args=(0.2, {})).reading.devices
    assert set(device.conditions.throttled_seconds) == {"power"}


def test_slow_snapshots_at_both_edges_are_outside_the_window(run: Callable[..., Any]) -> None:
    seen = run(_watch, _gpu(), args=(0.5, {}), rules=["takes nvmlDeviceGetFieldValues 80"])
    began, ended = seen.spans[A]
    (device,) = seen.reading.devices
    assert device.energy_j == pytest.approx(300 * (ended - began), abs=0.003)
    assert ended - began < seen.within[1] - seen.within[0] - 0.15, "two such calls at each edge are not in it"


def _powers(script: Script) -> dict[str, float | None]:
    """Read a GPU's power from every source, 0.4 s after a step up."""
    script.gpus[0].power.append((script.now() + 1, 500.0))
    script.write()
    time.sleep(1.4)
    with Nvml() as opened:
        handle = opened.call("nvmlDeviceGetHandleByUUID", A)
        return {source: power_w(opened, handle, source) for source in get_args(PowerSource)}


def test_only_instant_power_follows_a_step_at_once(run: Callable[..., Any]) -> None:
    powers = run(_powers, _gpu(watts=100.0, averages=1))
    assert powers["nvml_power_instant"] == 500
    assert 150 < powers["nvml_power_average"] <= powers["nvml_power_usage"] < 500


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), False), ((8, 0), False), ((8, 6), True), ((9, 0), True), (None, False)]
)
def test_power_usage_is_an_average_on_gpus_after_ga100(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, expected: bool
) -> None:
    monkeypatch.setattr(Nvml, "ask", lambda *_: capability)
    assert averages_power(Nvml(), None, "nvml_power_usage") == expected


def _sources(script: Script) -> list[PowerSource]:
    with Nvml() as opened:
        return power_sources(opened, opened.call("nvmlDeviceGetHandleByUUID", A))


@pytest.mark.parametrize(("watts", "expected"), [(100.0, [*get_args(PowerSource)]), (20_000.0, [])])
def test_source_of_impossible_power_is_not_used(
    run: Callable[..., Any], watts: float, expected: list[PowerSource]
) -> None:
    assert run(_sources, _gpu(watts=watts)) == expected


def _environment(script: Script, uuids: list[str]) -> tuple[list[dict[str, Any]], int]:
    return gpu_environment(uuids)["gpus"], script.users()


def test_environment_has_gpu_and_driver(run: Callable[..., Any]) -> None:
    gpu = _gpu(name="Scripted H100 80GB", power_limit_w=700, memory_mb=85_520, persistence=1)
    gpus, users = run(_environment, gpu, args=([A, B],), driver="580.1")
    known, unknown = gpus
    assert {name: value for name, value in known.items() if value is not None} == {
        "uuid": A,
        "name": "Scripted H100 80GB",
        "driver": "580.1",
        "power_limit_w": 700,
        "memory_mb": 85_520,
        "persistence_mode": True,
        "mig_mode": False,
    }
    assert unknown == {"uuid": B, "nvml": "nvmlDeviceGetHandleByUUID: Not Found"}
    assert users == 0
