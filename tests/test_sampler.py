"""The sampler: its samples, their integral, and the end of its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llem.energy.nvml import NvmlMeter
from pytest_llem.energy.power import NoIntegralError, Power, integrate
from pytest_llem.energy.protocol import MeterUnavailableError, Reading
from pytest_llem.energy.sampler import PERIOD_S, _Telemetry
from pytest_llem.energy.sampler_process import SamplerProcess
from tests.support import nvml
from tests.support.marks import slow
from tests.support.narrow import not_none
from tests.support.nvml import Script, ScriptedGpu
from tests.support.processes import gone, wait_until

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000001", "GPU-bbbbbbbb-0000-0000-0000-000000000002"


# ---- integration ----


@given(
    st.floats(0, 10),
    st.floats(0.2, 10),
    st.lists(st.floats(-1, 21), min_size=2, max_size=400, unique=True),
    st.floats(1, 1000),
)
def test_constant_power_is_exact_for_any_sample_times(began: Any, seconds: Any, at: Any, watts: Any) -> None:
    ended = began + seconds
    try:
        found = integrate(sorted(Power(one, watts) for one in at), began, ended)
    except NoIntegralError:
        return
    assert found.energy_j == pytest.approx(watts * seconds)


@pytest.mark.parametrize("offset", [0.0, 0.03, 0.099])
def test_seventy_watts_for_ten_seconds_are_seven_hundred_joules(offset: float) -> None:
    samples = [Power(offset + 0.1 * number, 70.0) for number in range(100)]
    found = integrate(samples, 0.0, 10.0)
    assert found.energy_j == pytest.approx(700)
    assert found.uncertainty_j == pytest.approx(70 * 0.1 * (2 / 12) ** 0.5)


def test_power_is_interpolated_linearly_over_the_edges() -> None:
    samples = [Power(0.1 * number, 1000.0 * number) for number in range(31)]  # 10 kW/s
    assert integrate(samples, 0.55, 2.45).energy_j == pytest.approx(10_000 * (2.45**2 - 0.55**2) / 2)


def test_power_at_an_edge_is_that_of_the_nearest_sample() -> None:
    samples = [Power(1.0, 100.0), Power(1.5, 200.0)]
    assert integrate(samples, 0.5, 2.0).energy_j == pytest.approx(0.5 * 100 + 0.5 * 150 + 0.5 * 200)


def test_power_step_is_within_the_uncertainty() -> None:
    for step in (1.0, 1.025, 1.05, 1.099):
        samples = [Power(0.1 * number, 100.0 if 0.1 * number <= step else 500.0) for number in range(31)]
        found = integrate(samples, 0.0, 3.0)
        assert abs(found.energy_j - (100 * step + 500 * (3 - step))) <= 1.8 * found.uncertainty_j


def test_power_in_step_with_the_drivers_samples_is_within_the_uncertainty() -> None:
    """Work of 10 ms every 0.2 s, of which the driver reports every second peak: more samples do not help."""
    samples = [Power(0.1 * number, 700.0 if number % 4 == 0 else 124.0) for number in range(401)]
    found = integrate(samples, 0.0, 40.0)
    true_j = 40 * (124 + (700 - 124) * 0.05)
    assert found.energy_j > 1.5 * true_j
    assert abs(found.energy_j - true_j) <= 3 * found.uncertainty_j


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ([], "0 samples of power in 10.0 s"),
        ([5.0], "1 samples of power in 10.0 s"),
        (
            [0.1 * one for one in range(50)] + [6.2 + 0.1 * one for one in range(40)],
            "no sample of power for 1.3 s",
        ),
        ([0.1 * one for one in range(80)], "no sample of power for 2.1 s"),
        ([1.5 + 0.1 * one for one in range(90)], "no sample of power for 1.5 s"),
        ([-0.9, *(0.6 + 0.1 * one for one in range(95))], "no sample of power for 1.5 s"),
        ([-3.0, -2.9], "1 samples of power in 10.0 s"),
    ],
    ids=["none", "one", "gap", "ends-early", "begins-late", "gap-over-the-edge", "all-before"],
)
def test_too_few_samples_have_no_integral(at: list[Any], reason: str) -> None:
    with pytest.raises(NoIntegralError, match=f"^{reason}$"):
        integrate([Power(one, 70.0) for one in at], 0.0, 10.0)


# ---- the process ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@pytest.fixture
def env(nvml_library: Path, tmp_path: Path, folder: Path) -> Callable[..., tuple[Script, dict[str, str]]]:
    """Return a script of GPUs, and the environment of a process that uses it."""

    def make(*gpus: ScriptedGpu, **script: Any) -> tuple[Script, dict[str, str]]:
        written = Script(tmp_path / "script", list(gpus), **script)
        written.write()
        return written, nvml.environment(nvml_library, written) | {"TMPDIR": str(folder)}

    return make


def _gpu(uuid: str = A, watts: float = 300.0, **more: str | float) -> ScriptedGpu:
    rules = ["sm_clock 0 1980", "memory_clock 0 2619"]
    return ScriptedGpu(uuid, [(0.0, watts)], {"tick_ms": 20, "temperature": "0 60", **more}, rules=rules)


def _sampler() -> psutil.Process:
    (sampler,) = psutil.Process().children()
    return sampler


def _measure(
    script: Script, harm: signal.Signals | None = None, harm_first: bool = False
) -> tuple[Reading, int, bool]:
    """Measure 1.3 s in which the sampler gets a signal; also return its pid and whether it survived."""
    meter = NvmlMeter()
    meter.open([gpu.uuid for gpu in script.gpus])
    sampler = _sampler()
    if harm is not None and harm_first:
        sampler.send_signal(harm)
        wait_until(lambda: gone(sampler.pid))
    meter.begin()
    time.sleep(0.3)
    if harm is not None and not harm_first:
        sampler.send_signal(harm)
    time.sleep(1.0)
    survived = not gone(sampler.pid)
    reading = meter.end()
    meter.close()
    return reading, sampler.pid, survived


@pytest.mark.slow
def test_samples_of_the_window(env: Callable[..., Any], folder: Path) -> None:
    script, environment = env(_gpu(A), _gpu(B, 70.0))
    reading, pid, survived = nvml.run(environment, _measure, script)
    assert survived
    assert gone(pid), "closed with the meter"
    assert list(folder.iterdir()) == [], "and its file is not left behind"
    ats = [sample.at for sample in reading.samples]
    assert ats == sorted(ats)
    for uuid, watts in ((A, 300.0), (B, 70.0)):
        samples = [sample for sample in reading.samples if sample.device == uuid]
        assert {sample.power_w for sample in samples} == {watts}
        # At most ten samples a second, two of them with temperature and clocks.
        assert 2 <= len(samples) <= 10 * reading.seconds + 2
        slow = [sample for sample in samples if sample.temperature_c is not None]
        assert 1 <= len(slow) <= len(samples) / 5 + 1
        values = {(one.temperature_c, one.sm_clock_mhz, one.memory_clock_mhz) for one in slow}
        assert values == {(60, 1980, 2619)}
    assert 0 < reading.harness_cpu_seconds < reading.seconds
    asked = {call.function for call in script.calls() if call.pid == pid}
    assert asked == {
        "nvmlInit",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetClockInfo",
        "nvmlShutdown",
    }, "no list of processes, fan or utilisation"
    assert script.users() == 0


@pytest.mark.slow
def test_a_load_that_repeats_at_the_samplers_rate_is_sampled_at_all_phases(env: Callable[..., Any]) -> None:
    """At one phase of it, the integral would be wrong by the whole difference of its powers."""
    script, environment = env(_gpu(A))
    reading, _, _ = nvml.run(environment, _measure, script)
    phases = sorted(sample.at / PERIOD_S % 1 for sample in reading.samples)
    gaps = [after - before for before, after in pairwise([*phases, 1 + phases[0]])]
    assert max(gaps) < 0.5


@pytest.mark.parametrize("harm_first", [False, True], ids=["in-the-window", "before-it"])
@pytest.mark.slow
def test_sampler_that_dies_loses_only_its_values(env: Callable[..., Any], folder: Path, harm_first: bool) -> None:
    script, environment = env(_gpu(A), _gpu(B, no_counter=1))
    reading, _, survived = nvml.run(environment, _measure, script, signal.SIGKILL, harm_first)
    assert not survived
    counted, sampled = reading.devices
    assert counted.method == "measured"
    off_s = 2.5 * counted.uncertainty_j / 300
    assert counted.energy_j == pytest.approx(300 * counted.seconds, rel=0.01, abs=300 * off_s)
    assert (counted.integral_j, counted.integral_reason) == (None, "the sampler ended: signal 9")
    assert (sampled.energy_j, sampled.method) == (None, "unavailable")
    assert sampled.reason == "NVML: the sampler ended: signal 9"
    known = counted.conditions
    assert (known.start_temperature_c, known.end_temperature_c, known.peak_temperature_c) == (60, 60, None)
    assert known.mean_sm_clock_mhz is None
    assert reading.harness_cpu_seconds is None
    assert list(folder.iterdir()) == []


def test_sampler_ignores_ctrl_c(env: Callable[..., Any]) -> None:
    script, environment = env(_gpu())
    reading, _, survived = nvml.run(environment, _measure, script, signal.SIGINT)
    assert survived
    assert reading.devices[0].integral_j == pytest.approx(reading.devices[0].energy_j, rel=0.05)


def _without_a_sampler(script: Script) -> tuple[Reading | None, str | None]:
    sys.executable = "/nonexistent/python"
    meter = NvmlMeter()
    try:
        meter.open([gpu.uuid for gpu in script.gpus])
    except MeterUnavailableError as error:
        return None, str(error)
    meter.begin()
    time.sleep(0.1)
    reading = meter.end()
    meter.close()
    return reading, None


def test_sampler_that_cannot_start_loses_only_its_values(env: Callable[..., Any]) -> None:
    script, environment = env(_gpu())
    reading, _ = nvml.run(environment, _without_a_sampler, script)
    (device,) = reading.devices
    assert device.method == "measured"
    assert device.integral_j is None
    assert "/nonexistent/python" in device.integral_reason
    assert reading.samples == ()
    assert reading.harness_cpu_seconds is None
    script, environment = env(_gpu(no_counter=1))
    reading, refusal = nvml.run(environment, _without_a_sampler, script)
    assert reading is None
    assert refusal.startswith("no energy counter, and the sampler could not be started: ")
    assert script.users() == 0


def _hold(pids: Path) -> None:
    """Open a meter, write the sampler's pid to the file *pids*, and never close the meter."""
    meter = NvmlMeter()
    meter.open([A])
    meter.begin()
    child = os.fork()  # keeps the sampler's standard input open, like a data loader of an engine
    if child == 0:
        time.sleep(60)
        os._exit(0)
    pids.with_suffix(".new").write_text(f"{_sampler_among(child)} {child}")
    pids.with_suffix(".new").replace(pids)
    time.sleep(60)


