"""Examine the machine for ``llem doctor``, and determine how ``energy.backend: auto`` obtains energy on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_llem.doctor import gpus, host, software
from pytest_llem.doctor.findings import findings
from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import EnergyAccess, Examination, GpuReport, Meter, Rapl
from pytest_llem.hardware.gpus import is_cpu_build
from pytest_llem.hardware.sensors import is_module
from pytest_llem.machine.device_locks import CPU
from pytest_llem.results.environment import package_version

#: Source of energy by the boundary of a RAPL domain.
_SOURCES = {"cpu_package": "rapl_package", "dram": "rapl_dram"}


def examine(python: Path | None = None, seconds: float = 60.0) -> Examination:
    """Return everything that ``llem doctor`` finds on this machine.

    No CUDA context is created, and this process does not import torch.

    Args:
        python: The interpreter whose engines are examined; None for this one.
        seconds: Time limit of the driver, and of the import of each engine, in s.
    """
    cpu = host.cpu()  # first, because the processes below raise the load
    with ProbeProcess(gpus.COMMAND) as gpu_probe, software.import_engines(python) as wait_for_imports:
        rapl, surroundings = host.rapl(), host.surroundings()
        driver, found = gpus.read_gpus(gpu_probe, seconds)
        installed = wait_for_imports(seconds)
    used = used_gpus(found, installed.torch)
    meters = software.meters()
    examination = Examination(
        version=package_version("pytest-llem") or "unknown",
        energy=energy_access(used, rapl, meters, stuck=driver.stuck and not is_cpu_build(installed.torch)),
        driver=driver,
        gpus=found,
        rapl=rapl,
        cpu=cpu,
        meters=meters,
        software=installed,
        surroundings=surroundings,
    )
    examination.findings = findings(examination, used)
    return examination


def used_gpus(gpus: Sequence[GpuReport], torch: str | None) -> list[GpuReport]:
    """Return the GPUs that an engine runs on by default: CUDA's first, or all candidates if that is unknown.

    Args:
        gpus: The GPUs of this machine.
        torch: Version of the PyTorch that engines use, or None if it is not installed.
    """
    if is_cpu_build(torch):
        return []
    visible = [gpu for gpu in gpus if gpu.visible]
    return [gpu for gpu in visible if gpu.first] or visible


def energy_access(
    gpus: Sequence[GpuReport], rapl: Rapl, meters: Sequence[Meter], *, stuck: bool = False
) -> EnergyAccess:
    """Return how energy will be obtained, and set ``auto`` and ``error`` of each of *meters*.

    Args:
        gpus: The GPUs that an engine runs on; empty for the CPU.
        rapl: The RAPL counters.
        meters: The installed meters.
        stuck: Whether the driver of GPUs that engines would use does not answer.
    """
    if stuck and not gpus:
        return EnergyAccess(method="unavailable", device="unknown", reason="the NVIDIA driver does not answer")
    device = ", ".join(gpu.uuid or f"GPU {gpu.index}" for gpu in gpus) or CPU
    refusals = {
        "nvml": _refusal(gpus) if gpus else "engines do not run on an NVIDIA GPU",
        "rapl": rapl.error,
        "estimate": "energy can be estimated only for CPUs, and engines run on a GPU" if gpus else None,
    }
    measured = [name for name in (("nvml", "rapl") if gpus else ("rapl",)) if refusals[name] is None]
    chosen = measured or [name for name in ("estimate",) if refusals[name] is None]
    for meter in meters:
        meter.auto = meter.name in chosen
        meter.error = refusals.get(meter.name)
    first = "nvml" if gpus else "rapl"
    reason = None if refusals[first] is None else f"{first.upper()}: {refusals[first]}"
    if "nvml" in chosen:
        sampled = next((gpu for gpu in gpus if not gpu.energy_counter or gpu.energy_counter_error), None)
        source, why = "nvml_total_energy", None
        if sampled is not None:
            source = sampled.power_sources[0]
            why = sampled.energy_counter_error if sampled.energy_counter else None
            why = why or "no energy counter: GPUs have one from Volta on"
        return EnergyAccess(
            method="measured" if sampled is None else "sampled",
            source=source,
            boundary="gpu_board or module" if any(is_module(gpu.name) for gpu in gpus) else "gpu_board",
            meter="nvml",
            device=device,
            reason=why,
        )
    if "rapl" in chosen:
        boundaries = "+".join(dict.fromkeys(domain.boundary for domain in rapl.domains))
        sources = "+".join(dict.fromkeys(_SOURCES[domain.boundary] for domain in rapl.domains))
        return EnergyAccess(
            method="measured", source=sources, boundary=boundaries, meter="rapl", device=device, reason=reason
        )
    if "estimate" in chosen:
        return EnergyAccess(
            method="estimated",
            source="cpu_time_model",
            boundary="cpu_package",
            meter="estimate",
            device=device,
            reason=reason,
        )
    return EnergyAccess(method="unavailable", device=device, reason=reason)


def _refusal(gpus: Sequence[GpuReport]) -> str | None:
    """Return why the meter ``nvml`` cannot read the energy of these GPUs, or None if it can."""
    for gpu in gpus:
        if reason := gpu.error or gpu.refusal:
            return reason
        if gpu.energy_counter and gpu.energy_counter_error and not gpu.power_sources:
            return f"{gpu.uuid}: {gpu.energy_counter_error}"
        if gpu.energy_counter is None:
            return f"{gpu.uuid}: no answer in time"
        if not gpu.energy_counter and not gpu.power_sources:
            return f"{gpu.uuid}: no energy counter and no power reading"
    return None
