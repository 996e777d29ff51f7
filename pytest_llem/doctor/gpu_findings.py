"""Derive the findings of ``llem doctor`` about GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_llem.doctor.records import Finding, GpuReport, Severity, Surroundings
from pytest_llem.hardware.gpus import invalid_entry
from pytest_llem.hardware.sensors import IDLE, SETTING

#: A GPU is in use if its used memory exceeds both this share and this size in MB: drivers use hundreds of MB.
_USED_SHARE, _USED_MB = 0.02, 1_100


def gpu_findings(
    gpus: Sequence[GpuReport], used: Sequence[GpuReport], surroundings: Surroundings
) -> Iterator[Finding]:
    """Yield the findings about the GPUs that experiments may use.

    Args:
        gpus: The GPUs that experiments may use.
        used: The GPUs that an engine runs on by default.
        surroundings: Environment variables of CUDA, and whether this is a container.
    """
    for gpu in gpus:
        yield from _gpu(gpu, gpu in used, surroundings)
    yield from _settings(gpus)


def visibility_findings(gpus: Sequence[GpuReport], surroundings: Surroundings) -> Iterator[Finding]:
    """Yield findings about what makes it unclear on which GPUs experiments run.

    Args:
        gpus: All GPUs of this machine.
        surroundings: Environment variables of CUDA, and whether this is a container.
    """
    visible = surroundings.cuda_visible_devices
    uuids = [gpu.uuid or f"lost {gpu.index}" for gpu in gpus]
    if gpus and visible is not None and (entry := invalid_entry(uuids, visible)) is not None:
        hidden = not any(gpu.visible for gpu in gpus)
        yield Finding(
            severity="blocks" if hidden else "hinders",
            about="CUDA_VISIBLE_DEVICES",
            message=f"CUDA does not accept {entry!r} in {visible!r}, and uses only the entries before it"
            + (", so engines run on the CPU" if hidden else ""),
            advice=f"name all GPUs by their UUIDs, or all by index from 0 to {len(gpus) - 1}",
        )
    candidates = [gpu.uuid for gpu in gpus if gpu.visible]
    has_index = visible is not None and any(entry.strip().isdecimal() for entry in visible.split(","))
    is_ordered = surroundings.cuda_device_order == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) == 1
    if not has_index or len(candidates) < 2 or is_ordered or any(gpu.first for gpu in gpus):
        return
    answering = next((uuid for uuid in candidates if uuid is not None), "UUID")
    problem = "CUDA may number these different GPUs in another order than nvidia-smi"
    yield Finding(
        severity="hinders",
        about=f"CUDA_VISIBLE_DEVICES={visible}",
        message=f"{problem}: which of them is meant is unknown",
        advice="number them in PCI bus order, or name one by its UUID",
        commands=["export CUDA_DEVICE_ORDER=PCI_BUS_ID", f"export CUDA_VISIBLE_DEVICES={answering}"],
    )


def _gpu(gpu: GpuReport, is_used: bool, surroundings: Surroundings) -> Iterator[Finding]:
    about = f"GPU {gpu.index}"
    severity: Severity = "blocks" if is_used else "hinders"
    if gpu.error is not None:
        message = f"it does not answer: {gpu.error}"
        yield Finding(severity=severity, about=about, message=message, advice="reset it or reboot")
        return
    yield from _energy(gpu, about, severity)
    if gpu.compute_mode == "prohibited":
        yield Finding(
            severity=severity,
            about=about,
            message="compute mode is prohibited: nothing can run on it",
            commands=[f"sudo nvidia-smi -i {gpu.index} -c 0"],
        )
    throttling = [reason for reason in gpu.clock_reasons or () if reason not in (IDLE, SETTING)]
    if throttling:
        yield Finding(
            severity="hinders",
            about=about,
            message=f"its clocks are throttled now: {', '.join(throttling)}",
            advice="let it cool, or check its power supply and limit, before you measure",
        )
    yield from _users(gpu, about, surroundings)


def _energy(gpu: GpuReport, about: str, severity: Severity) -> Iterator[Finding]:
    if gpu.mig_mode:
        yield Finding(
            severity=severity,
            about=about,
            message="MIG is on, and NVML reports no energy of a part of a GPU",
            advice="turn it off when its instances are not in use",
            commands=[f"sudo nvidia-smi -i {gpu.index} -mig 0"],
        )
    elif gpu.refusal is not None:
        yield Finding(severity=severity, about=about, message=gpu.refusal.removeprefix(f"{gpu.uuid}: "))
    elif gpu.energy_counter is False:
        yield Finding(
            severity=severity,
            about=about,
            message="it has no energy counter (GPUs have one from Volta on): sampled power is integrated instead",
        )
    elif gpu.energy_counter_error is not None:
        instead = ": sampled power is integrated instead" if gpu.power_sources else ""
        yield Finding(severity=severity, about=about, message=f"{gpu.energy_counter_error}{instead}")


def _settings(gpus: Sequence[GpuReport]) -> Iterator[Finding]:
    """Yield findings about settings, one for all GPUs that need the same command."""
    if unloading := [gpu for gpu in gpus if gpu.persistence_mode is False]:
        yield Finding(
            severity="hinders",
            about=_names(unloading),
            message="persistence mode is off: the driver is unloaded between experiments, and settings are lost",
            advice="turn it on until the next boot; the service nvidia-persistenced does so permanently",
            commands=[f"sudo nvidia-smi -i {_indices(unloading)} -pm 1"],
        )
    unlocked: dict[tuple[bool | None, int | None], list[GpuReport]] = {}
    for gpu in gpus:
        if not gpu.clocks_held and gpu.sm_clock_mhz is not None:
            unlocked.setdefault((gpu.clocks_held, gpu.sustained_clock_mhz), []).append(gpu)
    for (clocks_held, mhz), alike in unlocked.items():
        locked = "are not locked" if clocks_held is False else "may not be locked (NVML does not report it)"
        indices = _indices(alike)
        yield Finding(
            severity="hinders",
            about=_names(alike),
            message=f"clocks {locked}: they vary with temperature and power, and so do figures",
            advice="lock them at a clock that the GPU sustains under your load"
            + (f"; undo with sudo nvidia-smi -i {indices} -rgc" if mhz else ""),
            commands=[f"sudo nvidia-smi -i {indices} -lgc {mhz},{mhz}"] if mhz else [],
        )


def _users(gpu: GpuReport, about: str, surroundings: Surroundings) -> Iterator[Finding]:
    if gpu.held_by is not None:
        yield Finding(
            severity="hinders",
            about=about,
            message=f"an experiment holds its lease: {gpu.held_by}",
            advice="other experiments wait until it ends",
        )
    elif gpu.users:
        named = ", ".join(f"{one.name or '?'} (pid {one.pid})" for one in gpu.users[:3])
        more = f" and {len(gpu.users) - 3} more" if len(gpu.users) > 3 else ""
        yield Finding(
            severity="hinders",
            about=about,
            message=f"other processes use it: {named}{more}",
            advice="stop them before you measure: their energy is included in every figure",
        )
    elif gpu.used_mb is not None and gpu.used_mb > max(_USED_MB, _USED_SHARE * (gpu.memory_mb or 0)):
        unseen = " (processes outside of a container are not visible in it)" if surroundings.container else ""
        yield Finding(
            severity="hinders",
            about=about,
            message=f"{gpu.used_mb:,} MB of its memory are in use by processes that NVML does not report{unseen}",
            advice="stop them before you measure: their energy is included in every figure",
        )


def _names(gpus: Sequence[GpuReport]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(str(gpu.index) for gpu in gpus)}"


def _indices(gpus: Sequence[GpuReport]) -> str:
    """Return the indices of *gpus* in the form of ``nvidia-smi -i``."""
    return ",".join(str(gpu.index) for gpu in gpus)
