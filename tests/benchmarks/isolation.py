"""Measure the cost of a process for each experiment: N isolated experiments ÷ the same N in one process.

    python tests/benchmarks/isolation.py [--start-method METHOD] [--seconds S] [--gap S] [--experiments N]
                                         [--rounds N] [--model NAME] [--model-path DIR]

Measures the wall time of whole commands: of pytest with a study of N cycles, and of one Python process that runs
the same experiments in a row with the same idle time between them. Each round runs both, and alternates which is
first; the ratio is taken within a round. A ratio of 1.0 means that isolation costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

LOOP = """
import json, sys, time
from pytest_llem import run_experiment

job = json.loads(sys.argv[1])
for number in range(job["experiments"]):
    if number:
        time.sleep(job["gap"])
    run_experiment(job["config"], model_path=job["model_path"])
"""


def seconds_of(command: Sequence[str], directory: Path) -> float:
    """Return the wall time of *command*, in s."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-method", choices=("spawn", "forkserver"), default="forkserver")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each window")
    parser.add_argument("--gap", type=float, default=0.0, help="idle time between experiments, in s")
    parser.add_argument("--experiments", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--model-path", action="append", default=[], help="folder of models")
    options = parser.parse_args()
    config: dict[str, Any] = {
        "model": options.model,
        "dataset": {"n": 1, "input_len": 8, "output_len": 8},
        "warmup": {"n_warmup": 1, "convergence_detection": False},
        "baseline": {"enabled": False},
        "measurement": {"min_window_seconds": options.seconds},
    }
    paths = [str(Path(path).resolve()) for path in options.model_path]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        execution = {"n_cycles": options.experiments, "experiment_gap_seconds": options.gap}
        (directory / "isolation.yaml").write_text(yaml.safe_dump({**config, "execution": execution}))
        python = [sys.executable, "-m", "pytest", "isolation.yaml", "-p", "pytest_llem.plugin"]
        isolated = [
            *python,
            "--llem-start-method",
            options.start_method,
            "-o",
            f"llem_model_path={' '.join(paths)}",
        ]
        job = {"config": config, "experiments": options.experiments, "gap": options.gap, "model_path": paths}
        loop = [sys.executable, "-c", LOOP, json.dumps(job)]
        for number in range(options.rounds):
            order = (isolated, loop) if number % 2 == 0 else (loop, isolated)
            took = {id(command): seconds_of(command, directory) for command in order}
            ours, theirs = took[id(isolated)], took[id(loop)]
            ratios.append(ours / theirs)
            print(f"round {number + 1}: isolated {ours:.1f} s, loop {theirs:.1f} s, {ratios[-1]:.3f}", flush=True)
    spread = f"min {min(ratios):.3f}, max {max(ratios):.3f}"
    print(f"{options.start_method}, isolated / loop: median {statistics.median(ratios):.3f}, {spread}")


if __name__ == "__main__":
    main()
