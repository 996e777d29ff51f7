"""How a GPU is set: its limits, modes and clocks, as NVML tells them."""

from __future__ import annotations

from typing import Any

from pytest_llem.hardware.gpus import board
from pytest_llem.hardware.nvml import Nvml


def newest_cuda(nvml: Nvml) -> str | None:
    """Return the newest CUDA that the driver runs, such as ``12.8``; None where it does not tell."""
    newest = nvml.ask("nvmlSystemGetCudaDriverVersion")
    return f"{newest // 1000}.{newest % 1000 // 10}" if newest is not None else None


def settings(nvml: Nvml, uuid: str) -> dict[str, Any]:
    """Return how a GPU is set: power in W, clocks in MHz. What NVML does not tell is None."""
    handle = nvml.ask("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return {"uuid": uuid, "nvml": nvml.error}
    known = board(nvml, uuid, handle)
    default_limit = nvml.ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
    return {
        "uuid": uuid,
        "name": known.name,
        "driver": known.driver,
        "power_limit_w": known.power_limit_w,
        "default_power_limit_w": default_limit / 1000 if default_limit is not None else None,
        "memory_mb": round(known.memory_bytes / 1e6) if known.memory_bytes is not None else None,
        "persistence_mode": known.persistence_mode,
        "ecc_mode": _current(nvml.ask("nvmlDeviceGetEccMode", handle)),
        "mig_mode": _current(nvml.ask("nvmlDeviceGetMigMode", handle)),
        **_clocks(nvml, handle),
        "pcie_generation": nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),  # an idle link is slower
        "pcie_width": nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
    }


def _clocks(nvml: Nvml, handle: Any) -> dict[str, int | None]:
    """Return the clocks of processors and memory: as they are, at most, and as applications are to have them."""
    kinds = (("sm", nvml.constant("NVML_CLOCK_SM")), ("memory", nvml.constant("NVML_CLOCK_MEM")))
    calls = (
        ("{}_clock_mhz", "nvmlDeviceGetClockInfo"),
        ("max_{}_clock_mhz", "nvmlDeviceGetMaxClockInfo"),
        ("application_{}_clock_mhz", "nvmlDeviceGetApplicationsClock"),
    )
    return {key.format(kind): nvml.ask(call, handle, constant) for key, call in calls for kind, constant in kinds}


def _current(modes: Any) -> bool | None:
    """Return whether a mode is on, of what NVML gives: the current and the pending one."""
    return bool(modes[0]) if modes is not None else None
