"""Throughput inside an experiment ÷ that of a bare script on the same batches.

    python tests/benchmarks/throughput.py [--model NAME] [--model-path DIR] [--batch-size N] [--rounds N]
                                          [--cache-implementation NAME]

Each round runs both, one after the other, each in a fresh process; the ratio is taken within the round. The bare
script loads the same model, warms up on the same batches as often, and calls ``generate`` on them until the same
time is full. 1.0 means that measuring costs nothing. The spread from run to run (CV over the rounds) is printed
for both, and their ratio: a round is what a cycle is to a study. The harness's share is the processor time that
pytest, guardian and meters take in the window ÷ the experiment's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from scipy import stats

from pytest_llem.backends.models import resolve_model
from pytest_llem.energy.estimate import WATTS_PER_BUSY_THREAD
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.study.config import ExperimentConfig

BARE = """
import json, random, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

job = json.loads(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(job["model"])
size = min(len(tokenizer), model.config.vocab_size)
vocabulary = [token for token in range(size) if token not in set(tokenizer.all_special_ids)]
rng = random.Random(42)
prompts = [rng.choices(vocabulary, k=job["input_len"]) for _ in range(job["n"])]
step = job["batch_size"]
batches = [torch.tensor(prompts[at : at + step], device=device) for at in range(0, len(prompts), step)]
config = GenerationConfig(
    max_new_tokens=job["output_len"], do_sample=True, temperature=1.0, top_k=50, top_p=1.0, pad_token_id=0
)
if job["cache_implementation"]:
    config.cache_implementation = job["cache_implementation"]
model.generation_config = config

def sync():
    if device == "cuda":
        torch.cuda.synchronize()

@torch.inference_mode()
def generate(batch):
    return model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=config)

for _ in range(job["warmups"]):
    generate(batches[0])
sync()
tokens, began = 0, time.perf_counter()
while time.perf_counter() - began < job["seconds"]:
    for batch in batches:
        tokens += generate(batch)[:, job["input_len"] :].numel()
    sync()
print(tokens / (time.perf_counter() - began))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--model-path", type=Path, default=[], action="append", help="folder of models")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cache-implementation", help="as in a study's section pytorch, such as static")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each window")
    options = parser.parse_args()

    shape = {"n": 8, "input_len": 64, "output_len": 32}
    config = ExperimentConfig.model_validate(
        {
            "model": options.model,
            "dataset": shape,
            "warmup": {"n_warmup": 1, "convergence_detection": False},
            "measurement": {"min_window_seconds": options.seconds},
            "energy": {"backend": "nvml" if torch.cuda.is_available() else "estimate"},
            "pytorch": {
                "batch_size": options.batch_size,
                "cache_implementation": options.cache_implementation,
            },
        }
    )
    paths = [str(path) for path in options.model_path]
    job = Job(
        {"experiment_id": "bench", "config_hash": "0" * 16},
        config.model_dump(mode="json"),
        ".",
        model_path=paths,
        harness=[os.getpid()],
    )
    bare_job = {
        "model": resolve_model(options.model, options.model_path).location,
        "batch_size": options.batch_size,
        "cache_implementation": options.cache_implementation,
        "warmups": 2,
        "seconds": options.seconds,
        **shape,
    }
    inside, bare, shares = [], [], []
    for number in range(options.rounds):
        pair = [lambda: _inside(job), lambda: _bare(bare_job)]
        order = [0, 1] if number % 2 == 0 else [1, 0]
        figures = {which: pair[which]() for which in order}
        (tokens, share), other = figures[0], figures[1]
        inside.append(tokens)
        shares.append(share)
        bare.append(other)
        ratio = inside[-1] / bare[-1]
        print(f"round {number + 1}: inside {inside[-1]:.1f} tok/s, bare {bare[-1]:.1f} tok/s, ratio {ratio:.3f}")
    ratios = [one / other for one, other in zip(inside, bare, strict=True)]
    print(f"ratio: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}")
    if options.rounds > 1:
        print(f"CV: inside {_cv(inside):.1%}, bare {_cv(bare):.1%}, {_ratio_of_cvs(inside, bare)}")
    print(f"harness's share of the processor time: median {statistics.median(shares):.3%}, max {max(shares):.3%}")


def _cv(figures: list[float]) -> float:
    return statistics.stdev(figures) / statistics.fmean(figures)


def _ratio_of_cvs(one: list[float], other: list[float]) -> str:
    """Return the ratio, with its interval as for standard deviations of normal samples (F distribution)."""
    ratio, freedom = _cv(one) / _cv(other), (len(one) - 1, len(other) - 1)
    low, high = (ratio / stats.f.ppf(at, *freedom) ** 0.5 for at in (0.975, 0.025))
    return f"ratio {ratio:.2f} (95 %: {low:.2f} to {high:.2f})"


def _inside(job: Job) -> tuple[float, float]:
    """Return the tokens per second of an experiment, and the harness's share of the processor time."""
    outcome = run_isolated(job)
    assert outcome.result is not None, outcome
    result = json.loads(outcome.result)
    window = result["window"]
    # The estimate is of the processor time. Beside a GPU one thread is busy.
    spent = (
        window["window_seconds"]
        if torch.cuda.is_available()
        else window["window_energy_j"] / WATTS_PER_BUSY_THREAD
    )
    return float(result["metrics"]["output_tokens_per_second"]["value"]), result["harness_cpu_seconds"] / spent


def _bare(job: dict[str, object]) -> float:
    command = [sys.executable, "-c", BARE, json.dumps(job)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
