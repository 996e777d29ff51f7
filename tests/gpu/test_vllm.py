"""The engine ``vllm``: beside PyTorch in one study, and after pytest has been killed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.hardware.gpus import Gpu
from tests.gpu.kills import kill_in_window

Found = Callable[[str, object], None]

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

#: Requests at a time, and tokens of each prompt and of each answer.
REQUESTS, TOKENS = 64, 128

ENGINE = {
    "max_model_len": 1024,
    "max_num_seqs": REQUESTS,
    "compilation_config": {"cudagraph_capture_sizes": [1, REQUESTS]},
}

POINT = {
    "n": REQUESTS,
    "max_input_tokens": TOKENS,
    "max_output_tokens": TOKENS,
    "decoder": {"do_sample": False},
    "warmup": {"n_warmup": 2, "convergence_detection": False},
    "baseline": {"enabled": False},
}


def test_sigkill_of_pytest_in_the_window_frees_the_gpu(
    tmp_path: Path, llama_8b_shape: Path, gpu: Gpu, found: Found
) -> None:
    study = {
        "name": "killed",
        "model": str(llama_8b_shape),
        "backend": "vllm",
        **POINT,
        "measurement": {"min_window_seconds": 600},
        "execution": {"n_cycles": 1},
        "vllm": {"engine": {**ENGINE, "load_format": "dummy"}},
    }
    assert kill_in_window(study, tmp_path, gpu, found) > 2**33, "the model is loaded"


@pytest.mark.parametrize(("shape", "cycles"), [("1b", 2), ("8b", 1)], ids=["1b", "8b"])
def test_one_study_measures_pytorch_and_vllm(
    study: Callable[..., StudyResult], request: pytest.FixtureRequest, found: Found, shape: str, cycles: int
) -> None:
    result = study(
        "engines",
        "--llem-start-method=spawn",  # vLLM's CUDA build starts a thread when it is imported
        model=str(request.getfixturevalue(f"llama_{shape}")),
        **POINT,
        measurement={"min_window_seconds": 8},
        sweep={"backend": ["pytorch", "vllm"]},
        pytorch={"batch_size": REQUESTS, "cache_implementation": "static"},
        vllm={"engine": ENGINE},
        execution={"n_cycles": cycles, "experiment_gap_seconds": 0},
    )
    assert (result.summary.completed, result.summary.failed) == (2 * cycles, 0)
    for point in result.points:
        for name in (
            "output_tokens_per_second",
            "energy_per_output_token_j",
            "mean_power_w",
            "ttft_p50_ms",
            "itl_p50_ms",
            "output_tokens",
        ):
            metric = point.metrics[name]
            found(f"{point.id}: {name}", f"{metric.mean:.5g}, CV {metric.cv or 0:.2%}" if metric.mean else metric)
        assert point.metrics["energy_per_output_token_j"].method == "measured"
        assert point.metrics["output_tokens"].mean == REQUESTS * TOKENS
    [agreement] = result.token_agreement
    found("share of equal tokens", agreement.share)
