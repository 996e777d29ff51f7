"""Read sensors of scripted GPUs. Imports little, as each reading starts a process."""

from __future__ import annotations

from pytest_llem.hardware.gpu_state import GpuState, gpu_sensors
from tests.support.nvml import Script


def read() -> dict[str, GpuState]:
    """Return the state of each GPU by UUID."""
    with gpu_sensors() as look:
        return dict(look())


def read_and_release(script: Script) -> tuple[dict[str, GpuState], int, int]:
    """Return the state of each GPU by UUID, and the number of NVML users during and after the reading."""
    with gpu_sensors() as look:
        held = script.users()
        seen = dict(look())
    assert look() == {}
    return seen, held, script.users()
