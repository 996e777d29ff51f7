"""vLLM on several GPUs: what a token costs by their number, and that each is free again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.hardware.gpus import visible_gpus
from tests.gpu.counters import Log, logging
from tests.gpu.kills import FREE_BYTES, kill_in_window, used_bytes

Found = Callable[[str, object], None]

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(len(visible_gpus().all) < 2, reason="needs two GPUs"),
]

REQUESTS = 64

#: Numbers of GPUs, of those that there are.
PARALLEL = [size for size in (1, 2, 4, 8) if size <= len(visible_gpus().all)]

POINT: dict[str, Any] = {
    "backend": "vllm",
    "n": REQUESTS,
    "max_input_tokens": 128,
    "max_output_tokens": 128,
    "decoder": {"do_sample": False},
    "warmup": {"n_warmup": 2, "convergence_detection": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 8},
    "vllm": {
        "engine": {
            "load_format": "dummy",
            "max_model_len": 1024,
            "max_num_seqs": REQUESTS,
            "compilation_config": {
                "cudagraph_capture_sizes": [1, REQUESTS],
                "pass_config": {"fuse_allreduce_rms": False},  # it would compile FlashInfer's kernels
            },
        },
    },
}

CYCLES = {"n_cycles": 1, "experiment_gap_seconds": 0, "contended_retries": 0, "cycle_order": "sequential"}


@pytest.mark.parametrize(("shape", "sizes"), [("8b", PARALLEL), ("70b", PARALLEL[1:])], ids=["8b", "70b"])
def test_energy_of_all_gpus_counts_and_each_is_free_again(
    study: Callable[..., StudyResult],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    found: Found,
    shape: str,
    sizes: list[int],
) -> None:
    gpus = visible_gpus().all
    before, file = [used_bytes(gpu) for gpu in gpus], tmp_path / "counters"
    with logging(file):
        result = study(
            f"parallel-{shape}",
            "--llem-start-method=spawn",
            **POINT,
            model=str(request.getfixturevalue(f"llama_{shape}_shape")),
            sweep={"vllm.engine.tensor_parallel_size": sizes},
            execution=CYCLES,
        )
    log = Log(file)
    assert result.summary.completed == len(sizes)
    for path in (tmp_path / "results").glob("*/experiments/*.json"):
        one = ExperimentResult.read(path)
        began, ended = one.window.began_at, one.window.ended_at
        assert began is not None
        assert ended is not None
        assert one.effective_config["vllm"]["engine"]["tensor_parallel_size"] == len(one.devices)
        assert one.metrics["energy_j"].covers_engine
        for device in one.devices:
            assert device.energy_j is not None, device.reason
            assert log.has(device.device, device.energy_j, began, ended)
    for point in result.points:
        for name in ("output_tokens_per_second", "energy_per_output_token_j", "mean_power_w", "tpot_p50_ms"):
            found(f"{point.id}: {name}", point.metrics[name].mean)
    assert all(used_bytes(gpu) - used <= FREE_BYTES for gpu, used in zip(gpus, before, strict=True))


def test_sigkill_of_pytest_frees_all_gpus(tmp_path: Path, llama_8b_shape: Path, found: Found) -> None:
    first, *others = visible_gpus().all
    before = [used_bytes(gpu) for gpu in others]
    engine = {**POINT["vllm"]["engine"], "tensor_parallel_size": PARALLEL[-1]}
    study = {
        "name": "killed",
        "model": str(llama_8b_shape),
        **POINT,
        "measurement": {"min_window_seconds": 600},
        "vllm": {"engine": engine},
        "execution": CYCLES,
    }
    assert kill_in_window(study, tmp_path, first, found) > 2**33, "the model is loaded"
    assert all(used_bytes(gpu) - used <= FREE_BYTES for gpu, used in zip(others, before, strict=True))
