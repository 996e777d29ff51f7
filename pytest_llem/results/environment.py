"""The host as far as a result may tell it: an allow-list, without host, user, path or network names."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Packages whose version can change a number.
PACKAGES = ("pytest-llem", "torch", "transformers", "tokenizers", "accelerate", "nvidia-ml-py", "pytest")


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def host_environment() -> dict[str, Any]:
    """Return operating system, processor, memory, Python and package versions. Imports no engine."""
    import psutil

    return {
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu_model": cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_model() -> str | None:
    """Return the processor's model as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None
