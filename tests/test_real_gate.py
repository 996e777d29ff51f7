"""Gates on real weights: four cycles against four interleaved ones of the same, and of a fifth more tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pytest_llem import StudyResult
from pytest_llem.results.points import PointResult
from tests.conftest import ROOT, Results
from tests.support import nvml
from tests.support.environments import EVERYTHING, Environment
from tests.support.gpu_engine import GPU, IDLE_W, JOULES_PER_TOKEN

pytestmark = pytest.mark.slow

TOKENS, MORE_TOKENS = 10, 12

STUDY = {
    "name": "gate",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "backend": "tests.support.gpu_engine:ScriptedGpuEngine",
    "n": 1,
    "max_input_tokens": 8,
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "energy": {"backend": "nvml"},
    "measurement": {"min_window_seconds": 0},
    "execution": {"n_cycles": 4, "experiment_gap_seconds": 0},
    # CI machines have shared cores; the README says what that means for times.
    "gates": {"metrics": ["energy_j", "seconds"], "delta": {"seconds": 0.25}},
}


@pytest.fixture
def run(
    pytester: pytest.Pytester, results: Results, smollm2: Path, nvml_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[pytest.RunResult, PointResult]]:
    """Run the study with a number of output tokens; return pytest's result, and the study's point."""
    gpu = nvml.ScriptedGpu(GPU, [(0, IDLE_W)], {"name": "Scripted", "tick_ms": 2, "no_power_reading": 1})
    nvml.install(monkeypatch, nvml_library, nvml.Script(pytester.path / "nvml.script", [gpu]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    monkeypatch.setenv("COLUMNS", "200")  # or pytest cuts its lines

    def call(run_id: str, tokens: int, *options: str) -> tuple[pytest.RunResult, PointResult]:
        (pytester.path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "max_output_tokens": tokens}))
        done = pytester.runpytest_subprocess(
            *("study.yaml", "-p", "llem", "-o", f"llem_model_path={smollm2}", f"--llem-run-id={run_id}"),
            "--llem-start-method=forkserver",  # or each of 11 experiments imports torch anew
            *options,
        )
        (point,) = StudyResult.load(results.root / f"gate_{run_id}").points
        return done, point

    return call


def test_unchanged_code_passes_and_more_tokens_fail(
    run: Callable[..., tuple[pytest.RunResult, PointResult]], tmp_path: Path
) -> None:
    python = Environment(tmp_path / "environment", *EVERYTHING).python
    done, point = run("same", TOKENS, f"--llem-against={python}", "--llem-save=main")
    assert done.ret == 0
    energy, seconds = point.verdicts
    for verdict in (energy, seconds):
        assert verdict.verdict != "REGRESSION", verdict
        assert (verdict.n, verdict.reference_n, verdict.paired) == (4, 4, True)
    assert energy.method == "measured"
    assert energy.ratio == pytest.approx(1, abs=0.1)
    assert energy.mean is not None
    assert energy.mean > TOKENS * JOULES_PER_TOKEN

    done, point = run("more", MORE_TOKENS, "--llem-baseline=main", "--llem-cycles=3")
    assert done.ret == 1
    done.stdout.fnmatch_lines(["FAILED study.yaml::regression[[]energy_j-*[]] - 1.* × the reference: REGRESSION*"])
    (energy,) = [one for one in point.verdicts if one.metric == "energy_j"]
    assert (energy.verdict, energy.n, energy.reference_n) == ("REGRESSION", 3, 4)
    assert energy.ratio == pytest.approx(MORE_TOKENS / TOKENS, abs=0.1)
