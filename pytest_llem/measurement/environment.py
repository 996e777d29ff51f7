"""The experiment's surroundings, as its own process sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pytest_llem.results.environment import host_environment


def environment(gpus: Sequence[str]) -> dict[str, Any]:
    """Return the host's environment and, for each GPU the engine runs on, what NVML knows of it."""
    return host_environment() | {"gpus": [_gpu(uuid) for uuid in gpus]}


def _gpu(uuid: str) -> dict[str, Any]:
    import pynvml

    found: dict[str, Any] = {"uuid": uuid}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return found | {"nvml": str(error)}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        for name, ask in {
            "name": lambda: pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion,
            "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "memory_mb": lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e6),
            "persistence_mode": lambda: bool(pynvml.nvmlDeviceGetPersistenceMode(handle)),
        }.items():
            try:
                found[name] = ask()
            except pynvml.NVMLError:
                found[name] = None  # this board does not tell
    except pynvml.NVMLError as error:
        found["nvml"] = str(error)
    finally:
        with suppress(pynvml.NVMLError):  # what is known is known
            pynvml.nvmlShutdown()
    return found
