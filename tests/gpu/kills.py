"""Kill pytest while it measures, and see what is left."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pytest_llem.hardware.gpus import Gpu
from pytest_llem.hardware.nvml import Nvml
from tests.support.processes import gone
from tests.support.terminal import Screen, watch

#: Time to stay in the window before the kill, in s.
MEASURING_SECONDS = 5

#: Most memory that a GPU may hold more than before, in bytes.
FREE_BYTES = 2**20

#: The live line of an experiment in its window.
_MEASURING = re.compile(r"llem: .*  (measuring(?! the idle)|steady )")


class _InWindowError(Exception):
    """The experiment has been in its window for some seconds."""


def used_bytes(gpu: Gpu) -> int:
    """Return how much of a GPU's memory is in use, in bytes."""
    with Nvml() as nvml:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", gpu.uuid)
        return int(nvml.call("nvmlDeviceGetMemoryInfo", handle).used)


def kill_in_window(study: Mapping[str, Any], folder: Path, gpu: Gpu, found: Callable[[str, object], None]) -> int:
    """Kill pytest with SIGKILL some seconds after the window of *study* begins.

    Fails unless all its processes end and the GPU's memory is free again.

    Returns:
        Memory that was in use in the window, in bytes.
    """
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(study)))
    others, family = set(psutil.Process().children(recursive=True)), set()
    began: list[float] = []
    used: list[int] = []
    before = used_bytes(gpu)

    def look(screen: Screen) -> None:
        family.update(set(psutil.Process().children(recursive=True)) - others)
        if any(_MEASURING.search(line) for line in screen.lines()):
            began.append(time.monotonic())
            if began[-1] - began[0] > MEASURING_SECONDS:
                used.append(used_bytes(gpu) - before)
                raise _InWindowError

    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", f"--rootdir={folder}"]
    with pytest.raises(_InWindowError):
        watch(command, Screen(120), look, limit_s=300, folder=folder)  # the exception kills pytest
    killed = time.monotonic()
    while (left := [one for one in family if not gone(one.pid)]) or used_bytes(gpu) - before > FREE_BYTES:
        assert time.monotonic() - killed < 60, (left, used_bytes(gpu) - before)
        time.sleep(0.05)
    found("s until processes and memory were gone", time.monotonic() - killed)
    found("GPU memory left, bytes", used_bytes(gpu) - before)
    found("GPU memory in the window, GB", used[0] / 1e9)
    found("processes", len(family))
    return used[0]
