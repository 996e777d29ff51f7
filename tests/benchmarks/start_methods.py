"""Compare the metrics of spawn and forkserver: ten interleaved cycles of each, judged by the regression gate.

    python tests/benchmarks/start_methods.py [--cycles N] [--seconds S] [--model NAME] [--model-path DIR]

A cycle is one experiment of each start method; cycles alternate which is first. Prints the gate's verdicts for
forkserver against spawn, cycle by cycle, and the number of different digests of output ids. The exit status is 1
if the gate finds a change, or if there is more than one digest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.decisions import Question, contrast, decide
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.gates import DEFAULT_DELTA, GatesConfig

METRICS = ("output_tokens_per_second", "ttft_p50_ms", "itl_p50_ms", "energy_j")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each window")
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--model-path", action="append", default=[], help="folder of models")
    options = parser.parse_args()
    config = ExperimentConfig.model_validate(
        {
            "model": options.model,
            "dataset": {"n": 8, "input_len": 32, "output_len": 32},
            "warmup": {"n_warmup": 2, "convergence_detection": False},
            "baseline": {"enabled": False},
            "measurement": {"min_window_seconds": options.seconds},
            "pytorch": {"batch_size": 8},
        }
    )
    job = Job(
        {"experiment_id": "testbed", "config_hash": "0" * 16},
        config.model_dump(mode="json"),
        ".",
        model_path=[str(Path(path).resolve()) for path in options.model_path],
    )
    results: dict[str, list[dict[str, Any]]] = {"spawn": [], "forkserver": []}
    took: dict[str, float] = dict.fromkeys(results, 0.0)
    servers = ForkServers()
    try:
        for number in range(options.cycles):
            for method in list(results) if number % 2 == 0 else list(results)[::-1]:
                began = time.perf_counter()
                outcome = run_isolated(job, forkservers=servers if method == "forkserver" else None)
                took[method] += time.perf_counter() - began
                assert outcome.result is not None, outcome
                results[method].append(json.loads(outcome.result))
                assert results[method][-1]["start"]["method"] == method
    finally:
        servers.end()
    values = {
        method: {name: {at: one["metrics"][name]["value"] for at, one in enumerate(found)} for name in METRICS}
        for method, found in results.items()
    }
    questions = [
        Question(
            contrast(values["forkserver"][name], values["spawn"][name], paired=True),
            CATALOGUE[name].better or "lower",
            DEFAULT_DELTA,
        )
        for name in METRICS
    ]
    decisions = decide(questions, GatesConfig().alpha)
    for name, decision in zip(METRICS, decisions, strict=True):
        low, high = decision.interval
        print(f"{name}: {decision.verdict}, forkserver / spawn {decision.ratio:.3f} ({low:.3f}–{high:.3f})")
    digests = {one["tokens"]["output_digest"] for found in results.values() for one in found}
    print(f"{len(digests)} digest of output ids in {2 * options.cycles} experiments")
    print(
        ", ".join(f"{method}: {seconds / options.cycles:.1f} s an experiment" for method, seconds in took.items())
    )
    changed = {decision.verdict for decision in decisions} - {"SAME", "INCONCLUSIVE"}
    return int(bool(changed) or len(digests) != 1)


if __name__ == "__main__":
    sys.exit(main())
