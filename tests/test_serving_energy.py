"""Energy of a mock server on a scripted GPU, whose power follows the server's batch by a known law."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Results
from tests.support import nvml
from tests.support.load_studies import patient, result_of, write_load_study
from tests.support.marks import slow
from tests.support.processes import wait_until
from tests.support.serving import entries, mock_server

IDLE_W, REQUEST_W = 100.0, 4.0

#: The counter's tick in s.
TICK_SECONDS = 0.02

#: An answer takes 0.3 s and more, so that many of them cross an edge of the window.
ANSWER_TOKENS = 64

#: Time per output token in ms between that of all answers, and of those that the server pauses in.
SLO_TPOT_MS = 8.0


class Truth:
    """What the GPU and the server did within an experiment's energy, by their own records.

    Args:
        folder: Folder with the server's files ``batch`` and ``log``.
        script: The GPU's script.
        energy_j: The energy that was measured.
        began: Begin of its window, on the monotonic clock.
    """

    def __init__(self, folder: Path, script: nvml.Script, energy_j: float, began: float) -> None:
        self._batches = [(one["time"], one["batch"]) for one in entries(folder / "batch")]
        self._answers = [one["tokens"] for one in entries(folder / "log")]
        self.began, self.ended = _edges(script, round(energy_j * 1000), began)

    @property
    def energy_j(self) -> float:
        """The energy by the law of the power."""
        joules = IDLE_W * (self.ended - self.began)
        for (since, batch), (until, _) in pairwise([*self._batches, (math.inf, 0)]):
            joules += REQUEST_W * batch * max(0.0, min(until, self.ended) - max(since, self.began))
        return joules

    def tokens(self, max_tpot_ms: float = math.inf) -> int:
        """The output tokens of the answers with at most that time per output token."""
        good = [one for one in self._answers if (one[-1] - one[0]) / (len(one) - 1) * 1e3 <= max_tpot_ms]
        return sum(self.began <= at < self.ended for answer in good for at in answer)


def _edges(script: nvml.Script, millijoules: int, began: float) -> tuple[float, float]:
    """Return the ticks between which the counter grew by so much: of such pairs the one nearest to *began*."""
    seen: dict[int, float] = {}
    for call in script.looks(0.0, math.inf):
        seen.setdefault(call.value, call.at)
    starts = [value for value in seen if value + millijoules in seen]
    start = min(starts, key=lambda value: abs(seen[value] - began))
    first, last = (
        math.floor((seen[value] - script.start) / TICK_SECONDS) * TICK_SECONDS + script.start
        for value in (start, start + millijoules)
    )
    return first, last


Measure = Callable[..., Iterator[tuple[dict[str, Any], Truth]]]


@pytest.fixture
def measured(
    pytester: pytest.Pytester, results: Results, nvml_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Measure:
    """Return a function that runs a study on one server, and yields each result's metrics and the truth."""

    def run(seconds: float, *mock: str, **study: Any) -> Iterator[tuple[dict[str, Any], Truth]]:
        folder = pytester.path
        more: dict[str, str | float] = {
            "tick_ms": TICK_SECONDS * 1000,
            "follows": f"{REQUEST_W} {folder / 'batch'}",
            "memory_mb": 80_000,
        }
        script = nvml.install(
            monkeypatch,
            nvml_library,
            nvml.Script(folder / "nvml.script", [nvml.ScriptedGpu("GPU-a", [(0, IDLE_W)], more)]),
        )
        options = ("--state-file", str(folder / "batch"), "--log-file", str(folder / "log"), *mock)
        write_load_study(
            folder,
            *options,
            max_output_tokens=ANSWER_TOKENS,
            energy={"backend": "nvml"},
            measurement={"min_window_seconds": seconds},
            server={"gpus": 1},
            execution={"contended_retries": 3},  # a client that waits for a CPU sees tokens late
            **study,
        )
        run_pytest = patient(pytester.runpytest_subprocess, folder)
        assert run_pytest("study.yaml", "-p", "llem", "--llem-start-method=forkserver").ret == 0
        for entry in results.manifest["experiments"]:
            result = result_of(results, entry)
            began = datetime.fromisoformat(result["window"]["began_at"]).timestamp()
            began += time.monotonic() - time.time()
            yield result["metrics"], Truth(folder, script, result["window"]["window_energy_j"], began)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "seconds"),
    [
        ({"load.concurrency": [1, 64]}, 4.0),
        ({"load.rate": [20]}, 8.0),
    ],
    ids=["concurrencies", "rate"],
)
def test_energy_per_token_is_right_for_a_batch_that_varies(measured: Measure, sweep: Any, seconds: float) -> None:
    for metrics, truth in measured(seconds, "--step-ms", "4+0.1", load=None, sweep=sweep):
        value = metrics["energy_per_output_token_j"]["value"]
        assert value == pytest.approx(truth.energy_j / truth.tokens(), rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "seconds", "between"),
    [({"concurrency": 8}, 2.0, "25"), ({"rate": 25}, 6.0, "50")],
    ids=["concurrency", "Poisson"],
)
def test_energy_per_token_and_per_good_token_is_right(
    measured: Measure, load: dict[str, Any], seconds: float, between: str
) -> None:
    """The server pauses at times, which makes the answers slow that it gives then."""
    pause = ("--stall-after", between, "--stall-every", between, "--stall-seconds", "0.5")
    study = {"load": {**load, "slo": {"tpot_ms": SLO_TPOT_MS}}}
    [(metrics, truth)] = measured(seconds, "--step-ms", "4+0.1", *pause, **study)
    good = truth.tokens(SLO_TPOT_MS)
    assert 0.3 * truth.tokens() < good < 0.95 * truth.tokens()
    for name, tokens in (("energy_per_output_token_j", truth.tokens()), ("energy_per_good_token_j", good)):
        assert metrics[name]["value"] == pytest.approx(truth.energy_j / tokens, rel=0.005)


