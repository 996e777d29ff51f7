"""Loads for a GPU, and their meters' readings. They run in a process of their own: see ``on_gpu``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_llem.energy.account import disagreement
from pytest_llem.energy.gpu import COUNTER
from pytest_llem.energy.metering import EnergyMeter
from pytest_llem.energy.nvml import NvmlMeter
from pytest_llem.energy.protocol import Reading
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.workload.prompts import build_workload

#: Size of the matrices: one product takes about 10 ms, so that seconds of work fit into CUDA's queue.
SIDE = 16384


class Matmuls:
    """Products of square matrices in bf16, which make a GPU draw its highest power."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._left, self._right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self._product = torch.empty_like(self._left)
        self.run(50)
        began = time.monotonic()
        self.run(100)
        self._each = (time.monotonic() - began) / 100

    def queue(self, count: int) -> None:
        for _ in range(count):
            torch.matmul(self._left, self._right, out=self._product)

    def run(self, count: int) -> None:
        self.queue(count)
        torch.cuda.synchronize()

    def count(self, seconds: float) -> int:
        """Return how many products take *seconds*."""
        return max(1, round(seconds / self._each))


def _energy(reading: Reading) -> float:
    [device] = reading.devices
    assert device.energy_j is not None, device.reason
    return device.energy_j


def _open(uuid: str, *, sampler: bool = False) -> NvmlMeter:
    meter = NvmlMeter(sampler=sampler)
    meter.open([uuid])
    return meter


def alignment(uuid: str, windows: int, seconds: float) -> tuple[list[float], list[float]]:
    """Return the energies in J of equal windows of a steady load, aligned to ticks and not aligned."""
    load, meter = Matmuls(), _open(uuid)
    count = load.count(seconds)
    load.run(load.count(15))  # warm up: a cold GPU draws less
    aligned, unaligned = [], []
    with Nvml() as nvml:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", uuid)
        for _ in range(windows):
            meter.begin()
            load.run(count)
            aligned.append(_energy(meter.end()))
            before = nvml.call(COUNTER, handle)
            load.run(count)
            unaligned.append((nvml.call(COUNTER, handle) - before) / 1000)
    meter.close()
    return aligned, unaligned


def adjacent(uuid: str, windows: int, seconds: float) -> tuple[list[float], float, float, float]:
    """Return the energies of adjacent windows and of one around them in J, its mean power in W, and the tick in s.

    Where one window ends and the next begins both wait for the same tick.
    """
    load = Matmuls()
    whole, parts = _open(uuid), [_open(uuid) for _ in range(windows)]
    count = load.count(seconds)
    energies = []
    with ThreadPoolExecutor(2) as pool:
        around = pool.submit(whole.begin)
        parts[0].begin()
        around.result()
        for at, part in enumerate(parts):
            load.run(count)
            next_begins = pool.submit(parts[at + 1].begin if at + 1 < windows else whole.end)
            energies.append(_energy(part.end()))
            last = next_begins.result()
    assert last is not None
    for meter in (whole, *parts):
        meter.close()
    return energies, _energy(last), _energy(last) / last.seconds, last.tick_seconds or 0.0


def queued(uuid: str, seconds: float) -> tuple[float, float, float]:
    """Return the energy in J of work that is queued, and of which none has been waited for when the block ends:
    by the meter for ordinary tests, by one that synchronizes on request, and by one that does not wait.
    """
    load, meter, measure = Matmuls(), _open(uuid), EnergyMeter()
    count = load.count(seconds)
    with measure("nvml") as trapped:
        load.queue(count)
    torch.cuda.synchronize()
    meter.begin()
    load.run(count)
    explicit = _energy(meter.end())
    meter.begin()
    load.queue(count)
    unsynchronised = _energy(meter.end())
    torch.cuda.synchronize()
    meter.close()
    assert trapped.energy_j is not None, trapped.reason
    return trapped.energy_j, explicit, unsynchronised


def observed(uuid: str, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Return for each round the ratios of time and of energy, with a sampler ÷ without one."""
    load = Matmuls()
    meters = {sampler: _open(uuid, sampler=sampler) for sampler in (False, True)}
    count = load.count(seconds)
    load.run(load.count(15))
    ratios = []
    for at in range(rounds):
        seen = {}
        for sampler in (False, True) if at % 2 else (True, False):
            meters[sampler].begin()
            began = time.monotonic()
            load.run(count)
            taken = time.monotonic() - began
            seen[sampler] = taken, _energy(meters[sampler].end())
        ratios.append((seen[True][0] / seen[False][0], seen[True][1] / seen[False][1]))
    for meter in meters.values():
        meter.close()
    return ratios


def decoding(uuid: str, model: str, tokens: int) -> tuple[float, float]:
    """Return how long each token of a single prompt takes with a static cache, and how long kernels run for it.

    Both in ms; the prompt's own pass counts among them.
    """
    config = ExperimentConfig.model_validate(
        {
            "model": model,
            "dataset": {"n": 1, "input_len": 32, "output_len": tokens},
            "pytorch": {"cache_implementation": "static"},
        }
    )
    engine = PyTorchEngine(config, EngineContext())
    engine.fetch()
    engine.load()
    [batch] = engine.prepare(build_workload(config, engine, None).prompts)
    for _ in range(3):
        engine.generate(batch)
    engine.synchronize()
    began = time.perf_counter()
    engine.generate(batch)
    engine.synchronize()
    took = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        engine.generate(batch)
        engine.synchronize()
    busy_us = sum(event.self_device_time_total for event in seen.key_averages())
    engine.close()
    return 1000 * took / tokens, busy_us / 1000 / tokens


def held(uuid: str, gigabytes: Sequence[int], seconds: float) -> list[float]:
    """Return the power in W of a process that holds memory and does nothing, for each number of *gigabytes*."""
    meter, watts = _open(uuid), []
    for amount in gigabytes:
        memory = torch.ones(amount * 10**9, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        time.sleep(5)
        meter.begin()
        time.sleep(seconds)
        reading = meter.end()
        watts.append(_energy(reading) / reading.seconds)
        del memory
        torch.cuda.empty_cache()
    meter.close()
    return watts


#: Time from one burst of work to the next, in s.
PERIOD_S = 0.2


def _burst(load: Matmuls, count: int) -> None:
    began = time.monotonic()
    load.run(count)
    time.sleep(max(0.0, PERIOD_S - (time.monotonic() - began)))


def bursts(uuid: str, share: float, seconds: float) -> tuple[float | None, str | None, float | None]:
    """Return the integral of power ÷ the counter's energy of bursts of work for *share* of the time.

    If the integral cannot check the counter, it is None, and the second value says why. The third one is their
    disagreement beyond the uncertainty of sampling; None if they agree within it.
    """
    load, meter = Matmuls(), _open(uuid, sampler=True)
    count = load.count(PERIOD_S * share)
    meter.begin()
    for _ in range(round(seconds / PERIOD_S)):
        _burst(load, count)
    reading = meter.end()
    meter.close()
    [device] = reading.devices
    ratio = device.integral_j and device.integral_j / _energy(reading)
    assert reading.tick_seconds is not None
    return ratio, device.integral_reason, disagreement(device, reading.seconds / reading.tick_seconds)


def disturb(share: float) -> None:
    """Keep a GPU busy for *share* of the time, in bursts, until the process is killed.

    Prints a line when it begins.
    """
    load = Matmuls()
    count = load.count(PERIOD_S * share)
    print("busy", flush=True)
    while True:
        _burst(load, count)
