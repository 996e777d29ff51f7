"""How far fresh processes of one configuration differ, by regime; and GPUs, if there are several."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.results.cycles import gpu_spread

Found = Callable[[str, object], None]
Study = Callable[..., StudyResult]

METRICS = ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms")

WARMUP = {"n_warmup": 2, "convergence_detection": False}

COMMON: dict[str, Any] = {
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 5},
}

DECODE = {"n": 8, "max_input_tokens": 64, "max_output_tokens": 64}

#: Fields of each regime of PyTorch.
PYTORCH: dict[str, dict[str, Any]] = {
    "prefill": {"n": 32, "max_input_tokens": 512, "max_output_tokens": 1, "pytorch": {"batch_size": 32}},
    "eager decoding": {**DECODE, "pytorch": {"batch_size": 8}},
    "static decoding": {**DECODE, "pytorch": {"batch_size": 8, "cache_implementation": "static"}},
}

#: Numbers of requests of vLLM's points.
REQUESTS = (1, 64)

VLLM: dict[str, Any] = {
    "backend": "vllm",
    "warmup": WARMUP,
    "max_input_tokens": 128,
    "max_output_tokens": 128,
    "decoder": {"do_sample": False},
    "vllm": {
        "engine": {
            "load_format": "dummy",
            "max_model_len": 1024,
            "max_num_seqs": max(REQUESTS),
            "compilation_config": {"cudagraph_capture_sizes": [*REQUESTS]},
        },
    },
}

#: A server of vLLM under load.
SERVED: dict[str, Any] = {
    "backend": "server",
    "server": {
        "preset": "vllm",
        "args": {
            "load_format": "dummy",
            "max_model_len": 1024,
            "max_num_seqs": 32,
            "enable_prefix_caching": False,
            "compilation_config": {"cudagraph_capture_sizes": [1, 32]},
        },
    },
    "max_input_tokens": 128,
    "max_output_tokens": 128,
    "decoder": {"do_sample": False},
    "load": {"concurrency": 32},
}


def _repeat(study: Study, folder: Path, found: Found, start_method: str, cycles: int, **fields: Any) -> None:
    """Measure a point in *cycles* processes, on all GPUs at once, and note how far they differ."""
    gpus = len(visible_gpus().all)
    result = study(
        "repeated",
        f"--llem-start-method={start_method}",
        *(["-n", str(gpus)] if gpus > 1 else []),
        **COMMON,
        **fields,
        execution={
            "n_cycles": cycles,
            "devices": "spread",
            "experiment_gap_seconds": 2,
            "contended_retries": 0,
        },
    )
    assert result.summary.completed == cycles
    results = map(ExperimentResult.read, (folder / "results").glob("*/experiments/*.json"))
    within = [one.window.pass_seconds_cv for one in results if one.window.pass_seconds_cv is not None]
    if within:
        found("CV of passes' times within a process, median", f"{statistics.median(within):.2%}")
    [point] = result.points
    for name in METRICS:
        summary = point.metrics[name]
        if summary.mean is None:
            continue
        found(name, f"{summary.mean:.5g}, n={summary.n}, CV {summary.cv or 0:.2%}")
        if (spread := gpu_spread(point, name)) is not None:
            found(name, f"on one GPU {spread.within or 0:.2%}, between GPUs {spread.between:.2%}")
        values: dict[str, list[str]] = {}
        for used, value in zip(point.gpus, summary.values, strict=True):
            values.setdefault(used[0], []).append(f"{value:.5g}")
        found(name, values)


@pytest.mark.parametrize("regime", PYTORCH)
def test_processes_of_pytorch_differ_by_this_much(
    study: Study, llama_1b: Path, tmp_path: Path, found: Found, regime: str
) -> None:
    _repeat(study, tmp_path, found, "forkserver", 10, **PYTORCH[regime], warmup=WARMUP, model=str(llama_1b))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("requests", REQUESTS)
def test_processes_of_vllm_differ_by_this_much(
    study: Study, llama_8b_shape: Path, tmp_path: Path, found: Found, requests: int
) -> None:
    _repeat(study, tmp_path, found, "spawn", 5, **VLLM, n=requests, model=str(llama_8b_shape))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_servers_of_vllm_differ_by_this_much(
    study: Study, llama_8b_shape: Path, tmp_path: Path, found: Found
) -> None:
    """Each cycle has a server of its own."""
    _repeat(study, tmp_path, found, "spawn", 5, **SERVED, model=str(llama_8b_shape))
