"""Measure throughput with the power sampler ÷ without it, with scripted GPUs.

    python tests/benchmarks/sampler.py [--rounds N] [--gpus N] [--call-ms MS]

One process loads the tiny model once and starts the sampler once. A round is two batches: one while the sampler
runs, and one while it is stopped with SIGSTOP. Rounds alternate which is first; the ratio is taken within a round.
A ratio of 1.0 means that sampling costs nothing. A batch is longer than the sampling interval, so each batch
includes samples. Many short rounds are more precise than few long ones, as the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llem.energy.nvml import NvmlMeter
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.workload.prompts import build_workload
from tests.support import nvml
from tests.support.nvml import Script, ScriptedGpu

SHAPE = {"n": 8, "input_len": 64, "output_len": 32}
TOKENS = SHAPE["n"] * SHAPE["output_len"]

#: Quantile of the normal distribution for an interval of 95 %.
Z = 1.96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500, help="ten at least")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--call-ms", type=float, default=4.0, help="how long a call of NVML takes")
    options = parser.parse_args()
    uuids = [f"GPU-{number}" for number in range(options.gpus)]
    if "LLEM_SCRIPTED_NVML" not in os.environ:  # the loader looks for libnvidia-ml only at the start of a process
        with tempfile.TemporaryDirectory() as folder:
            gpus = [ScriptedGpu(uuid, [(0.0, 300.0)], {"tick_ms": 100}) for uuid in uuids]
            script = Script(Path(folder) / "script", gpus, options.call_ms)
            script.write()
            env = nvml.environment(nvml.build(Path(folder)), script)
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    ratios = sorted(compare(uuids, options.rounds))
    # Interval of the median from order statistics: the number of values below it is binomial.
    half = Z * len(ratios) ** 0.5 / 2
    low, high = ratios[int(len(ratios) / 2 - half)], ratios[min(int(len(ratios) / 2 + half), len(ratios) - 1)]
    print(f"with ÷ without: median {statistics.median(ratios):.4f} (95 %: {low:.4f} to {high:.4f})")


def compare(uuids: list[str], rounds: int) -> list[float]:
    """Return the ratios of tokens/s, and print what else was found."""
    config = ExperimentConfig.model_validate(
        {"model": "builtin:tiny-llama", "dataset": SHAPE, "pytorch": {"batch_size": SHAPE["n"]}}
    )
    engine = PyTorchEngine(config, EngineContext())
    engine.fetch()
    engine.load()
    [batch] = engine.prepare(build_workload(config, engine, None).prompts)
    for _ in range(3):
        engine.generate(batch)
    meter = NvmlMeter()
    meter.open(uuids)
    [sampler] = psutil.Process().children()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    try:
        meter.begin()
        for number in range(rounds):
            for runs in (True, False) if number % 2 == 0 else (False, True):
                sampler.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
                began = time.monotonic()
                engine.generate(batch)
                spans[runs].append((began, time.monotonic()))
        sampler.send_signal(signal.SIGCONT)
        samples = meter.end().samples
    finally:
        meter.close()
        engine.close()
    took = {runs: [ended - began for began, ended in found] for runs, found in spans.items()}
    for runs, how in ((True, "with"), (False, "without")):
        inside = sum(began <= one.at <= ended for began, ended in spans[runs] for one in samples)
        speed, rate = TOKENS / statistics.median(took[runs]), inside / sum(took[runs])
        print(f"{how}: {speed:.1f} tok/s, {rate:.2f} samples/s")
        if (rate > 1) != runs:  # a call interrupted by SIGSTOP may end after SIGCONT
            raise SystemExit("the sampler was not as it should have been")
    return [without / with_it for with_it, without in zip(took[True], took[False], strict=True)]


if __name__ == "__main__":
    main()
