"""The examination: everything that is asked, and what comes of it."""

from __future__ import annotations

from pathlib import Path

from pytest_llem.doctor import gpus, host, software
from pytest_llem.doctor.findings import findings
from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Examination
from pytest_llem.doctor.verdict import used_gpus, verdict
from pytest_llem.hardware.gpus import is_cpu_build


def examine(python: Path | None = None, seconds: float = 60.0) -> Examination:
    """Look at this machine. No CUDA context is made, and torch is not imported here.

    Args:
        python: The interpreter whose engines are looked at; None for this one.
        seconds: How long the driver, and an engine's import, may take.
    """
    cpu = host.cpu()  # before we make a load ourselves
    with ProbeProcess(gpus.COMMAND) as boards, software.Imports(python) as imports:
        rapl, around = host.rapl(), host.surroundings()
        driver, found = gpus.read_gpus(boards, seconds)
        installed = imports.found(seconds)
    torch = next((package.version for package in installed.packages if package.name == "torch"), None)
    used = used_gpus(found, torch)
    meters = software.meters()
    examination = Examination(
        version=software.version(),
        verdict=verdict(used, rapl, meters, stuck=driver.stuck and not is_cpu_build(torch)),
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
