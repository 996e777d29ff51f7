"""The experiment's surroundings, as its own process sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_llem.hardware.gpus import board
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.results.environment import host_environment


def environment(gpus: Sequence[str]) -> dict[str, Any]:
    """Return the host's environment and, for each GPU the engine runs on, what NVML knows of it."""
    if not gpus:
        return host_environment() | {"gpus": []}
    with Nvml() as nvml:
        return host_environment() | {"gpus": [_gpu(nvml, uuid) for uuid in gpus]}


def _gpu(nvml: Nvml, uuid: str) -> dict[str, Any]:
    handle = nvml.ask("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return {"uuid": uuid, "nvml": nvml.error}
    known = board(nvml, uuid, handle)
    return {
        "uuid": uuid,
        "name": known.name,
        "driver": known.driver,
        "power_limit_w": known.power_limit_w,
        "memory_mb": round(known.memory_bytes / 1e6) if known.memory_bytes is not None else None,
        "persistence_mode": known.persistence_mode,
    }
