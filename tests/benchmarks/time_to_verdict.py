"""Measure how long a comparison takes to the right verdict, by how candidate and reference are interleaved.

    python tests/benchmarks/time_to_verdict.py [--model NAME] [--model-path DIR] [--extra 0 5 10 20] [--repeat N]
        [--delta D] [--cycles N] [--seconds S] [--how cycle pass auto] [--load]

The candidate's engine is that of the reference, and busy for some per cent longer after each batch. Three ways are
compared: whole cycles that follow each other (``cycle``), turns of passes (``pass``), both with a fixed number of
cycles, and turns of passes until the gates are decided (``auto``). Printed are the verdict on ``seconds``, its
interval, the wall time, the number of pairs, the standard deviation of a pair's log ratio, and the number of pairs
that are needed in theory for that spread, this change and this delta, with a power of 90 %: by the normal
distribution, and by the t-test.

``--load`` keeps one CPU busy half of the time in a process beside it.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pytest_llem import StudyResult
from pytest_llem.gates.matching import in_pairs
from pytest_llem.gates.sequential import Schedule, cycles_needed
from tests.support.environments import EVERYTHING, Environment

#: The gated metric.
METRIC = "seconds"

#: Probability of a false alarm.
ALPHA = 0.01

ENGINE = """
import time
from pytest_llem.engines.pytorch.engine import PyTorchEngine

class Engine(PyTorchEngine):
    def generate(self, batch):
        began = time.perf_counter()
        generated = super().generate(batch)
        end = time.perf_counter() + {extra} * (time.perf_counter() - began)
        while time.perf_counter() < end:
            pass
        return generated
"""

LOAD = """
import time
while True:
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
    time.sleep(0.5)
"""


def run(folder: Path, python: Path, extra: float, how: str, options: argparse.Namespace) -> Path:
    """Run a comparison in the new folder *folder*, and return its results directory."""
    folder.mkdir()
    (folder / "extra_work.py").write_text(ENGINE.format(extra=extra))
    execution = {"experiment_gap_seconds": 0, "start_method": "forkserver", "n_cycles": options.cycles}
    if how == "auto":
        execution |= {"n_cycles": "auto", "max_cycles": options.max_cycles}
    study = {
        "name": "verdict",
        "model": options.model,
        "backend": "extra_work:Engine",
        "extra_work:Engine": {"batch_size": 4},
        "n": 4,
        "max_input_tokens": 32,
        "max_output_tokens": options.tokens,
        "warmup": {"convergence_detection": False, "n_warmup": 2},
        "baseline": {"enabled": False},
        "measurement": {"min_window_seconds": options.seconds},
        "execution": execution,
        "gates": {
            "metrics": [METRIC],
            "alpha": ALPHA,
            "delta": options.delta,
            "interleave": "cycle" if how == "cycle" else "pass",
            "min_turn_seconds": options.turn,
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-q", f"--rootdir={folder}"]
    command += [f"--llem-against={python}"]
    if options.model_path:
        command += ["-o", f"llem_model_path={options.model_path.resolve()}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = list((folder / "results").glob("*/study_result.json"))
    if not found:
        raise SystemExit(f"{done.stdout}{done.stderr}")
    return found[0].parent


def log_ratios(results: Path) -> list[float]:
    """Return ln(candidate / reference) of each pair of cycles."""
    (point,), (other,) = (StudyResult.load(folder).points for folder in (results, results / "reference"))
    sides = [
        {cycle: value for cycle, value in zip(one.cycles, one.metrics[METRIC].values, strict=True) if value}
        for one in (point, other)
    ]
    values, others = in_pairs(point, other, METRIC, *sides)
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
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--load", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("extra  how    verdict       ratio (interval)      wall s  pairs  sd of a pair  in theory")
    with tempfile.TemporaryDirectory() as made, busy(is_wanted=options.load):
        folder = Path(made)
        environment = Environment(folder / "environment", *EVERYTHING)
        (environment.site_packages / "extra_work.py").write_text(ENGINE.format(extra=0))
        for number in range(options.repeat):
            for extra in options.extra:
                for how in options.how:  # alternately, so that they meet the same machine
                    began = time.monotonic()
                    name = f"{how}-{extra:g}-{number}"
                    results = run(folder / name, environment.python, extra / 100, how, options)
                    seconds = time.monotonic() - began
                    (verdict,) = StudyResult.load(results).points[0].verdicts
                    found = log_ratios(results)
                    sd = statistics.stdev(found) if len(found) > 1 else math.nan
                    low, high = verdict.interval or (math.nan, math.nan)
                    ratio = f"{verdict.ratio or math.nan:.3f} ({low:.3f}–{high:.3f})"
                    theory = cycles_needed(
                        sd,
                        delta=options.delta,
                        change=extra / 100,
                        alpha=ALPHA,
                        schedule=Schedule(4, options.max_cycles),
                    )
                    print(
                        f"{extra:4g} %  {how:<6} {verdict.verdict:<13} {ratio:<21} {seconds:6.0f} {len(found):6} "
                        f"{sd:12.2%} {theory.normal or math.inf:10} {theory.fixed or math.inf:4}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
