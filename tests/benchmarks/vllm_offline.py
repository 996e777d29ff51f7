"""Measure vLLM's throughput and energy inside an experiment ÷ those of a bare script with ``LLM.generate``.

    python tests/benchmarks/vllm_offline.py MODEL [--requests N …] [--rounds N] [--seconds S]

Run it in an environment with vLLM, on a GPU. MODEL is a folder with a ``config.json``: weights are random. Each
round starts the bare script, which measures every number of requests, then an experiment for each number, all in
fresh processes. Prompts have 128 tokens, answers too; decoding is greedy, and all requests are submitted at once.
Both sides read the GPU's energy counter at its ticks around a window of whole passes. The bare script takes its
times between two calls of ``LLM.generate``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig

TOKENS = 128

#: Passes before each window of the bare script. An experiment warms up with parts of a pass and a whole one.
WARMUP_PASSES = 2

#: Tokens per second, and J per output token.
Found = tuple[float, float]


def engine_arguments(sizes: list[int]) -> dict[str, Any]:
    """Return vLLM's arguments for both sides. CUDA graphs are captured for the measured batch sizes only."""
    return {
        "load_format": "dummy",
        "max_model_len": 1024,
        "max_num_seqs": max(sizes),
        "gpu_memory_utilization": 0.8,
        "compilation_config": {"cudagraph_capture_sizes": sorted(sizes)},
    }


def bare(model: str, sizes: list[int], seconds: float) -> list[Found]:
    """Return the figures of a bare script for each number of requests."""
    import pynvml
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **engine_arguments(sizes),
    )
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.0, detokenize=False)
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(visible_gpus().all[0].uuid)

    def tick() -> float:
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        while (now := pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) == before:
            time.sleep(0.0005)
        return float(now) / 1000

    found = []
    for size in sizes:
        rng = random.Random(1)
        prompts = [{"prompt_token_ids": [rng.randrange(1000, 30000) for _ in range(TOKENS)]} for _ in range(size)]
        for _ in range(WARMUP_PASSES):
            llm.generate(prompts, params, use_tqdm=False)
        energy, began, passes = tick(), time.monotonic(), 0
        while time.monotonic() - began < seconds:
            llm.generate(prompts, params, use_tqdm=False)
            passes += 1
        taken, generated = time.monotonic() - began, passes * size * TOKENS
        found.append((generated / taken, (tick() - energy) / generated))
    llm.llm_engine.engine_core.shutdown()
    return found


def inside(model: str, size: int, sizes: list[int], seconds: float) -> Found:
    """Return the figures of an experiment."""
    config = ExperimentConfig.model_validate(
        {
            "model": model,
            "backend": "vllm",
            "n": size,
            "max_input_tokens": TOKENS,
            "max_output_tokens": TOKENS,
            "decoder": {"do_sample": False},
            "vllm": {"engine": engine_arguments(sizes)},
            "warmup": {"n_warmup": 2, "convergence_detection": False},
            "baseline": {"enabled": False},
            "measurement": {"min_window_seconds": seconds},
        }
    )
    identity = {"experiment_id": "one", "config_hash": "0" * 16}
    outcome = run_isolated(Job(identity, config.model_dump(mode="json"), directory="."))
    if outcome.result is None:
        raise SystemExit(f"the experiment failed: {outcome.error}")
    metrics = ExperimentResult.model_validate_json(outcome.result).metrics
    speed, energy = (metrics[name].value for name in ("output_tokens_per_second", "energy_per_output_token_j"))
    assert speed is not None
    return speed, float("nan") if energy is None else energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    model, sizes = str(options.model.resolve()), options.requests
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    spawn = multiprocessing.get_context("spawn")
    found: dict[tuple[str, int], list[Found]] = {}

    def note(side: str, size: int, figures: Found) -> None:
        found.setdefault((side, size), []).append(figures)
        print(f"{side}, {size} requests: {figures[0]:,.1f} tokens/s, {figures[1]:.5f} J/token", flush=True)

    for _ in range(options.rounds):
        began = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            measured = pool.submit(bare, model, sizes, options.seconds).result()
        for size, figures in zip(sizes, measured, strict=True):
            note("bare", size, figures)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
        for size in sizes:
            began = time.monotonic()
            note("inside", size, inside(model, size, sizes, options.seconds))
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    print("inside ÷ bare, of the medians")
    for size in sizes:
        ratios = [
            statistics.median(one[at] for one in found["inside", size])
            / statistics.median(one[at] for one in found["bare", size])
            for at in (0, 1)
        ]
        print(f"{size} requests: tokens/s {ratios[0]:.4f}, J per output token {ratios[1]:.4f}")


if __name__ == "__main__":
    main()
