"""Measure whether the two-thousandth experiment costs more time and memory than the first one.

    python tests/benchmarks/scale.py [--experiments N] [--start-method METHOD]

Runs a study of N points of the do-nothing engine with pytest. Prints, for each tenth of the study, the median time
between the ends of two experiments and the memory of the pytest process at its end (resident, without shared
memory), and the ratio of the last tenth's to the first's. pytest keeps three reports of every test: so the growth
of plain pytest's memory with as many empty tests is printed, too.
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
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
TENTHS = 10

STUDY = {
    "name": "scale",
    "model": "none",
    "backend": "noop",
    "n": 1,
    "max_input_tokens": 4,
    "max_output_tokens": 3,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "energy": {"backend": "estimate"},
    "baseline": {"enabled": False},
    "execution": {"n_cycles": 1, "experiment_gap_seconds": 0},
}


PLAIN = """
import time
import pytest

@pytest.mark.parametrize("size", range(1, {experiments} + 1), ids="size={{}}".format)
def test_nothing(size):
    time.sleep(0.01)  # gives the memory reader time
"""


def run_study(directory: Path, experiments: int, method: str) -> list[tuple[float, float]]:
    """Run the study, and return what *run* returns."""
    study = {**STUDY, "sweep": {"noop.size": list(range(1, experiments + 1))}}
    (directory / "scale.yaml").write_text(yaml.safe_dump(study))
    options = ["--llem-yes", "--llem-start-method", method, "--llem-run-id", "run"]
    return run(directory, ["scale.yaml", "-p", "pytest_llem.plugin", *options])


def run_plain(directory: Path, experiments: int) -> list[tuple[float, float]]:
    """Run as many empty tests without the plugin, and return what *run* returns."""
    (directory / "test_plain.py").write_text(PLAIN.format(experiments=experiments))
    return run(directory, ["test_plain.py"])


def run(directory: Path, options: Sequence[str]) -> list[tuple[float, float]]:
    """Run pytest, and return its memory in MB by the time of the reading, in s."""
    process = psutil.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-qq", *options],
        cwd=directory,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT / "tests" / "support" / "noop_engine"),
        },
        stdout=subprocess.DEVNULL,
    )
    seen = []
    while process.poll() is None:
        time.sleep(0.2)
        try:
            memory = process.memory_info()
        except psutil.Error:  # it has just ended
            break
        seen.append((time.time(), (memory.rss - memory.shared) / 1e6))
    if process.wait():
        sys.exit(f"pytest ended with {process.returncode}")
    return seen


def parts(figures: Sequence[float]) -> list[Sequence[float]]:
    """Split *figures* into tenths."""
    size = len(figures) // TENTHS
    return [figures[at * size : (at + 1) * size] for at in range(TENTHS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--start-method", choices=("spawn", "forkserver"), default="forkserver")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory = run_study(Path(folder), options.experiments, options.start_method)
        manifest = json.loads((Path(folder) / "results" / "scale_run" / "manifest.json").read_text())
        plain = [max(one) for one in parts([held for _, held in run_plain(Path(folder), options.experiments)])]
    ends = sorted(datetime.fromisoformat(one["completed_at"]).timestamp() for one in manifest["experiments"])
    if manifest["completed"] != options.experiments:
        sys.exit(f"{manifest['completed']} of {options.experiments} experiments completed")
    took = [1000 * statistics.median(one) for one in parts([after - before for before, after in pairwise(ends)])]
    held = [max(amount for at, amount in memory if at <= one[-1]) for one in parts(ends)]
    for number, (milliseconds, megabytes) in enumerate(zip(took, held, strict=True), start=1):
        print(f"tenth {number}: {milliseconds:.1f} ms an experiment, pytest holds {megabytes:.1f} MB")
    print(f"last tenth / first: time {took[-1] / took[0]:.2f}, memory {held[-1] / held[0]:.2f}")
    print(f"plain pytest, likewise: memory {plain[-1] / plain[0]:.2f} ({plain[0]:.1f} to {plain[-1]:.1f} MB)")


if __name__ == "__main__":
    main()
