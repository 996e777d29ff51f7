"""Examine the machine for ``llem doctor``."""

from __future__ import annotations

from pathlib import Path

from pytest_llem.doctor import gpus, host, software
from pytest_llem.doctor.findings import findings
from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Examination
from pytest_llem.doctor.verdict import used_gpus, verdict
from pytest_llem.hardware.gpus import is_cpu_build
from pytest_llem.results.environment import package_version


def examine(python: Path | None = None, seconds: float = 60.0) -> Examination:
    """Return everything that ``llem doctor`` finds on this machine.

    No CUDA context is created, and this process does not import torch.

    Args:
        python: The interpreter whose engines are examined; None for this one.
        seconds: Time limit of the driver, and of the import of each engine, in s.
    """
    cpu = host.cpu()  # first, because the processes below raise the load
    with ProbeProcess(gpus.COMMAND) as gpu_probe, software.import_engines(python) as wait_for_imports:
        rapl, around = host.rapl(), host.surroundings()
        driver, found = gpus.read_gpus(gpu_probe, seconds)
        installed = wait_for_imports(seconds)
    used = used_gpus(found, installed.torch)
    meters = software.meters()
    examination = Examination(
        version=package_version("pytest-llem") or "unknown",
        verdict=verdict(used, rapl, meters, stuck=driver.stuck and not is_cpu_build(installed.torch)),
        driver=driver,
        gpus=found,
        rapl=rapl,
        cpu=cpu,
        meters=meters,
        software=installed,
        surroundings=around,
    )
    examination.findings = findings(examination, used)
    return examination
