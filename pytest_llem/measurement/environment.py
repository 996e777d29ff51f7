"""Record the environment of an experiment from within its own process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_llem.hardware.gpus import gpu_settings, newest_cuda
from pytest_llem.hardware.limits import limits
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.environment import host_environment


def environment(gpus: Sequence[str], directory: Path | None = None) -> dict[str, Any]:
    """Return the host's environment, and the NVML settings of each GPU that the engine runs on.

    Call it outside of the window: a call to NVML may take 4 ms, and git reads every file.

    Args:
        gpus: UUIDs of the GPUs that the engine runs on.
        directory: Directory whose git commit is recorded; None for the current directory.

    Returns:
        :func:`pytest_llem.results.environment.host_environment`, :func:`pytest_llem.hardware.limits.limits`,
        ``cuda_driver`` (the newest CUDA version that the driver supports), and ``gpus`` (a mapping for each).
    """
    found = host_environment(directory) | limits()
    if not gpus:
        return found | {"cuda_driver": None, "gpus": []}
    with Nvml() as nvml:
        return found | {"cuda_driver": newest_cuda(nvml), "gpus": [gpu_settings(nvml, uuid) for uuid in gpus]}
