"""The main use on real weights: SmolLM2-135M-Instruct, a model of the Llama architecture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.study.config import ExperimentConfig
from tests.conftest import ROOT, Results
from tests.support.measured import output_ids
from tests.support.narrow import not_none

pytestmark = pytest.mark.slow


def test_measured_path_runs_the_real_model(pytester: pytest.Pytester, results: Results, smollm2: Path) -> None:
    """The tokens that a study's process generates for "The capital of France is" contain "Paris"."""
    fields = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "n": 1,
        "dataset": "prompts.txt",
        "max_output_tokens": 4,
        "precision": "fp32",
        "decoder": {"do_sample": False},
    }
    (pytester.path / "prompts.txt").write_text("The capital of France is\n")
    (pytester.path / "study.yaml").write_text(
        "\n".join(f"{key}: {value}" for key, value in fields.items())
        + "\nwarmup: {enabled: false}\nmeasurement: {min_window_seconds: 0}\n"
    )
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-o", f"llem_model_path={smollm2}")
    run.assert_outcomes(passed=1)
    entry = results.manifest["experiments"][0]
    measured = results.read(entry["result_file"])["tokens"]

    engine = PyTorchEngine(ExperimentConfig.model_validate(fields), EngineContext((smollm2,)))
    engine.fetch()
    engine.load()
    (batch,) = engine.prepare([engine.encode("The capital of France is")])
    (request,) = engine.requests(batch, engine.generate(batch))
    assert "Paris" in engine.decode(output_ids(request))
    digest = hashlib.sha256(",".join(map(str, output_ids(request))).encode()).hexdigest()
    assert (measured["output_digest"], measured["output_tokens"]) == (digest, 4)


@pytest.fixture
def llama(pytester: pytest.Pytester) -> None:
    """The study of the main job with shorter outputs, and windows that are not repeated on a busy machine."""
    text = (ROOT / "studies" / "llama.yaml").read_text()
    for long, short in (
        ("min_window_seconds: 2", "min_window_seconds: 0.5"),
        ("output_tokens: 16", "output_tokens: 4"),
    ):
        assert long in text
        text = text.replace(long, short)
    (pytester.path / "llama.yaml").write_text(text)


@pytest.mark.usefixtures("llama")
def test_main_job_runs_selected_points(pytester: pytest.Pytester, results: Results, smollm2: Path) -> None:
    run = pytester.runpytest_subprocess(
        *("llama.yaml", "-p", "llem", "--llem-start-method=forkserver"),
        *("-k", "batch_size=8 and cycle=1", "-o", f"llem_model_path={smollm2}"),
    )
    run.assert_outcomes(passed=2, deselected=10)
    result = StudyResult.load(results.directory)
    assert result.summary.completed == 2
    selected = [point for point in result.points if point.axes["pytorch.batch_size"] == 8]
    assert {point.axes["precision"] for point in selected} == {"bf16", "fp32"}
    for point in selected:
        for name in ("output_tokens_per_second", "ttft_p50_ms", "itl_p50_ms", "energy_per_output_token_j"):
            assert point.metrics[name].n == 1
            assert not_none(point.metrics[name].mean) > 0
        assert point.metrics["energy_j"].method in ("estimated", "measured")
        # 135 million parameters and their buffers
        width = {"bf16": 2, "fp32": 4}[point.axes["precision"]]
        assert point.metrics["model_memory_mb"].mean == pytest.approx(134.5 * width, rel=0.01)