def _sampler_among(other: int) -> int:
    (sampler,) = (child for child in psutil.Process().children() if child.pid != other)
    return sampler.pid


def test_the_sampler_ends_with_its_parent(env: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    script, environment = env(_gpu())
    pids = tmp_path / "pids"
    code = f"from pathlib import Path; from tests import test_sampler; test_sampler._hold(Path({str(pids)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=nvml.ROOT)
    try:
        wait_until(pids.exists)
        sampler, child = map(int, pids.read_text().split())
        assert not gone(sampler)
        parent.kill()
        parent.wait()
        try:
            wait_until(lambda: gone(sampler), 30)
        finally:
            os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
    assert list(folder.iterdir()) == []
    assert script.calls(), "it had sampled"


def test_sampler_ends_when_standard_input_is_closed(env: Callable[..., Any]) -> None:
    _, environment = env(_gpu())
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest_llem.energy.sampler",
        str(os.getpid()),
        "",
        f"{A}=nvml_power_instant",
    ]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(nvml.ROOT), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert not_none(process.stdout).readline().startswith(b"[")
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("reader", ["reads", slow("sleeps"), slow("is gone")])
def test_telemetry_never_blocks_the_sampler(env: Callable[..., Any], reader: str) -> None:
    """Telemetry is sent once a second, with the power of all GPUs and the highest temperature."""
    _, environment = env(_gpu(A), _gpu(B, watts=80.0, temperature="0 66"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(nvml.ROOT), environment.get("PYTHONPATH")]))
    ours, shown = os.pipe()
    if reader == "sleeps":
        os.set_blocking(shown, False)
        with suppress(BlockingIOError):
            while True:
                os.write(shown, b"x" * 4096)
        os.set_blocking(shown, True)
    elif reader == "is gone":
        os.close(ours)
    asked = [f"{uuid}=nvml_power_instant" for uuid in (A, B)]
    command = [sys.executable, "-P", "-m", "pytest_llem.energy.sampler", str(os.getpid()), str(shown), *asked]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[shown]
    ) as process:
        os.close(shown)
        samples = [json.loads(not_none(process.stdout).readline()) for _ in range(2 * 25)]
        not_none(process.stdin).close()
    assert {one[1] for one in samples} == {0, 1}
    if reader == "is gone":
        return
    with os.fdopen(ours, "rb") as pipe:
        lines = pipe.read().splitlines()
    if reader == "sleeps":
        assert set(b"".join(lines)) == set(b"x"), "nothing was written into a pipe that is full"
        return
    assert 2 <= len(lines) <= 8
    assert json.loads(lines[0])["power_w"] == pytest.approx(380.0)
    assert json.loads(lines[-1]) == {"power_w": pytest.approx(380.0), "temperature_c": 66}


