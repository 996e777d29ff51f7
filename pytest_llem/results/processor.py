"""The processor of this machine: its model, and how its clocks are governed. What cannot be read is None."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_ROOT = Path("/")

#: Policies of a large machine are many, and mostly alike: as many different governors as are told.
_MOST = 4


def processor(root: Path = _ROOT) -> dict[str, Any]:
    """Return what is known of the processor.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    cpus = root / "sys/devices/system/cpu"
    governors = sorted({_text(one) or "" for one in cpus.glob("cpufreq/policy*/scaling_governor")} - {""})
    first = cpus / "cpu0/cpufreq"
    no_turbo = _number(cpus / "intel_pstate/no_turbo")
    boost = _number(cpus / "cpufreq/boost")
    smt = _number(cpus / "smt/active")
    return {
        "cpu_model": cpu_model(root),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_governor": ", ".join(governors[:_MOST]) or None,
        "cpu_frequency_driver": _text(first / "scaling_driver"),
        "cpu_energy_preference": _text(first / "energy_performance_preference"),
        "cpu_min_mhz": _megahertz(first / "scaling_min_freq"),
        "cpu_max_mhz": _megahertz(first / "scaling_max_freq"),
        "cpu_boost": bool(boost) if boost is not None else no_turbo == 0 if no_turbo is not None else None,
        "smt": bool(smt) if smt is not None else None,
    }


def cpu_model(root: Path = _ROOT) -> str | None:
    """Return the processor's model as the system tells it."""
    return _cpuinfo(root, "model name") or platform.processor() or None


def is_virtual(root: Path = _ROOT) -> bool | None:
    """Return whether this is a virtual machine; None where the processor tells no flags."""
    flags = _cpuinfo(root, "flags")
    return "hypervisor" in flags.split() if flags else None


def _cpuinfo(root: Path, key: str) -> str | None:
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None
            )
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None


def _megahertz(path: Path) -> float | None:
    kilohertz = _number(path)
    return kilohertz / 1000 if kilohertz is not None else None
