"""What NVML tells of this machine's GPUs, asked in a process of its own: with a dead driver a call never returns.

    python -P -m pytest_llem.doctor.gpu_probe

Standard output takes a JSON object a line, as things become known: ``{"doing": …}`` before what may take for ever,
``{"driver": …}``, and a ``{"gpu": …}`` for each, and once more when the counters were watched. No CUDA context is
made.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pytest_llem.energy.gpu_source import COUNTER, find_source
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.ticks import period, ticks
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
    lasting_clock_mhz,
    power_sources,
    power_w,
    temperature_c,
)

#: Ticks that are waited for: half a second of them on most boards.
_TICKS = 6

_COMPUTE_MODES = {0: "default", 1: "exclusive", 2: "prohibited", 3: "exclusive"}


def main() -> None:
    """Tell of the driver and of every board."""
    _tell("doing", "nvmlInit")
    with Nvml() as nvml:
        if not nvml.is_open:
            _tell("driver", {"error": nvml.error})
            return
        _tell("doing", "nvmlSystemGetDriverVersion")
        driver = nvml.ask("nvmlSystemGetDriverVersion")
        _tell("driver", {"version": driver, "cuda": newest_cuda(nvml)})
        _tell("doing", "nvmlDeviceGetHandleByIndex")
        handles, visible = all_handles(nvml), visible_handles(nvml)
        answering: dict[str, int] = {}
        for index, (uuid, handle) in enumerate(handles.items()):
            _tell("doing", f"GPU {index}")
            if handle is None:
                nvml.ask("nvmlDeviceGetHandleByIndex", index)
                _tell("gpu", {"index": index, "visible": uuid in visible.lost, "error": nvml.error})
                continue
            answering[uuid] = index
            place = {"index": index, "visible": uuid in visible.by_uuid, "first": uuid == visible.first}
            _tell("gpu", place | _gpu(nvml, uuid, handle))
        for uuid, index in answering.items():  # one by one: a call may take 4 ms, and they would blur each other
            _tell("doing", f"the counter of GPU {index}")
            _tell("gpu", {"index": index, **_watched(nvml, uuid, handles[uuid])})


def _gpu(nvml: Nvml, uuid: str, handle: Any) -> dict[str, Any]:
    """Return what is known of a board."""
    known = read_gpu(nvml, uuid, handle)
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    sources = power_sources(nvml, handle)
    try:
        find_source(nvml, uuid)
        refusal = None
    except MeterUnavailableError as error:
        refusal = str(error)
    using = gpu_processes(nvml, handle)
    return gpu_settings(nvml, uuid) | {
        "capability": "{}.{}".format(*known.capability) if known.capability else None,
        "used_mb": round(memory.used / 1e6) if memory is not None else None,
        "power_sources": sources,
        "power_w": power_w(nvml, handle, sources[0]) if sources else None,
        "temperature_c": temperature_c(nvml, handle),
        "refusal": refusal,
        "compute_mode": _COMPUTE_MODES.get(nvml.ask("nvmlDeviceGetComputeMode", handle)),
        "lasting_clock_mhz": lasting_clock_mhz(nvml, handle),
        "users": None
        if using is None
        else [
            {"pid": one.pid, "name": one.name, "used_mb": _mb(one.used_bytes)}
            for one in using
            if one.pid != os.getpid()
        ],
    }


def _watched(nvml: Nvml, uuid: str, handle: Any) -> dict[str, Any]:
    """Watch a board's counter tick, and its clocks meanwhile; return what was seen."""
    most = nvml.ask("nvmlDeviceGetMaxClockInfo", handle, nvml.constant("NVML_CLOCK_SM"))
    before, _ = clocks_mhz(nvml, handle)
    calls: list[float] = []
    counts, failure, tick_s = True, None, None
    try:
        nvml.call(COUNTER, handle)
    except NvmlError as error:
        counts, failure = False, str(error)
    else:
        seen = ticks({uuid: _timed(partial(nvml.call, COUNTER, handle), calls)}, _TICKS)[uuid]
        failure = seen if isinstance(seen, str) else None
        tick_s = None if isinstance(seen, str) else period(seen)
    reasons = clock_reasons(nvml, handle)
    return {
        "energy_counter": counts,
        "energy_counter_error": failure,
        "tick_ms": round(tick_s * 1e3, 2) if tick_s is not None else None,
        "call_ms": round(statistics.median(calls) * 1e3, 4) if calls else None,
        "clock_reasons": reasons,
        "clocks_held": _held(reasons, before, clocks_mhz(nvml, handle)[0], most),
    }


def _timed(read: Callable[[], int], calls: list[float]) -> Callable[[], int]:
    """Return *read*, which then notes in *calls* how long each took, in s."""

    def timed() -> int:
        began = time.monotonic()
        try:
            return read()
        finally:
            calls.append(time.monotonic() - began)

    return timed


def _held(reasons: list[str] | None, before: float | None, after: float | None, most: float | None) -> bool | None:
    """Return whether a setting holds the clocks, as far as it shows: NVML has no call for that."""
    if reasons is not None and SETTING in reasons:
        return True
    resting = reasons is not None and IDLE in reasons and after and most and after < most / 2
    return False if resting or before != after else None  # they go down and up by themselves


def _mb(size: int | None) -> int | None:
    return round(size / 1e6) if size is not None else None


def _tell(what: str, told: object) -> None:
    print(json.dumps({what: told}), flush=True)


if __name__ == "__main__":
    main()
