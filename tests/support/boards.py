"""Studies on eight scripted GPUs, and what their experiments recorded about them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from tests.support import nvml

NOOP_ENGINE = Path(__file__).parent / "noop_engine"

UUIDS = tuple(f"GPU-{number}{'0' * 7}" for number in range(8))

#: A study whose experiments only sleep.
STUDY: dict[str, Any] = {
    "name": "boards",
    "model": "none",
    "backend": "board_engine:BoardEngine",
    "n": 1,
    "max_input_tokens": 4,
    "max_output_tokens": 3,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "energy": {"backend": None},
    "baseline": {"enabled": False},
    "execution": {
        "n_cycles": 1,
        "experiment_gap_seconds": 0,
        "max_consecutive_failures": None,
        "contended_retries": 0,
    },
}

#: Section of the engine's options in a study.
SECTION = STUDY["backend"]


def give_boards(library: Path, folder: Path, uuids: Sequence[str] = UUIDS, **fields: Any) -> dict[str, str]:
    """Return the environment of processes that see scripted GPUs.

    Args:
        library: Folder of the scripted NVML library.
        folder: Folder for the script.
        uuids: UUIDs of the GPUs.
        fields: Lines of each GPU, as in :class:`nvml.ScriptedGpu`.
    """
    more = {"memory_mb": 80_000, "power_limit_w": 700, **fields}
    script = nvml.Script(folder / "script", [nvml.ScriptedGpu(uuid, [(0.0, 70.0)], dict(more)) for uuid in uuids])
    script.write()
    env = nvml.environment(library, script)
    paths = [str(NOOP_ENGINE), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    env.pop("CUDA_VISIBLE_DEVICES", None)
    return env


@dataclass(frozen=True)
class Stay:
    """The time that an experiment's process had its GPUs, in s since 1970."""

    began: float
    ended: float
    number: str
    visible: str
    gpus: tuple[str, ...]


def stays(folder: Path) -> list[Stay]:
    """Return what the processes of board_engine recorded in *folder*, in the order of their starts."""
    found = []
    for file in folder.iterdir():
        began, number, visible, *gpus = file.read_text().split()
        found.append(Stay(float(began), file.stat().st_mtime, number, visible, tuple(gpus)))
    return sorted(found, key=lambda stay: stay.began)


def shared(found: Sequence[Stay]) -> list[tuple[str, Stay, Stay]]:
    """Return the pairs of processes that had one GPU at the same time, with that GPU."""
    by_gpu: Mapping[str, list[Stay]] = {gpu: [one for one in found if gpu in one.gpus] for gpu in UUIDS}
    return [
        (gpu, one, other)
        for gpu, group in by_gpu.items()
        for one, other in pairwise(group)
        if other.began < one.ended
    ]


def busiest(found: Sequence[Stay]) -> int:
    """Return the largest number of GPUs in use at one time."""
    edges = [(one.began, len(one.gpus)) for one in found] + [(one.ended, -len(one.gpus)) for one in found]
    in_use = most = 0
    for _, change in sorted(edges):
        in_use += change
        most = max(most, in_use)
    return most


def workers_of(controller: int) -> list[psutil.Process]:
    """Return xdist's workers of a controller, by its pid."""
    children = [one for one in psutil.Process(controller).children() if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in children if "exec(eval(" in " ".join(one.cmdline())]
