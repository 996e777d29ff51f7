"""Read the GPUs and their driver from the output of the probe process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Driver, GpuReport
from pytest_llem.machine.owner import holder

COMMAND = (sys.executable, "-P", "-m", "pytest_llem.doctor.gpu_probe")

#: Paths of which any shows that there is an NVIDIA device or driver.
_NVIDIA_PATHS = ("dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")


def read_gpus(probe: ProbeProcess, seconds: float, root: Path = Path("/")) -> tuple[Driver, list[GpuReport]]:
    """Return the driver and the GPUs of this machine.

    Args:
        probe: A process that runs :data:`COMMAND`.
        seconds: Time limit of the process, in s.
        root: The directory of ``dev`` and ``proc``.
    """
    output, failure = probe.answer(seconds)
    driver: dict[str, Any] = {"present": any((root / path).exists() for path in _NVIDIA_PATHS)}
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
