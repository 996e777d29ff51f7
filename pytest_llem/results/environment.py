"""The host as far as a result may tell it: an allow-list, without host, user, path or network names."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pytest_llem.results.processor import is_virtual, processor
from pytest_llem.results.working_tree import working_tree

#: Packages whose version can change a number.
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
    "pytest",
    "safetensors",
    "triton",
)

#: Variables that can change a number, and hold no names.
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

#: What such a variable may hold. No path is among it, whoever puts one there.
_HARMLESS = re.compile(r"[\w.,:;=+*{}()\[\]\s-]{0,200}", re.ASCII)

#: Files that tell a container from a machine, and whose.
_CONTAINERS = (("docker", ".dockerenv"), ("podman", "run/.containerenv"))


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def host_environment(directory: Path | None = None) -> dict[str, Any]:
    """Return what is known of this machine and of what is installed. Imports no engine.

    What cannot be read is null.

    Args:
        directory: Whose git commit is told; None for the current directory.

    Returns:
        ``os``, ``kernel``, ``machine``, ``virtual_machine``, ``container``; what
        :func:`pytest_llem.results.processor.processor` tells; ``memory_mb``; ``python``; ``packages``, versions by
        name; ``variables``, those of :data:`VARIABLES` that are set; ``git``, as
        :func:`pytest_llem.results.working_tree.working_tree` tells it.
    """
    import psutil

    return {
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
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
    """Return those of :data:`VARIABLES` that are set; one that holds more than settings is left out."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in given.items() if _HARMLESS.fullmatch(value)}


def container(root: Path = Path("/")) -> str | None:
    """Return the kind of container this is, as far as it leaves a sign; None for no sign."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return next((kind for kind, sign in _CONTAINERS if (root / sign).exists()), None)
