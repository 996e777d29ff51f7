"""Experiments of known energy and tokens, on a board that draws what its script says and the engine adds to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from tests.conftest import NOOP_STUDY
from tests.support import nvml

GPU = "GPU-known"
IDLE_W, BUSY_W = 100.0, 300.0

#: Three tokens for each of four prompts, two at a time.
TOKENS = 12


def measure(changes):
    """Return the result of an experiment as plain data. Runs in a process that sees the board."""
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    given = {**fields, "n": 4, "energy": {"backend": "nvml"}, **changes}
    given["noop"] = {"gpu": GPU, "watts": [IDLE_W, BUSY_W], "size": 2, "seconds": 0.25}
    return ExperimentOrchestrator(ExperimentConfig.model_validate(given)).run().result.model_dump(mode="json")


@pytest.fixture
def board(tmp_path, nvml_library, noop_engine):
    """Return a function that measures on a board, and gives the result and the board's power over time."""

    def run(**changes):
        script = nvml.Script(tmp_path / "nvml.script", [nvml.Board(GPU, [(0, IDLE_W)])])
        script.write()
        result = nvml.run(nvml.environment(nvml_library, script), measure, changes)
        lines = re.findall(r"^power (\S+) (\S+)$", Path(script.path).read_text(), re.MULTILINE)
        return result, nvml.Board(GPU, [(float(at), float(watts)) for at, watts in lines])

    return run


def known_energy_j(board, passes):
    """Return what a pass took, from the first busy moment of the window's first to the last one of its last."""
    edges = [at for at, _ in board.power]
    return board.energy_j(edges[-4 * passes], edges[-1]) / passes


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_joules_per_output_token_are_those_of_the_script_however_long_the_window_is(board, seconds):
    result, drawn = board(measurement={"min_window_seconds": seconds}, baseline={"enabled": False})
    passes = result["window"]["passes"]
    assert passes >= seconds / 0.55
    metrics = result["metrics"]
    known = known_energy_j(drawn, passes)
    # The end waits for a tick of 20 ms, in which nothing runs.
    tail = 0.021 * IDLE_W / passes
    assert known * 0.995 <= metrics["energy_j"]["value"] <= (known + tail) * 1.005
    assert metrics["energy_per_output_token_j"]["value"] == pytest.approx(metrics["energy_j"]["value"] / TOKENS)
    assert metrics["energy_per_request_j"]["value"] == pytest.approx(metrics["energy_j"]["value"] / 4)
    for name in ("energy_j", "energy_per_output_token_j", "gpu_energy_j"):
        assert (metrics[name]["method"], metrics[name]["source"]) == ("measured", "nvml_total_energy")
    assert metrics["energy_j"]["boundary"] == "gpu_board"
    assert metrics["cpu_energy_j"]["value"] is None
    # A pass takes half a second of work, whatever the window; on a busy machine there are pauses in it.
    assert metrics["seconds"]["value"] >= 0.5
    assert metrics["energy_j"]["value"] >= 0.5 * BUSY_W * 0.995


def test_active_energy_is_what_the_work_adds(board):
    result, drawn = board(measurement={"min_window_seconds": 1.0}, baseline={"duration_seconds": 5})
    assert result["baseline"]["idle_context_w"] == pytest.approx(IDLE_W, rel=0.01)
    passes, metrics = result["window"]["passes"], result["metrics"]
    edges = [at for at, _ in drawn.power]
    idle_j = IDLE_W * (edges[-1] - edges[-4 * passes]) / passes
    active = metrics["active_energy_j"]
    assert active["value"] == pytest.approx(known_energy_j(drawn, passes) - idle_j, rel=0.02)
    assert active["method"] == "measured"
