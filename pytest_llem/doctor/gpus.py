"""The GPUs and their driver, as a process of its own has told of them within its time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Driver, GpuReport
from pytest_llem.machine.devices import holder

COMMAND = (sys.executable, "-P", "-m", "pytest_llem.doctor.gpu_probe")

#: Any of these is a sign of an NVIDIA device, or of its driver.
_SIGNS = ("dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")


def read_gpus(asked: ProbeProcess, seconds: float, root: Path = Path("/")) -> tuple[Driver, list[GpuReport]]:
    """Return the driver and the GPUs of this machine.

    Args:
        asked: A process that runs :data:`COMMAND`.
        seconds: How long it may take.
        root: Where ``dev`` and ``proc`` are.
    """
    said, failure = asked.answer(seconds)
    driver: dict[str, Any] = {"present": any((root / sign).exists() for sign in _SIGNS)}
    gpus: dict[int, dict[str, Any]] = {}
    doing = "it"
    for line in said.splitlines():
        try:
            one = json.loads(line)
        except ValueError:  # cut off, or a library's own words
            continue
        if not isinstance(one, dict):
            continue
        doing = one.get("doing", doing)
        driver |= one.get("driver", {})
        if found := one.get("gpu"):
            gpus.setdefault(found["index"], {}).update(found)
    if failure is not None:
        stuck = failure.startswith("no answer")
        driver |= {"error": f"{failure} while {doing} was asked", "stuck": stuck}
        driver["present"] = driver["present"] or stuck
    found_gpus = [GpuReport.model_validate(found) for _, found in sorted(gpus.items())]
    for gpu in found_gpus:
        if gpu.uuid is not None and (owner := holder(gpu.uuid)):
            gpu.held_by = str(owner)
    return Driver.model_validate(driver), found_gpus
