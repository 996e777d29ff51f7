"""Zeus as a reference: we agree with it where it is right, and are right where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import nvml
from tests.support.environments import Environment
from tests.support.narrow import not_none
from tests.support.nvml import Ramp, Script, ScriptedGpu

pytestmark = pytest.mark.slow

ZEUS = "zeus==0.16.0"
WINDOWS = Path(__file__).parent / "support" / "windows.py"


class Found(NamedTuple):
    """What a window came to: J, s and J per GPU."""

    energy_j: list[float | None]
    seconds: list[float | None]
    uncertainty_j: list[float | None]


@pytest.fixture(scope="session")
def zeus_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with Zeus and without torch."""
    environment = Environment(tmp_path_factory.mktemp("zeus") / "environment")
    install = [sys.executable, "-m", "pip", "--python", str(environment.python), "install", "--quiet"]
    constraints = nvml.ROOT / "constraints.txt"
    done = subprocess.run(
        [*install, "--disable-pip-version-check", "--no-compile", "-c", str(constraints), ZEUS],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        if os.environ.get("CI"):
            pytest.fail(f"{ZEUS} cannot be installed: {last}")
        pytest.skip(f"{ZEUS} cannot be installed: {last}")
    return environment.python


@pytest.fixture
def both(zeus_python: Path, nvml_library: Path, tmp_path: Path) -> Callable[..., tuple[list[Found], list[Found]]]:
    """Measure the same windows of the same GPUs with Zeus and with our meter, at the same time.

    Called with the GPUs, windows in seconds from when both are ready, and what changes the GPUs then, given
    when that is in seconds of the script; gives Zeus' and our findings.
    """

    def measure(
        gpus: list[ScriptedGpu],
        windows: list[tuple[float, float]],
        change: Callable[[float], None] | None = None,
        **more: Any,
    ) -> tuple[list[Found], list[Found]]:
        script = Script(tmp_path / "script", gpus, **more)
        script.write()
        env = nvml.environment(nvml_library, script)
        env.pop("PYTHONPATH", None)
        with _reader(zeus_python, "zeus", gpus, env) as zeus:
            ours_env = env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(nvml.ROOT), *sys.path]))}
            with _reader(Path(sys.executable), "ours", gpus, ours_env) as ours:
                for reader in (zeus, ours):
                    assert reader.stdout.readline() == "ready\n"
                now = time.monotonic() + 0.3
                if change is not None:
                    change(now - script.start)
                    script.write()
                for reader in (zeus, ours):
                    reader.stdin.write(json.dumps([(now + began, now + ended) for began, ended in windows]) + "\n")
                    reader.stdin.flush()
                theirs, own = (json.loads(reader.stdout.readline()) for reader in (zeus, ours))
        return [Found(**one) for one in theirs], [Found(**one) for one in own]

    return measure


@contextmanager
def _reader(python: Path, name: str, gpus: list[ScriptedGpu], env: dict[str, str]) -> Iterator[Any]:
    command = [str(python), str(WINDOWS), name, *(gpu.uuid for gpu in gpus)]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
        process.communicate(timeout=300)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def _gpu(name: str, watts: float, **more: float) -> ScriptedGpu:
    return ScriptedGpu(f"GPU-{name}", [(0.0, watts)], {"tick_ms": 100, "counter_mj": 5_000_000_000, **more})


def _off(found: Found, watts: float, place: int = 0) -> float:
    """Return by what share an energy is off that of constant power."""
    return abs(not_none(found.energy_j[place]) / (not_none(found.seconds[place]) * watts) - 1)


def test_we_agree_on_long_windows_of_boards_that_count(both: Callable[..., Any]) -> None:
    fast = {"tick_ms": 20}
    gpus = [_gpu("constant", 300.0), _gpu("fast", 70.0, **fast)]
    gpus += [_gpu("step", 300.0, **fast), _gpu("ramp", 200.0, **fast)]

    def change(now: float) -> None:
        gpus[2].power += [(now + 3, 100.0), (now + 9, 300.0)]
        gpus[3].power += [Ramp(now + 3, 200.0), Ramp(now + 6, 600.0), Ramp(now + 9, 200.0)]

    (theirs,), (ours,) = both(gpus, [(0.0, 12.0)], change)
    for place, gpu in enumerate(gpus):
        zeus_w, our_w = (found.energy_j[place] / found.seconds[place] for found in (theirs, ours))
        assert our_w == pytest.approx(zeus_w, rel=0.01), gpu.uuid
    for place, watts in ((0, 300.0), (1, 70.0)):
        assert _off(theirs, watts, place) < 0.01
        assert _off(ours, watts, place) < 0.005


def test_windows_of_one_or_two_ticks(both: Callable[..., Any]) -> None:
    """Zeus cuts anywhere between two ticks and counts whole ones: for 45 J (300 W, 0.15 s) it says 30 or 60."""
    windows = [(0.737 * number, 0.737 * number + 0.15) for number in range(12)]
    theirs, ours = both([_gpu("constant", 300.0)], windows)
    assert {round(found.energy_j[0] / 30) for found in theirs} <= {1, 2}, "whole ticks"
    assert max(_off(found, 300.0) for found in theirs) > 0.25
    for found in ours:
        assert _off(found, 300.0) < max(0.02, 2.5 * found.uncertainty_j[0] / found.energy_j[0])


def test_a_board_without_a_counter(both: Callable[..., Any]) -> None:
    """Zeus keeps a sample only where power has changed, and integrates between those within the window.

    For 280 J it says 0, for 1200 J with one step 0, and for 1200 J with two steps 600.
    """
    gpus = [_gpu("constant", 70.0, no_counter=1), _gpu("step", 100.0, no_counter=1)]
    gpus += [_gpu("steps", 100.0, no_counter=1)]

    def change(now: float) -> None:
        gpus[1].power.append((now + 2, 500.0))
        gpus[2].power += [(now + 1, 500.0), (now + 3, 100.0)]

    (theirs,), (ours,) = both(gpus, [(0.0, 4.0)], change, call_ms=1)
    true_j = [280.0, 1200.0, 1200.0]
    assert theirs.energy_j[0] == 0, "a constant power draws nothing"
    assert theirs.energy_j[1] == 0, "nor does one that changed once"
    assert abs(theirs.energy_j[2] / true_j[2] - 1) > 0.2
    for place, gpu in enumerate(gpus):
        exact_j = true_j[place] + (ours.seconds[place] - 4) * gpu.power[-1][1]
        assert ours.energy_j[place] == pytest.approx(exact_j, abs=2.5 * ours.uncertainty_j[place])
    assert _off(ours, 70.0) < 0.001


def test_a_counter_that_is_reset(both: Callable[..., Any]) -> None:
    gpus = [_gpu("reset", 300.0)]

    def change(now: float) -> None:
        gpus[0].more["reset_at"] = now + 1

    (theirs,), (ours,) = both(gpus, [(0.0, 2.0)], change)
    assert theirs.energy_j[0] < 0, "less than nothing"
    assert _off(ours, 300.0) < 0.01, "from sampled power"