@contextmanager
def child_of_a_server(file: Path) -> Iterator[tuple[str, int]]:
    """Run a server whose child process uses the GPU, as vLLM's does; its URL, and the child's pid."""
    with mock_server("--grandchild", str(file)) as url:
        wait_until(lambda: file.exists() and file.read_text())
        child = int(file.read_text())
        try:
            yield url, child
        finally:
            subprocess.run(["kill", str(child)], check=True)


@pytest.fixture
def other() -> Iterator[int]:
    """Pid of a process that has nothing to do with the server."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("gpus", "is_shared"),
    [slow(None, False), (None, True), slow(["GPU-a"], True)],
    ids=["of its own", "shared", "named and shared"],
)
def test_gpus_of_a_running_server_are_its_own_or_refused(
    pytester: pytest.Pytester,
    results: Results,
    nvml_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: int,
    gpus: Any,
    is_shared: bool,
) -> None:
    folder = pytester.path
    with child_of_a_server(folder / "child") as (url, child):
        on_a = [f"user {pid} 900 python" for pid in (child, *([other] if is_shared else []))]
        more = {"tick_ms": 20.0, "memory_mb": 80_000}
        devices = [
            nvml.ScriptedGpu("GPU-a", [(0, 100.0)], {**more}, rules=on_a),
            nvml.ScriptedGpu("GPU-b", [(0, 300.0)], {**more}, rules=[f"user {other} 900 python"]),
        ]
        nvml.install(monkeypatch, nvml_library, nvml.Script(folder / "nvml.script", devices))
        write_load_study(
            folder,
            server={"command": None, "url": url, "gpus": gpus},
            energy={"backend": "nvml"},
            measurement={"min_window_seconds": 1},
        )
        run = patient(pytester.runpytest_subprocess, folder)("study.yaml", "-p", "llem")
    if is_shared:
        run.assert_outcomes(failed=1)
        text = (
            f"GPU-a is also used by other processes than the server's ({other}): no energy is the server's alone"
        )
        run.stdout.fnmatch_lines([f"preflight: server.url: {text}"])
        return
    run.assert_outcomes(passed=1)
    result = result_of(results, results.manifest["experiments"][0])
    assert [one["device"] for one in result["devices"]] == ["GPU-a"]
    assert result["metrics"]["mean_power_w"]["value"] == pytest.approx(100, rel=0.01)
    assert result["engine"]["device"] == "cuda"
