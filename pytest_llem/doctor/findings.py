"""Derive the findings of ``llem doctor`` from the examination, each with advice and commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_llem.doctor.gpu_findings import gpu_findings, visibility_findings
from pytest_llem.doctor.host import HUB, LOCKS, RESULTS, TEMPORARY
from pytest_llem.doctor.records import (
    SEVERITIES,
    Cpu,
    Driver,
    EnergyAccess,
    Examination,
    Finding,
    GpuReport,
    Rapl,
    Severity,
    Software,
    Surroundings,
)
from pytest_llem.hardware.gpus import is_cpu_build

#: Less free disk space than this is a finding, in MB.
MIN_FREE_MB = 2_000

#: A machine is busy if its load exceeds both this share of its CPUs and this number of CPUs.
_BUSY_SHARE, _BUSY_CPUS = 0.1, 0.5

#: Governors under which the clock does not follow the load; a clock that the user sets has ``userspace``.
_FIXED_CLOCK = {"performance", "userspace"}

_RAPL_COMMANDS = [
    'sudo chgrp -R "$(id -gn)" /sys/class/powercap/intel-rapl/',
    "sudo find /sys/class/powercap/intel-rapl/ -name energy_uj -exec chmod g+r {} +",
]


def findings(examination: Examination, used: Sequence[GpuReport]) -> list[Finding]:
    """Return the findings, worst first.

    Args:
        examination: The examination so far.
        used: The GPUs that an engine runs on by default.
    """
    found = [
        *_driver(examination, used),
        *_torch(examination.software, examination.driver, examination.gpus, examination.energy),
        *visibility_findings(examination.gpus, examination.surroundings),
        *gpu_findings([gpu for gpu in examination.gpus if gpu.visible], used, examination.surroundings),
        *_rapl(examination.rapl, examination.cpu, examination.surroundings, on_gpu=bool(used)),
        *_engines(examination.software),
        *_cpu(examination.cpu, on_gpu=bool(used)),
        *_surroundings(examination.surroundings),
    ]
    if examination.energy.method != "measured" and not any(one.severity == "blocks" for one in found):
        reason = examination.energy.reason or "no meter reads this machine"
        found.append(Finding(severity="blocks", about="energy", message=reason))
    return sorted(found, key=lambda one: SEVERITIES.index(one.severity))


def _driver(examination: Examination, used: Sequence[GpuReport]) -> Iterator[Finding]:
    driver, gpus, surroundings = examination.driver, examination.gpus, examination.surroundings
    if driver.error is not None and driver.present:
        if driver.stuck:
            advice, commands = "the driver hangs: reset the GPU or reboot", ["sudo dmesg | grep -i nvrm"]
        elif surroundings.container is not None:
            advice, commands = "give the container access to the GPU, for example with docker run --gpus all", []
        else:
            advice, commands = "NVIDIA's own tool may show the cause", ["nvidia-smi"]
        cpu_only = examination.energy.method == "measured" and is_cpu_build(examination.software.torch)
        severity: Severity = "hinders" if cpu_only else "blocks"
        yield Finding(severity=severity, about="NVML", message=driver.error, advice=advice, commands=commands)
    hidden = [gpu for gpu in gpus if not gpu.visible]
    if gpus and len(hidden) == len(gpus):
        visible = surroundings.cuda_visible_devices or ""
        message = f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs from experiments"
        yield Finding(severity="note", about="GPUs", message=message)


def _torch(
    software: Software, driver: Driver, gpus: Sequence[GpuReport], energy: EnergyAccess
) -> Iterator[Finding]:
    torch = software.torch
    if not any(gpu.visible for gpu in gpus):
        return
    if torch is not None and is_cpu_build(torch):
        yield Finding(
            severity="hinders" if energy.method == "measured" else "blocks",
            about="torch",
            message=f"torch {torch} is a CPU-only build, and does not use the GPU",
            advice="install a CUDA build",
        )
    built_for = next((engine.torch_cuda for engine in software.engines if engine.torch_cuda), None)
    if built_for and driver.cuda and _major_minor(built_for) > _major_minor(driver.cuda):
        # A driver runs builds for later minor versions of its major version.
        newer_major = _major_minor(built_for)[0] > _major_minor(driver.cuda)[0]
        yield Finding(
            severity="blocks" if newer_major else "note",
            about="torch",
            message=f"{_versioned('torch', torch)} is built for CUDA {built_for}, "
            f"but {_versioned('driver', driver.version)} runs up to {driver.cuda}",
            advice="install a newer driver, or a torch build for an older CUDA" if newer_major else None,
        )


def _versioned(name: str, version: str | None) -> str:
    return name if version is None else f"{name} {version}"


def _rapl(rapl: Rapl, cpu: Cpu, surroundings: Surroundings, *, on_gpu: bool) -> Iterator[Finding]:
    if rapl.error is None:
        return
    advice, commands = None, []
    if rapl.denied:
        advice, commands = "allow your group to read the counters, after each boot", _RAPL_COMMANDS
    elif rapl.domains:
        advice = "counters of virtual machines may not advance" if cpu.virtual_machine else None
    elif cpu.virtual_machine:
        advice = "virtual machines rarely have RAPL: measure on the host, or on a GPU"
    elif surroundings.container is not None:
        advice = "containers hide it: use docker run --security-opt systempaths=unconfined, or measure outside"
    else:
        advice = "this processor has no RAPL, or its kernel module is not loaded"
        commands = ["sudo modprobe intel_rapl_msr"]
    if on_gpu:
        message = f"CPU energy is not measured in addition to the GPU's: {rapl.error}"
        yield Finding(severity="note", about="RAPL", message=message, advice=advice, commands=commands)
    else:
        yield Finding(severity="blocks", about="RAPL", message=rapl.error, advice=advice, commands=commands)


def _engines(software: Software) -> Iterator[Finding]:
    if software.error is not None:
        yield Finding(severity="blocks", about="python", message=f"{software.executable} {software.error}")
        return
    if not software.engines:
        yield Finding(
            severity="blocks",
            about="engines",
            message="no engine is installed",
            commands=[f"{software.executable} -m pip install pytest-llem"],
        )
    usable = any(engine.error is None for engine in software.engines)
    for engine in software.engines:
        about = f"engine {engine.name}"
        if engine.error is None:
            continue
        if usable and not engine.installed:
            yield Finding(severity="note", about=about, message=f"is not installed: it {engine.error}")
        else:
            severity: Severity = "hinders" if usable else "blocks"
            yield Finding(severity=severity, about=about, message=f"cannot be used: {engine.error}")


def _cpu(cpu: Cpu, *, on_gpu: bool) -> Iterator[Finding]:
    if cpu.held_by is not None and not on_gpu:
        message = f"an experiment holds its lease: {cpu.held_by}"
        yield Finding(
            severity="hinders", about="CPU", message=message, advice="other experiments wait until it ends"
        )
    elif cpu.load is not None and cpu.load > max(_BUSY_CPUS, _BUSY_SHARE * (cpu.count or 1)):
        yield Finding(
            severity="hinders",
            about="CPU",
            message=f"it is busy: the load average of the last minute is {cpu.load:g} on {cpu.count} CPUs",
            advice="stop other processes, and wait",
        )
    if cpu.limit is not None and cpu.limit < (cpu.count or 0):
        yield Finding(
            severity="note" if on_gpu else "hinders",
            about="CPU",
            message=f"a control group limits this process to the time of {cpu.limit:g} of {cpu.count} CPUs",
            advice=f"use no more threads than that: OMP_NUM_THREADS={max(1, int(cpu.limit))}",
        )
    if cpu.governor is not None and not _FIXED_CLOCK.issuperset(cpu.governor.split(", ")):
        yield Finding(
            severity="note" if on_gpu else "hinders",
            about="CPU",
            message=f"its clock frequency follows the load (governor {cpu.governor})",
            advice="set the governor to performance, until the next boot",
            commands=["sudo cpupower frequency-set -g performance"],
        )
    if cpu.virtual_machine and not on_gpu:
        yield Finding(
            severity="note",
            about="CPU",
            message="a virtual machine: others may share its cores unseen",
        )


def _surroundings(surroundings: Surroundings) -> Iterator[Finding]:
    if surroundings.os != "Linux":
        yield Finding(severity="blocks", about="system", message=f"{surroundings.os} is not supported: use Linux")
    if surroundings.container is not None:
        message = f"this is a container ({surroundings.container}): processes outside of it are not visible"
        yield Finding(severity="note", about="container", message=message)
    limit_mb, memory_mb = surroundings.memory_limit_mb, surroundings.memory_mb or 0
    if limit_mb is not None and limit_mb < memory_mb:
        message = f"this process is limited to {limit_mb:,} MB of the machine's {memory_mb:,} MB"
        yield Finding(severity="note", about="memory", message=message)
    for folder in surroundings.folders:
        if folder.error is not None:
            needed = folder.purpose in (TEMPORARY, LOCKS)
            yield Finding(
                severity="blocks" if needed else "note",
                about=folder.purpose,
                message=f"{folder.path}: {folder.error}" if folder.path else folder.error,
                advice=_FOLDER_ADVICE[folder.purpose],
            )
        elif folder.free_mb is not None and folder.free_mb < MIN_FREE_MB and folder.purpose != LOCKS:
            message = f"only {folder.free_mb:,} MB are free on the disk of {folder.path}"
            yield Finding(
                severity="note", about=folder.purpose, message=message, advice=_FOLDER_ADVICE[folder.purpose]
            )


_FOLDER_ADVICE = {
    TEMPORARY: "set TMPDIR to another folder",
    LOCKS: "every experiment needs a lock file: set TMPDIR to another folder",
    RESULTS: "choose another folder with pytest --llem-results-dir",
    HUB: "set HF_HOME to another folder",
}


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
