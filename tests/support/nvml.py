"""Boards that follow a script: scripted_nvml.c built, its script written, and code run over it."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parent / "scripted_nvml.c"
ROOT = SOURCE.parents[2]

#: Takes a pickled call, makes it, gives what it returned.
_CHILD = "import pickle, sys; f, a = pickle.load(sys.stdin.buffer); pickle.dump(f(*a), sys.stdout.buffer)"


class NotToBeBuiltError(Exception):
    """The library cannot be built here; the message says why."""


def build(directory: Path) -> Path:
    """Build the library in *directory*, and return that.

    Raises:
        NotToBeBuiltError: There is no gcc.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise NotToBeBuiltError("there is no gcc")
    name = "libnvidia-ml.so.1"
    options = ["-O1", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    subprocess.run([gcc, *options, "-o", directory / name, SOURCE, "-lm"], check=True)
    return directory


@dataclass
class Board:
    """A GPU.

    Attributes:
        uuid: Its identity.
        power: From when on, in s since the start, it draws how many W.
        more: The other lines of a device, as scripted_nvml.c names them.
        used_mb: From when on, in s since the start, how many MB of its memory are in use.
    """

    uuid: str
    power: list[tuple[float, float]]
    more: dict[str, str | float] = field(default_factory=dict)
    used_mb: list[tuple[float, float]] = field(default_factory=list)

    def lines(self) -> list[str]:
        power = [f"power {t:.9f} {watts}" for t, watts in self.power]
        used = [f"used_mb {t:.9f} {amount}" for t, amount in self.used_mb]
        return [f"device {self.uuid}", *(f"{word} {value}" for word, value in self.more.items()), *power, *used]

    def energy_j(self, a: float, b: float) -> float:
        """Return what it drew from *a* to *b*, in s since the start."""
        spans = pairwise([*self.power, (math.inf, 0.0)])
        return sum(watts * max(0.0, min(to, b) - max(since, a)) for (since, watts), (to, _) in spans)


class Call(NamedTuple):
    """One call of a function of NVML: when, on the monotonic clock, and what came of it."""

    at: float
    pid: int
    function: str
    uuid: str
    result: int
    value: int


@dataclass
class Script:
    """What the boards do, at a path; :meth:`write` makes changes known, to running processes too."""

    path: Path
    boards: list[Board]
    call_ms: float = 0.0
    driver: str = "580.159.04"
    start: float = field(default_factory=time.monotonic)

    @property
    def _trace(self) -> Path:
        return self.path.with_suffix(".trace")

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.start

    def write(self) -> None:
        lines = [f"start {self.start:.9f}", f"driver {self.driver}", f"call_ms {self.call_ms}"]
        lines += [f"trace {self._trace}", *(line for board in self.boards for line in board.lines())]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.path)

    def calls(self) -> list[Call]:
        """Return all calls so far."""
        rows = (line.split() for line in self._trace.read_text().splitlines())
        return [Call(float(at), int(pid), name, uuid, int(r), int(v)) for at, pid, name, uuid, r, v in rows]

    def users(self) -> int:
        """Return how many calls of nvmlInit were not made up for by one of nvmlShutdown."""
        calls = [call.value for call in self.calls() if call.function in ("nvmlInit", "nvmlShutdown")]
        return calls[-1] if calls else 0


def environment(library: Path, script: Script) -> dict[str, str]:
    """Return the environment in which a new process finds the boards."""
    paths = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": paths, "LLEM_SCRIPTED_NVML": str(script.path)}


def run(env: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process: the loader reads LD_LIBRARY_PATH only when one starts."""
    call = pickle.dumps((function, arguments))
    process = subprocess.run(
        [sys.executable, "-c", _CHILD], input=call, stdout=subprocess.PIPE, env=env, cwd=ROOT, check=True
    )
    return pickle.loads(process.stdout)