def test_sampler_without_nvml_reports_the_reason(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    environment = nvml.environment(tmp_path, Script(tmp_path / "script", []))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(nvml.ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "pytest_llem.energy.sampler", str(os.getpid()), "", f"{A}="]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == '{"failed": "nvmlInit: NVML Shared Library Not Found"}\n'


def test_sampler_imports_only_nvml_modules() -> None:
    code = (
        "import sys, pytest_llem.energy.sampler\n"
        "assert not {'pydantic', 'torch', 'transformers', 'numpy', 'yaml', 'asyncio'} & set(sys.modules)\n"
        "ours = sorted(name for name in sys.modules if name.startswith('pytest_llem.'))\n"
        "assert ours == ['pytest_llem.energy', 'pytest_llem.energy.sampler', 'pytest_llem.hardware',\n"
        "                'pytest_llem.hardware.nvml',\n"
        "                'pytest_llem.hardware.sensors'], ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=nvml.ROOT)


def test_telemetry_has_power_only_while_each_gpu_has_one() -> None:
    reader, writer = os.pipe()
    telemetry = _Telemetry(writer, 2)
    seen = []
    for number, (gpu, watts) in enumerate([(0, 300.0), (1, 200.0), (0, None), (0, 310.0)], start=1):
        telemetry.update(gpu, watts=watts, celsius=60.0)
        telemetry.send(10.0 * number)
        seen.append(json.loads(os.read(reader, 1000)).get("power_w"))
    os.close(reader)
    os.close(writer)
    assert seen == [None, 500.0, None, 510.0]


def test_sampler_that_cannot_be_started_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("pytest_llem.energy.sampler_process.subprocess.Popen", refuse)
    process = SamplerProcess([])
    process.wait()
    assert process.failure == "the sampler could not be started: [Errno 11] Resource temporarily unavailable"
    assert process._file.closed
