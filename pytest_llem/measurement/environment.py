"""The experiment's surroundings, as its own process sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_llem.hardware.gpus import gpu_settings, newest_cuda
from pytest_llem.hardware.limits import limits
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.environment import host_environment


def environment(gpus: Sequence[str], directory: Path | None = None) -> dict[str, Any]:
    """Return the host's environment and, for each GPU the engine runs on, what NVML knows of it.

    To be called outside of the window: a call to NVML may take 4 ms, and git looks at every file.

    Args:
        gpus: Their UUIDs.
        directory: Whose git commit is told; None for the current directory.

    Returns:
        :func:`pytest_llem.results.environment.host_environment`, :func:`pytest_llem.hardware.limits.limits`,
        ``cuda_driver``, the newest CUDA that the driver
        runs, and ``gpus``, a mapping for each.
    """
    found = host_environment(directory) | limits()
    if not gpus:
        return found | {"cuda_driver": None, "gpus": []}
    with Nvml() as nvml:
        return found | {"cuda_driver": newest_cuda(nvml), "gpus": [gpu_settings(nvml, uuid) for uuid in gpus]}
