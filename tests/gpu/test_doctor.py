"""``llem doctor`` on a real GPU: its report is correct, and it does not use the GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from pytest_llem.doctor.records import Examination
from pytest_llem.hardware.gpu_state import gpu_sensors
from pytest_llem.hardware.gpus import Gpu

#: A CUDA context takes some hundreds of MB.
_CONTEXT_BYTES = 100e6


def test_doctor_reports_gpu_without_using_it(gpu: Gpu, found: Callable[[str, object], None]) -> None:
    command = [sys.executable, "-m", "pytest_llem.cli", "doctor", "--format", "json"]
    with gpu_sensors() as look:
        before = most = look()[gpu.uuid].used_bytes or 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                most = max(most, look()[gpu.uuid].used_bytes or 0)
                time.sleep(0.01)
            out = process.stdout.read() if process.stdout else ""
    assert process.returncode in (0, 1)
    assert most - before < _CONTEXT_BYTES, "no CUDA context is made"
    seen = Examination.model_validate_json(out)
    (examined,) = [one for one in seen.gpus if one.uuid == gpu.uuid]
    assert (examined.name, examined.driver, examined.first, examined.refusal) == (gpu.name, gpu.driver, True, None)
    found("tick in ms", examined.tick_ms)
    found("a call in ms", examined.call_ms)
    found("power sources", ", ".join(examined.power_sources))
    found("clocks", f"{examined.sm_clock_mhz} of {examined.max_sm_clock_mhz} MHz, due to {examined.clock_reasons}")
    found("a clock to lock them at", examined.sustained_clock_mhz)
    found("problems", "; ".join(f"{one.severity}: {one.about}: {one.message}" for one in seen.findings))
    assert examined.energy_counter_error is None
    assert examined.tick_ms is not None
    assert 5 < examined.tick_ms < 500
    assert examined.call_ms is not None
    assert examined.call_ms < examined.tick_ms
    assert (seen.energy.method, seen.energy.source) == ("measured", "nvml_total_energy")
