"""Measure windows of GPUs with Zeus or with our own meter, in an environment that has it.

    python windows.py zeus|ours UUID …

The UUIDs are those of all GPUs, in NVML's order. Prints ``ready``, reads a JSON array of windows, each the begin
and end on the monotonic clock, and prints an array with the readings of each:
``{"energy_j": [… or null], "seconds": [… or null], "uncertainty_j": [… or null]}``, one entry for each GPU.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def main(name: str, uuids: Sequence[str]) -> None:
    measure, close = {"zeus": _zeus, "ours": _ours}[name](uuids)
    print("ready", flush=True)
    found = [measure(*window) for window in json.loads(sys.stdin.readline())]
    print(json.dumps(found), flush=True)
    close()


def _until(instant: float) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))


def _zeus(uuids: Sequence[str]) -> tuple[Callable[..., Any], Callable[[], None]]:
    from zeus.monitor import ZeusMonitor

    warnings.simplefilter("ignore")  # of an energy of 0
    monitor = ZeusMonitor(gpu_indices=list(range(len(uuids))), cpu_indices=[])

    def measure(began: float, ended: float) -> dict[str, Any]:
        _until(began)
        monitor.begin_window("window", sync_execution=False)
        _until(ended)
        found = monitor.end_window("window", sync_execution=False)
        energies = [found.gpu_energy[place] for place in range(len(uuids))]
        return {
            "energy_j": energies,
            "seconds": [found.time for _ in uuids],
            "uncertainty_j": [None for _ in uuids],
        }

    return measure, lambda: None


def _ours(uuids: Sequence[str]) -> tuple[Callable[..., Any], Callable[[], None]]:
    from pytest_llem.energy.nvml import NvmlMeter

    meter = NvmlMeter()
    meter.open(uuids)

    def measure(began: float, ended: float) -> dict[str, Any]:
        _until(began)
        meter.begin()
        _until(ended)
        devices = meter.end().devices
        return {key: [getattr(one, key) for one in devices] for key in ("energy_j", "seconds", "uncertainty_j")}

    return measure, meter.close


if __name__ == "__main__":  # Zeus' own processes import this again
    main(sys.argv[1], sys.argv[2:])
