"""Measure vLLM's throughput and energy inside an experiment ÷ those of a bare script with ``LLM.generate``.

    python tests/benchmarks/vllm_offline.py MODEL [--requests N] [--rounds N] [--seconds S]

Run it in an environment with vLLM, on a GPU. MODEL is a folder with a ``config.json``: weights are random. Each
round starts the bare script, then an experiment, each in a fresh process: prompts of 128 tokens, 128 new tokens,
greedy, all requests at once. Both read the GPU's energy counter at its ticks around a window of whole passes. The
bare script takes its times between two calls of ``LLM.generate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig

TOKENS = 128

ARGUMENTS = {"load_format": "dummy", "max_model_len": 1024, "max_num_seqs": 256, "gpu_memory_utilization": 0.8}

SCRIPT = """
import json, random, sys, time
import pynvml
from vllm import LLM, SamplingParams

def main(job):
    llm = LLM(model=job["model"], dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
              disable_log_stats=False, **job["arguments"])
    rng, tokens = random.Random(1), job["tokens"]
    prompts = [{"prompt_token_ids": [rng.randrange(1000, 30000) for _ in range(tokens)]}
               for _ in range(job["requests"])]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
    for _ in range(4):
        llm.generate(prompts, params, use_tqdm=False)
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)

    def tick():
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        while (now := pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) == before:
            time.sleep(0.0005)
        return now / 1000

    energy, began, passes = tick(), time.monotonic(), 0
    while time.monotonic() - began < job["seconds"]:
        llm.generate(prompts, params, use_tqdm=False)
        passes += 1
    seconds, generated = time.monotonic() - began, passes * job["requests"] * tokens
    print("FOUND" + json.dumps([generated / seconds, (tick() - energy) / generated]), flush=True)

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
"""


def bare(model: str, requests: int, seconds: float) -> tuple[float, float]:
    """Return the tokens per second and the J per output token of the bare script."""
    job = {
        "model": model,
        "requests": requests,
        "seconds": seconds,
        "tokens": TOKENS,
        "arguments": ARGUMENTS,
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(job)], capture_output=True, text=True, check=True
    )
    speed, energy = json.loads(run.stdout.rpartition("FOUND")[2].partition("\n")[0])
    return speed, energy


def inside(model: str, requests: int, seconds: float) -> tuple[float, float]:
    """Return the tokens per second and the J per output token of an experiment."""
    config = ExperimentConfig.model_validate(
        {
            "model": model,
            "backend": "vllm",
            "n": requests,
            "max_input_tokens": TOKENS,
            "max_output_tokens": TOKENS,
            "decoder": {"do_sample": False},
            "vllm": {"engine": ARGUMENTS},
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
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    model, found = str(options.model.resolve()), []
    for number in range(1, options.rounds + 1):
        pair = [measure(model, options.requests, options.seconds) for measure in (bare, inside)]
        found.append(pair)
        for name, (speed, energy) in zip(("bare", "inside"), pair, strict=True):
            print(f"round {number}, {name}: {speed:,.0f} tokens/s, {energy:.5f} J/token", flush=True)
    for at, what in enumerate(("tokens/s", "J per output token")):
        script, ours = (statistics.median(pair[side][at] for pair in found) for side in (0, 1))
        print(f"{what}, inside ÷ bare, of the medians: {ours / script:.3f}")


if __name__ == "__main__":
    main()
