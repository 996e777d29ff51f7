"""Measure throughput inside an experiment ÷ that of a plain script on the same batches.

    python tests/benchmarks/throughput.py [--model NAME] [--model-path DIR] [--batch-size N] [--rounds N]
                                          [--cache-implementation NAME]

A round starts an experiment, isolated and metered as in any study, and a plain script that loads the same model
and warms up on the same batches as often. Then their passes are interleaved, so that drift and other load affect
both alike; each pass is compared with the adjacent one of the other. A ratio of 1.0 means that measuring costs
nothing. Supervisor and sampler run beside both: their cost is in the harness's share, and in what ``sampler.py``
prints.

The spread between rounds (CV) is printed for both, as is their ratio, with the interval for the spreads of pairs
(Morgan 1939, Pitman 1939). The harness's share is the processor time of pytest, supervisor and meters in the
window, waiting included, ÷ the experiment's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import interleaved
import torch
from scipy import stats

from pytest_llem.engines.models import resolve_model
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.study.config import ExperimentConfig

SHAPE = {"n": 8, "input_len": 64, "output_len": 32}

SCRIPT = """
import json, os, random, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

logging.disable_progress_bar()
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
mine, other = (os.open(os.path.join(job["folder"], name), os.O_RDWR) for name in ("script", "inside"))
seconds = []
while os.read(mine, 1) == b".":
    began = time.perf_counter()
    for batch in batches:
        generate(batch)
    sync()
    seconds.append(time.perf_counter() - began)
    os.write(other, b".")
print(json.dumps(seconds))
"""


@dataclass(frozen=True)
class Round:
    """Duration of each pass in s, in order, and the harness's share of the processor time."""

    inside: Sequence[float]
    script: Sequence[float]
    share: float

    def ratios(self) -> list[float]:
        """Return the throughput inside ÷ the script's, for each pair of passes."""
        return [script / inside for inside, script in zip(self.inside, self.script, strict=False)]

    def speeds(self) -> tuple[float, float]:
        """Return the tokens per second, inside and of the script."""
        tokens, pairs = SHAPE["n"] * SHAPE["output_len"], len(self.ratios())
        inside, script = (pairs * tokens / sum(side[:pairs]) for side in (self.inside, self.script))
        return inside, script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--model-path", type=Path, default=[], action="append", help="folder of models")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cache-implementation", help="as in a study's section pytorch, such as static")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each window, for both of them")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        rounds.append(compare(options, first=(interleaved.INSIDE, interleaved.SCRIPT)[number % 2]))
        inside, script = rounds[-1].speeds()
        ratios = rounds[-1].ratios()
        print(
            f"round {number + 1}: inside {inside:.1f} tok/s, script {script:.1f} tok/s, "
            f"ratio of {len(ratios)} pairs {statistics.median(ratios):.3f}",
            flush=True,
        )
    ratios = sorted(ratio for one in rounds for ratio in one.ratios())
    # Interval of the median from order statistics: the number of values below it is binomial.
    low, high = (ratios[int(stats.binom.ppf(at, len(ratios) - 1, 0.5))] for at in (0.025, 0.975))
    print(f"ratio: median {statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f})")
    if len(rounds) > 2:
        print(spreads(*zip(*(one.speeds() for one in rounds), strict=True)))
    shares = [one.share for one in rounds]
    print(f"harness's share of the processor time: median {statistics.median(shares):.3%}, max {max(shares):.3%}")


def compare(options: argparse.Namespace, first: str) -> Round:
    """Run an experiment and a script with interleaved passes; *first* names the one that begins."""
    passed_on = {"batch_size": options.batch_size, "cache_implementation": options.cache_implementation}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in (interleaved.INSIDE, interleaved.SCRIPT):
            os.mkfifo(folder / side)
        pipes = {side: os.open(folder / side, os.O_RDWR) for side in (interleaved.INSIDE, interleaved.SCRIPT)}
        config = ExperimentConfig.model_validate(
            {
                "model": options.model,
                "dataset": SHAPE,
                "backend": interleaved.NAME,
                interleaved.NAME: {**passed_on, "folder": name},
                "warmup": {"n_warmup": 1, "convergence_detection": False},
                "measurement": {"min_window_seconds": options.seconds},
                "energy": {"backend": "nvml" if torch.cuda.is_available() else "estimate"},
            }
        )
        job = Job(
            {"experiment_id": "testbed", "config_hash": "0" * 16},
            config.model_dump(mode="json"),
            ".",
            model_path=[str(path) for path in options.model_path],
            python_path=[str(Path(__file__).parent)],
            harness=[os.getpid()],
        )
        location = resolve_model(options.model, options.model_path).location
        script_job = {"model": location, "warmups": 2, "folder": name, **passed_on, **SHAPE}
        command = [sys.executable, "-c", SCRIPT, json.dumps(script_job)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
            os.write(pipes[first], interleaved.GO)
            outcome = run_isolated(job, timeout=600 + options.seconds)
            os.write(pipes[interleaved.SCRIPT], interleaved.STOP)  # also if the experiment failed
            printed, _ = script.communicate()
        for pipe in pipes.values():
            os.close(pipe)
        assert outcome.result is not None, outcome
        assert script.returncode == 0
        found = json.loads((folder / interleaved.FOUND).read_text())
        harness_cpu_seconds = json.loads(outcome.result)["harness_cpu_seconds"]
        return Round(found["seconds"], json.loads(printed), harness_cpu_seconds / found["cpu_seconds"])


def spreads(one: Sequence[float], other: Sequence[float]) -> str:
    """Return both CVs and their ratio with its 95 % interval, for paired samples."""
    cvs = [statistics.stdev(figures) / statistics.fmean(figures) for figures in (one, other)]
    freedom = len(one) - 2
    correlation = statistics.correlation(one, other)
    width = 1 + 2 * (1 - correlation**2) * stats.t.ppf(0.975, freedom) ** 2 / freedom
    ratio = cvs[0] / cvs[1]
    low, high = (ratio * (width + sign * (width**2 - 1) ** 0.5) ** 0.5 for sign in (-1, 1))
    return f"CV: inside {cvs[0]:.1%}, script {cvs[1]:.1%}, ratio {ratio:.2f} (95 %: {low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
