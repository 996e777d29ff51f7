"""What stands in the way with GPUs, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_llem.doctor.records import Finding, GpuReport, Severity, Surroundings
from pytest_llem.hardware.gpus import unknown_entry
from pytest_llem.hardware.sensors import IDLE, SETTING

#: A GPU on which more memory is in use than this share, and in MB, has a user, seen or not: drivers take hundreds.
_USED_SHARE, _USED_MB = 0.02, 1_100


def gpu_findings(gpus: Sequence[GpuReport], used: Sequence[GpuReport], around: Surroundings) -> Iterator[Finding]:
    """Yield what stands in the way.

    Args:
        gpus: Those that experiments may use.
        used: Those that an engine runs on where nothing else is said.
        around: The surroundings.
    """
    for gpu in gpus:
        yield from _gpu(gpu, gpu in used, around)
    yield from _settings(gpus)


def visibility_findings(gpus: Sequence[GpuReport], around: Surroundings) -> Iterator[Finding]:
    """Yield what keeps it from being known which GPUs experiments run on.

    Args:
        gpus: All of this machine.
        around: The surroundings.
    """
    visible = around.cuda_visible_devices
    uuids = [gpu.uuid or f"lost {gpu.index}" for gpu in gpus]
    if gpus and visible is not None and (entry := unknown_entry(uuids, visible)) is not None:
        hidden = not any(gpu.visible for gpu in gpus)
        yield Finding(
            severity="blocks" if hidden else "hinders",
            about="CUDA_VISIBLE_DEVICES",
            what=f"{entry!r} in {visible!r} names no GPU: CUDA uses only those before it"
            + (", so engines run on the CPU" if hidden else ""),
            do=f"name GPUs by their UUID, or by number from 0 to {len(gpus) - 1}",
        )
    named = [gpu for gpu in gpus if gpu.visible]
    is_ordered = around.cuda_device_order == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) == 1
    if len(named) < 2 or is_ordered or any(gpu.first for gpu in gpus):
        return
    order = "CUDA may count these different GPUs in another order than nvidia-smi"
    is_open = visible is not None
    yield Finding(
        severity="hinders" if is_open else "note",
        about=f"CUDA_VISIBLE_DEVICES={visible}" if is_open else _names(named),
        what=f"{order}: which of them {'is meant' if is_open else 'is the first, which engines use,'} is unknown",
        do="count them by their place on the bus, or name one by its UUID",
        commands=["export CUDA_DEVICE_ORDER=PCI_BUS_ID", f"export CUDA_VISIBLE_DEVICES={named[0].uuid}"],
    )


def _gpu(gpu: GpuReport, used: bool, around: Surroundings) -> Iterator[Finding]:
    about = f"GPU {gpu.index}"
    if gpu.error is not None:
        severity: Severity = "blocks" if used else "hinders"
        what = f"it does not answer: {gpu.error}"
        yield Finding(severity=severity, about=about, what=what, do="reset it, or restart the machine")
        return
    yield from _energy(gpu, about, blocking=used)
    if gpu.compute_mode == "prohibited":
        command = f"sudo nvidia-smi -i {gpu.index} -c 0"
        yield Finding(
            severity="blocks" if used else "hinders",
            about=about,
            what="compute mode is prohibited: nothing can run on it",
            commands=[command],
        )
    holding = [reason for reason in gpu.clock_reasons or () if reason not in (IDLE, SETTING)]
    if holding:
        yield Finding(
            severity="hinders",
            about=about,
            what=f"its clocks are held down at the moment: {', '.join(holding)}",
            do="let it cool, or see to its power, before you measure",
        )
    yield from _users(gpu, about, around)


def _energy(gpu: GpuReport, about: str, *, blocking: bool) -> Iterator[Finding]:
    severity: Severity = "blocks" if blocking else "hinders"
    if gpu.mig_mode:
        yield Finding(
            severity=severity,
            about=about,
            what="MIG is on, and NVML knows no energy of a part of a GPU",
            do="switch it off, once nobody uses the instances",
            commands=[f"sudo nvidia-smi -i {gpu.index} -mig 0"],
        )
    elif gpu.refusal is not None:
        yield Finding(severity=severity, about=about, what=gpu.refusal.removeprefix(f"NVML: {gpu.uuid}: "))
    elif gpu.energy_counter is False:
        yield Finding(
            severity=severity,
            about=about,
            what="it has no energy counter (boards have one from Volta on): sampled power is integrated instead",
        )
    elif gpu.energy_counter_error is not None:
        instead = ": sampled power is integrated instead" if gpu.power_sources else ""
        yield Finding(severity=severity, about=about, what=f"{gpu.energy_counter_error}{instead}")


def _settings(gpus: Sequence[GpuReport]) -> Iterator[Finding]:
    """Yield what is to be set, once for all GPUs that it is the same for."""
    if forgetful := [gpu for gpu in gpus if gpu.persistence_mode is False]:
        yield Finding(
            severity="hinders",
            about=_names(forgetful),
            what="persistence mode is off: between experiments the driver is unloaded, and settings are lost",
            do="keep it loaded until the next boot; the service nvidia-persistenced does so for good",
            commands=[f"sudo nvidia-smi -i {_indices(forgetful)} -pm 1"],
        )
    loose: dict[tuple[bool | None, int | None], list[GpuReport]] = {}
    for gpu in gpus:
        if not gpu.clocks_held and gpu.sm_clock_mhz is not None:
            loose.setdefault((gpu.clocks_held, gpu.lasting_clock_mhz), []).append(gpu)
    for (held, mhz), alike in loose.items():
        known = "are not locked" if held is False else "may not be locked (NVML does not tell)"
        indices = _indices(alike)
        yield Finding(
            severity="hinders",
            about=_names(alike),
            what=f"clocks {known}: they follow temperature and power, and so do figures",
            do="lock them, at what is held under your load"
            + (f"; undone by nvidia-smi -i {indices} -rgc" if mhz else ""),
            commands=[f"sudo nvidia-smi -i {indices} -lgc {mhz},{mhz}"] if mhz else [],
        )


def _users(gpu: GpuReport, about: str, around: Surroundings) -> Iterator[Finding]:
    if gpu.held_by is not None:
        yield Finding(
            severity="hinders",
            about=about,
            what=f"an experiment has it: {gpu.held_by}",
            do="others wait for its end",
        )
    elif gpu.users:
        named = ", ".join(f"{one.name or '?'} (pid {one.pid})" for one in gpu.users[:3])
        more = f" and {len(gpu.users) - 3} more" if len(gpu.users) > 3 else ""
        yield Finding(
            severity="hinders",
            about=about,
            what=f"others use it: {named}{more}",
            do="end them before you measure: what they draw is in every figure",
        )
    elif gpu.used_mb is not None and gpu.used_mb > max(_USED_MB, _USED_SHARE * (gpu.memory_mb or 0)):
        unseen = " (a container sees none outside of it)" if around.container else ""
        yield Finding(
            severity="hinders",
            about=about,
            what=f"{gpu.used_mb:,} MB of its memory are in use, by processes that NVML does not name{unseen}",
            do="end them before you measure: what they draw is in every figure",
        )


def _names(gpus: Sequence[GpuReport]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(str(gpu.index) for gpu in gpus)}"


def _indices(gpus: Sequence[GpuReport]) -> str:
    """Return them as nvidia-smi takes them."""
    return ",".join(str(gpu.index) for gpu in gpus)
