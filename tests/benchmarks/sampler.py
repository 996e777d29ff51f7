"""Throughput with the sampler of power ÷ without it, over a scripted board.

    python tests/benchmarks/sampler.py [--rounds N] [--seconds S] [--boards N] [--call-ms MS]

One process loads the tiny model once. Each round measures it with and without the sampler, one after the other, in
turns which comes first; the ratio is taken within the round. 1.0 means that sampling costs nothing. Many short
rounds tell more than few long ones: a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.backends.protocol import EngineContext
from pytest_llem.backends.pytorch import PyTorchEngine
from pytest_llem.energy.nvml import NvmlMeter
from pytest_llem.measurement.prompts import build_workload
from pytest_llem.study.config import ExperimentConfig
from tests.support import nvml
from tests.support.nvml import Board, Script

SHAPE = {"n": 8, "input_len": 64, "output_len": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="two at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each window")
    parser.add_argument("--boards", type=int, default=1)
    parser.add_argument("--call-ms", type=float, default=4.0, help="how long a call of NVML takes")
    options = parser.parse_args()
    uuids = [f"GPU-{number}" for number in range(options.boards)]
    if "LLEM_SCRIPTED_NVML" not in os.environ:  # the loader looks for NVML's library as a process starts
        with tempfile.TemporaryDirectory() as folder:
            boards = [Board(uuid, [(0.0, 300.0)], {"tick_ms": 100}) for uuid in uuids]
            script = Script(Path(folder) / "script", boards, options.call_ms)
            script.write()
            env = nvml.environment(nvml.build(Path(folder)), script)
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    ratios = compare(uuids, options.rounds, options.seconds)
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    spread = f"min {min(ratios):.4f}, max {max(ratios):.4f}, mean {mean:.4f} ± {error:.4f} (standard error)"
    print(f"with ÷ without: median {statistics.median(ratios):.4f}, {spread}")


def compare(uuids: list[str], rounds: int, seconds: float) -> list[float]:
    """Return the ratios of tokens/s, and say how each round went."""
    config = ExperimentConfig.model_validate(
        {"model": "builtin:tiny-llama", "dataset": SHAPE, "pytorch": {"batch_size": SHAPE["n"]}}
    )
    engine = PyTorchEngine(config, EngineContext())
    engine.fetch()
    engine.load()
    batches = engine.prepare(build_workload(config, engine, None).prompts)
    for batch in batches:
        engine.generate(batch)
    ratios = []
    for number in range(rounds):
        figures = {}
        for sampler in (True, False) if number % 2 == 0 else (False, True):
            meter = NvmlMeter(sampler=sampler)
            meter.open(uuids)
            try:
                meter.begin()
                passes, began = 0, time.perf_counter()
                while time.perf_counter() - began < seconds:
                    for batch in batches:
                        engine.generate(batch)
                    passes += 1
                tokens = passes * SHAPE["n"] * SHAPE["output_len"]
                figures[sampler] = tokens / (time.perf_counter() - began)
                reading = meter.end()
                if bool(reading.samples) != sampler:
                    raise SystemExit("the sampler was not as it should have been")
                if sampler:
                    cpu_s = reading.harness_cpu_seconds
            finally:
                meter.close()
        ratios.append(figures[True] / figures[False])
        print(
            f"round {number + 1}: with {figures[True]:.1f} tok/s, without {figures[False]:.1f} tok/s, "
            f"ratio {ratios[-1]:.4f}; the sampler took {cpu_s:.3f} s of processor time",
            flush=True,
        )
    engine.close()
    return ratios


if __name__ == "__main__":
    main()
