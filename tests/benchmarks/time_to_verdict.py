"""Measure how long a comparison takes to the right verdict, by how candidate and reference are interleaved.

    python tests/benchmarks/time_to_verdict.py [--model NAME] [--model-path DIR] [--extra 0 5 10 20] [--repeat N]
        [--delta D] [--cycles N] [--seconds S] [--how cycle pass auto] [--metrics seconds energy_j] [--load]
        [--backend pytorch] [--n 4] [--input-tokens 32] [--tokens 16] [--results DIR] [--time-budget 3m]
        [--section '{"batch_size": 4, "cache_implementation": "static"}'] [--start-method forkserver]

The candidate's engine is that of the reference, and busy for some per cent longer after each batch. Three ways are
compared: whole cycles that follow each other (``cycle``), turns of passes (``pass``), both with a fixed number of
cycles, and turns of passes until the gates are decided (``auto``). Printed for each metric are the verdict, its
interval, the wall time, the number of pairs, the standard deviation of a pair's log ratio, and the number of pairs
that are needed in theory for that spread, this change and this delta, with a power of 90 %. ``--section`` has the
engine's options, ``--results`` keeps the runs' results.

``--load`` keeps one CPU busy half of the time in a process beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pytest_llem import StudyResult
from pytest_llem.gates.matching import in_pairs
from pytest_llem.gates.power_analysis import cycles_needed
from pytest_llem.gates.sequential import Schedule
from tests.support.environments import EVERYTHING, Environment

#: Probability of a false alarm.
ALPHA = 0.01

ENGINE = """
import time
from pytest_llem.engines.{backend}.engine import {base}

class Engine({base}):
    def generate(self, batch):
        began = time.perf_counter()
        generated = super().generate(batch)
        end = time.perf_counter() + {extra} * (time.perf_counter() - began)
        while time.perf_counter() < end:
            pass
        return generated
"""

#: Classes of the engines by their names.
ENGINES = {"pytorch": "PyTorchEngine", "vllm": "VLLMEngine"}

LOAD = """
import time
while True:
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
    time.sleep(0.5)
"""


def engine(backend: str, extra: float) -> str:
    """Return the source of an engine that is busy for *extra* of its time after each batch."""
    return ENGINE.format(backend=backend, base=ENGINES[backend], extra=extra)


def run(folder: Path, python: Path, extra: float, how: str, options: argparse.Namespace) -> Path:
    """Run a comparison in the new folder *folder*, and return its results directory."""
    folder.mkdir()
    (folder / "extra_work.py").write_text(engine(options.backend, extra))
    execution = {
        "experiment_gap_seconds": 0,
        "start_method": options.start_method,
        "n_cycles": options.cycles,
    }
    if how == "auto":
        execution |= {"n_cycles": "auto", "max_cycles": options.max_cycles}
    study = {
        "name": "verdict",
        "model": options.model,
        "backend": "extra_work:Engine",
        "extra_work:Engine": options.section,
        "n": options.n,
        "max_input_tokens": options.input_tokens,
        "max_output_tokens": options.tokens,
        "warmup": {"convergence_detection": False, "n_warmup": 2},
        "baseline": {"enabled": False},
        "measurement": {"min_window_seconds": options.seconds},
        "execution": execution,
        "gates": {
            "metrics": options.metrics,
            "alpha": ALPHA,
            "delta": options.delta,
            "interleave": "cycle" if how == "cycle" else "pass",
            "min_turn_seconds": options.turn,
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-q", f"--rootdir={folder}"]
    command += [f"--llem-against={python}"]
    if options.time_budget:
        command += [f"--llem-time-budget={options.time_budget}"]
    if options.model_path:
        command += ["-o", f"llem_model_path={options.model_path.resolve()}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = list((folder / "results").glob("*/study_result.json"))
    if not found:
        raise SystemExit(f"{done.stdout}{done.stderr}")
    return found[0].parent


def log_ratios(results: Path, metric: str) -> list[float]:
    """Return ln(candidate / reference) of each pair of cycles."""
    (point,), (other,) = (StudyResult.load(folder).points for folder in (results, results / "reference"))
    sides = [
        {cycle: value for cycle, value in zip(one.cycles, one.metrics[metric].values, strict=True) if value}
        for one in (point, other)
    ]
    values, others = in_pairs(point, other, metric, *sides)
    return [math.log(values[cycle] / others[cycle]) for cycle in values]


@contextmanager
def busy(*, is_wanted: bool) -> Iterator[None]:
    """Keep one CPU busy half of the time."""
    process = subprocess.Popen([sys.executable, "-c", LOAD]) if is_wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--extra", type=float, nargs="+", default=[0, 5, 10, 20], help="more time, in per cent")
    parser.add_argument("--how", nargs="+", default=["cycle", "pass", "auto"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--delta", type=float, default=0.02)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--max-cycles", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--turn", type=float, default=0.5, help="shortest turn, in s")
    parser.add_argument("--input-tokens", type=int, default=32, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--metrics", nargs="+", default=["seconds"])
    parser.add_argument("--backend", choices=[*ENGINES], default="pytorch")
    parser.add_argument("--n", type=int, default=4, help="prompts of a pass")
    parser.add_argument("--section", type=json.loads, default={"batch_size": 4}, help="as JSON")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--time-budget", help="of each comparison, such as 3m")
    parser.add_argument("--start-method", choices=("forkserver", "spawn"), default="forkserver")
    parser.add_argument("--load", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("extra  how    metric     verdict       ratio (interval)      wall s  pairs  sd of a pair  in theory")
    with tempfile.TemporaryDirectory() as made, busy(is_wanted=options.load):
        folder = Path(made)
        environment = Environment(folder / "environment", *EVERYTHING)
        (environment.site_packages / "extra_work.py").write_text(engine(options.backend, 0))
        for number in range(options.repeat):
            for extra in options.extra:
                for how in options.how:  # alternately, so that they meet the same machine
                    began = time.monotonic()
                    name = f"{how}-{extra:g}-{number}"
                    results = run(folder / name, environment.python, extra / 100, how, options)
                    show(results, extra, how, time.monotonic() - began, options)
                    if options.results is not None:
                        shutil.copytree(results, options.results / name)


def show(results: Path, extra: float, how: str, seconds: float, options: argparse.Namespace) -> None:
    """Print a line for each metric."""
    for verdict in StudyResult.load(results).points[0].verdicts:
        found = log_ratios(results, verdict.metric)
        sd = statistics.stdev(found) if len(found) > 1 else math.nan
        low, high = verdict.interval or (math.nan, math.nan)
        ratio = f"{verdict.ratio or math.nan:.3f} ({low:.3f}–{high:.3f})"
        theory = cycles_needed(
            sd,
            delta=options.delta,
            change=extra / 100,
            alpha=ALPHA,
            schedule=Schedule(4, options.max_cycles),
            family=len(options.metrics),
        )
        print(
            f"{extra:4g} %  {how:<6} {verdict.metric:<10} {verdict.verdict:<13} {ratio:<21} {seconds:6.0f} "
            f"{len(found):6} {sd:12.2%} {theory.fixed or math.inf:10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
