"""GPU memory is free again however an experiment ends."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem import ExperimentError, IsolatedExperiment
from pytest_llem.hardware.gpus import Gpu
from pytest_llem.hardware.nvml import Nvml

Found = Callable[[str, object], None]


def _has_context() -> bool:
    """Return whether this process has a CUDA context on device 0."""
    cuda, device, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    return bool(active.value)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("pytorch", None), ("tests.gpu.engines:Raises", "exception"), ("tests.gpu.engines:Dies", "crash")],
)
def test_gpu_memory_is_free_after_any_end(
    isolated_experiment: IsolatedExperiment,
    llama_1b: Path,
    gpu: Gpu,
    found: Found,
    engine: str,
    kind: str | None,
) -> None:
    config = {
        "model": str(llama_1b),
        "backend": engine,
        "n": 1,
        "max_output_tokens": 8,
        "warmup": {"enabled": False},
        "baseline": {"enabled": False},
        "measurement": {"min_window_seconds": 0},
    }
    with Nvml() as nvml:
        handle = nvml.call("nvmlDeviceGetHandleByUUID", gpu.uuid)

        def used() -> int:
            return int(nvml.call("nvmlDeviceGetMemoryInfo", handle).used)

        before = used()
        if kind is None:
            isolated_experiment(config)
        else:
            with pytest.raises(ExperimentError) as failed:
                isolated_experiment(config)
            assert failed.value.error.kind == kind
        began = time.monotonic()
        while used() - before > 2**20 and time.monotonic() - began < 10:
            time.sleep(0.05)
        found("memory left, bytes", used() - before)
        found("s until it was free", time.monotonic() - began)
        assert used() - before <= 2**20
        holders = nvml.call("nvmlDeviceGetComputeRunningProcesses", handle)
        assert os.getpid() not in [one.pid for one in holders]
    assert not _has_context()  # in a container, NVML may report pids of the host
