"""Read the GPUs and their driver through NVML, in a process of its own.

    python -P -m pytest_llem.doctor.gpus

A call into a hanging driver never returns. So that process prints one JSON object per line for :func:`read_gpus`:
``{"step": …}`` before each call that may hang, ``{"driver": …}``, ``{"gpu": …}`` for each GPU, and another
``{"gpu": …}`` for each after its energy counter was watched. No CUDA context is created.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Driver, GpuReport
from pytest_llem.energy.gpu import COUNTER, find_gpu
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.ticks import tick_period, wait_for_ticks
from pytest_llem.hardware.gpus import (
    all_handles,
    gpu_processes,
    gpu_settings,
    newest_cuda,
    read_gpu,
    visible_handles,
)
from pytest_llem.hardware.nvml import Nvml, NvmlError
from pytest_llem.hardware.sensors import (
    IDLE,
    SETTING,
    clock_reasons,
    clocks_mhz,
    power_sources,
    power_w,
    sustained_clock_mhz,
    temperature_c,
)
from pytest_llem.machine.owner import holder

#: Runs :func:`main`.
COMMAND = (sys.executable, "-P", "-m", "pytest_llem.doctor.gpus")

#: Paths of which any shows that there is an NVIDIA device or driver.
_NVIDIA_PATHS = ("dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")

#: Ticks of the energy counter to wait for: about half a second on most GPUs.
_TICKS = 6

_COMPUTE_MODES = {0: "default", 1: "exclusive", 2: "prohibited", 3: "exclusive"}


def read_gpus(probe: ProbeProcess, seconds: float) -> tuple[Driver, list[GpuReport]]:
    """Return the driver and the GPUs of this machine.

    Args:
        probe: A process that runs :data:`COMMAND`.
        seconds: Time limit of the process, in s.
    """
    output, failure = probe.answer(seconds)
    driver: dict[str, Any] = {"present": any(Path("/", path).exists() for path in _NVIDIA_PATHS)}
    gpus: dict[int, dict[str, Any]] = {}
    step = "start"
    for line in output.splitlines():
        try:
            one = json.loads(line)
        except ValueError:  # an incomplete line, or output of a library
            continue
        if not isinstance(one, dict):
            continue
        step = one.get("step", step)
        driver |= one.get("driver", {})
        if found := one.get("gpu"):
            gpus.setdefault(found["index"], {}).update(found)
    if failure is not None:
        stuck = failure.startswith("no answer")
        driver |= {"error": f"{failure}; last step: {step}", "stuck": stuck}
        driver["present"] = driver["present"] or stuck
    found_gpus = [GpuReport.model_validate(found) for _, found in sorted(gpus.items())]
    for gpu in found_gpus:
        if gpu.uuid is not None and (owner := holder(gpu.uuid)):
            gpu.held_by = str(owner)
    return Driver.model_validate(driver), found_gpus


def main() -> None:
    """Print the driver and every GPU. Runs in the process of :data:`COMMAND`."""
    _report("step", "nvmlInit")
    with Nvml() as nvml:
        if not nvml.is_open:
            _report("driver", {"error": nvml.error})
            return
        _report("step", "nvmlSystemGetDriverVersion")
        driver = nvml.ask("nvmlSystemGetDriverVersion")
        _report("driver", {"version": driver, "cuda": newest_cuda(nvml)})
        _report("step", "nvmlDeviceGetHandleByIndex")
        handles, visible = all_handles(nvml), visible_handles(nvml)
        answering: dict[str, int] = {}
        for index, (uuid, handle) in enumerate(handles.items()):
            _report("step", f"GPU {index}")
            if handle is None:  # the GPU is lost: it does not respond
                nvml.ask("nvmlDeviceGetHandleByIndex", index)
                visible_but_lost = uuid in visible.lost
                _report("gpu", {"index": index, "visible": visible_but_lost, "error": nvml.error})
                continue
            answering[uuid] = index
            identity = {"index": index, "visible": uuid in visible.by_uuid, "first": uuid == visible.first}
            _report("gpu", identity | _gpu(nvml, uuid, handle))
        # One GPU after the other, because a call may take 4 ms, which would delay the reads of the others.
        for uuid, index in answering.items():
            _report("step", f"the counter of GPU {index}")
            _report("gpu", {"index": index, **_watch_counter(nvml, uuid, handles[uuid])})


def _gpu(nvml: Nvml, uuid: str, handle: Any) -> dict[str, Any]:
    """Return the facts of a GPU, as fields of ``GpuReport``."""
    known = read_gpu(nvml, uuid, handle)
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    sources = power_sources(nvml, handle)
    try:
        find_gpu(nvml, uuid)
        refusal = None
    except MeterUnavailableError as error:
        refusal = str(error)
    processes = gpu_processes(nvml, handle)
    return gpu_settings(nvml, uuid) | {
        "capability": "{}.{}".format(*known.capability) if known.capability else None,
        "used_mb": round(memory.used / 1e6) if memory is not None else None,
        "power_sources": sources,
        "power_w": power_w(nvml, handle, sources[0]) if sources else None,
        "temperature_c": temperature_c(nvml, handle),
        "refusal": refusal,
        "compute_mode": _COMPUTE_MODES.get(nvml.ask("nvmlDeviceGetComputeMode", handle)),
        "sustained_clock_mhz": sustained_clock_mhz(nvml, handle),
        "users": None
        if processes is None
        else [
            {"pid": one.pid, "name": one.name, "used_mb": _mb(one.used_bytes)}
            for one in processes
            if one.pid != os.getpid()
        ],
    }


def _watch_counter(nvml: Nvml, uuid: str, handle: Any) -> dict[str, Any]:
    """Wait for ticks of a GPU's counter, compare the GPU's clocks before and after, and return the result."""
    max_mhz = nvml.ask("nvmlDeviceGetMaxClockInfo", handle, nvml.constant("NVML_CLOCK_SM"))
    before, _ = clocks_mhz(nvml, handle)
    calls: list[float] = []
    has_counter, failure, tick_s = True, None, None
    try:
        nvml.call(COUNTER, handle)
    except NvmlError as error:
        has_counter, failure = False, str(error)
    else:
        seen = wait_for_ticks({uuid: _timed(partial(nvml.call, COUNTER, handle), calls)}, _TICKS)[uuid]
        failure = seen if isinstance(seen, str) else None
        tick_s = None if isinstance(seen, str) else tick_period(seen)
    reasons = clock_reasons(nvml, handle)
    return {
        "energy_counter": has_counter,
        "energy_counter_error": failure,
        "tick_ms": round(tick_s * 1e3, 2) if tick_s is not None else None,
        "call_ms": round(statistics.median(calls) * 1e3, 4) if calls else None,
        "clock_reasons": reasons,
        "clocks_held": _are_clocks_locked(reasons, before, clocks_mhz(nvml, handle)[0], max_mhz),
    }


def _timed(read: Callable[[], int], calls: list[float]) -> Callable[[], int]:
    """Return *read* wrapped so that it appends the duration of each call, in s, to *calls*."""

    def timed() -> int:
        began = time.monotonic()
        try:
            return read()
        finally:
            calls.append(time.monotonic() - began)

    return timed


def _are_clocks_locked(
    reasons: list[str] | None, before: float | None, after: float | None, max_mhz: float | None
) -> bool | None:
    """Return whether a setting locks the clocks, or None if unknown: NVML has no call for that."""
    if reasons is not None and SETTING in reasons:
        return True
    # Clocks that drop when the GPU is idle, or change by themselves, are not locked.
    is_low = reasons is not None and IDLE in reasons and after and max_mhz and after < max_mhz / 2
    return False if is_low or before != after else None


def _mb(size_bytes: int | None) -> int | None:
    return round(size_bytes / 1e6) if size_bytes is not None else None


def _report(key: str, value: object) -> None:
    print(json.dumps({key: value}), flush=True)


if __name__ == "__main__":
    main()
