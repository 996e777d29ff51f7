"""GPUs that follow a script: build scripted_nvml.c, write scripts, and run code with them."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.forks import ForkServer

if TYPE_CHECKING:
    import pytest

SOURCE = Path(__file__).parent / "scripted_nvml.c"
ROOT = SOURCE.parents[2]

#: The running servers, by the LD_LIBRARY_PATH that each was started with.
_servers: dict[str | None, ForkServer] = {}


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def build(directory: Path) -> Path:
    """Build the library in *directory*, and return *directory*.

    Raises:
        BuildError: gcc is not installed.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise BuildError("there is no gcc")
    name = "libnvidia-ml.so.1"
    options = ["-O1", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    subprocess.run([gcc, *options, "-o", directory / name, SOURCE, "-lm"], check=True)
    return directory


class Ramp(NamedTuple):
    """A power that is reached linearly from the previous one."""

    at: float
    watts: float


@dataclass
class ScriptedGpu:
    """A scripted GPU.

    Attributes:
        uuid: Its UUID.
        power: Times in s since the start, and the power in W from each on; a :class:`Ramp` for a linear change.
        more: Other lines of a device, by the words of scripted_nvml.c.
        used_mb: Times in s since the start, and the memory in use in MB from each on.
        module_power: Likewise the power of its module; empty if the driver reads none.
        rules: Lines of a device whose first word may occur several times.
    """

    uuid: str
    power: list[tuple[float, float]]
    more: dict[str, str | float] = field(default_factory=dict)
    used_mb: list[tuple[float, float]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    module_power: list[tuple[float, float]] = field(default_factory=list)

    def lines(self) -> list[str]:
        power = [f"power {one[0]:.9f} {one[1]}{' ramp' * isinstance(one, Ramp)}" for one in self.power]
        used = [f"used_mb {t:.9f} {amount}" for t, amount in self.used_mb]
        module = [f"module_power {t:.9f} {watts}" for t, watts in self.module_power]
        more = (f"{word} {value}" for word, value in self.more.items())
        return [f"device {self.uuid}", *more, *self.rules, *power, *module, *used]

    def energy_j(self, a: float, b: float) -> float:
        """Return its energy from *a* to *b* in J; both in s since the start."""
        total = 0.0
        for now, then in pairwise([*self.power, (math.inf, 0.0)]):
            since, to = max(now[0], a), min(then[0], b)
            slope = (then[1] - now[1]) / (then[0] - now[0]) if isinstance(then, Ramp) else 0.0
            if to > since:
                total += (to - since) * (now[1] + slope * ((since + to) / 2 - now[0]))
        return total

    def tick_before(self, t: float) -> float:
        """Return the time of its counter's last tick before *t*, both in s since the start."""
        tick, phase = float(self.more["tick_ms"]) / 1000, float(self.more.get("phase_ms", 0)) / 1000
        return math.floor((t - phase) / tick) * tick + phase


class Call(NamedTuple):
    """One call of an NVML function: time on the monotonic clock, and its result."""

    at: float
    pid: int
    function: str
    uuid: str
    result: int
    value: int


@dataclass
class Script:
    """The behaviour of GPUs, in a file. :meth:`write` makes changes effective, also for running processes.

    Attributes:
        path: Path of the file.
        gpus: GPUs in NVML's order.
        call_ms: Duration of a call in ms.
        driver: Version of the driver.
        rules: Other lines of scripted_nvml.c that apply to all GPUs.
        start: t = 0 on the monotonic clock.
    """

    path: Path
    gpus: list[ScriptedGpu]
    call_ms: float = 0.0
    driver: str = "580.159.04"
    rules: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def _trace(self) -> Path:
        return self.path.with_suffix(".trace")

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.start

    def write(self) -> None:
        lines = [f"start {self.start:.9f}", f"driver {self.driver}", f"call_ms {self.call_ms}"]
        lines += [f"trace {self._trace}", *self.rules, *(line for gpu in self.gpus for line in gpu.lines())]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.path)

    def calls(self) -> list[Call]:
        """Return all calls so far."""
        rows = (line.split() for line in self._trace.read_text().splitlines())
        return [Call(float(at), int(pid), name, uuid, int(r), int(v)) for at, pid, name, uuid, r, v in rows]

    def users(self) -> int:
        """Return the number of nvmlInit calls without an nvmlShutdown, over all processes."""
        calls = [call for call in self.calls() if call.function in ("nvmlInit", "nvmlShutdown")]
        return sum({call.pid: call.value for call in calls}.values())

    def looks(self, began: float, ended: float, uuid: str | None = None) -> list[Call]:
        """Return the readings of energy counters in a span of the monotonic clock, of one GPU or of all."""
        found = [call for call in self.calls() if call.function == "nvmlDeviceGetTotalEnergyConsumption"]
        return [call for call in found if began <= call.at <= ended and uuid in (None, call.uuid)]


def environment(library: Path, script: Script) -> dict[str, str]:
    """Return the environment in which a new process finds the scripted GPUs."""
    paths = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": paths, "LLEM_SCRIPTED_NVML": str(script.path)}


def install(monkeypatch: pytest.MonkeyPatch, library: Path, script: Script) -> Script:
    """Write *script*, have new processes find its GPUs, and return it."""
    script.write()
    for name, value in environment(library, script).items():
        monkeypatch.setenv(name, value)
    return script


def run(env: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process, as the loader reads LD_LIBRARY_PATH only at its start.

    Processes are forked from one that was started with the same LD_LIBRARY_PATH, and without a PYTHONPATH.
    """
    libraries = env.get("LD_LIBRARY_PATH")
    if libraries not in _servers:
        _servers[libraries] = ForkServer({name: value for name, value in env.items() if name != "PYTHONPATH"})
    return _servers[libraries].call(env, function, *arguments)


@atexit.register
def _close_servers() -> None:
    while _servers:
        _servers.popitem()[1].close()
