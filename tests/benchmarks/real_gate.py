"""Check the gate on a real model: ten cycles against ten interleaved ones, of the same and of 20 % fewer tokens.

    python tests/benchmarks/real_gate.py [--model NAME] [--model-path DIR] [--cycles N] [--seconds S]

The same is measured as a user would do it: with ``--llem-against`` another environment with the same packages.
More tokens are a second study, of two points whose cycles alternate, compared in pairs. Prints the verdicts of the
gates on ``seconds`` and ``energy_j`` (which, without a meter, is estimated, and allowed to decide). The exit
status is 1 if the same is called a REGRESSION, or 20 % more tokens are not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pytest_llem import StudyResult
from pytest_llem.gates.regression import compare
from pytest_llem.gates.verdict_text import verdict_line
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import GatesConfig
from tests.support.environments import EVERYTHING, Environment

FEWER, MORE = 20, 24
METRICS = ["seconds", "energy_j"]


def measure(folder: Path, options: argparse.Namespace, *more: str, **changes: Any) -> StudyResult:
    """Run a study in the new folder *folder* and return its result."""
    folder.mkdir()
    study = {
        "name": "gate",
        "model": options.model,
        "n": 4,
        "max_input_tokens": 32,
        "max_output_tokens": FEWER,
        "warmup": {"convergence_detection": False, "n_warmup": 2},
        "baseline": {"enabled": False},
        "energy": {"allow_estimated": True},
        "measurement": {"min_window_seconds": options.seconds},
        "execution": {"n_cycles": options.cycles, "cycle_order": "interleaved"},
        "gates": {"metrics": METRICS},
        **changes,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-q", f"--rootdir={folder}", *more]
    if options.model_path:
        command += ["-o", f"llem_model_path={options.model_path.resolve()}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = list((folder / "results").glob("*/study_result.json"))
    if not found:
        raise SystemExit(f"{done.stdout}{done.stderr}")
    return StudyResult.load(found[0])


def report(what: str, result: StudyResult, verdicts: Iterable[GateVerdict]) -> dict[str, str]:
    """Print the gates' verdicts and return their outcomes by metric."""
    print(f"{what}:")
    found: dict[str, str] = {}
    for verdict in verdicts:
        print(f"  {verdict_line(verdict)}; CV {result.points[-1].metrics[verdict.metric].cv or 0:.1%}")
        found[verdict.metric] = verdict.verdict
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each window")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        python = Environment(folder / "environment", *EVERYTHING).python
        same = measure(folder / "same", options, f"--llem-against={python}")
        same_outcomes = report("the same", same, same.points[0].verdicts)
        both = measure(folder / "more", options, sweep={"max_output_tokens": [FEWER, MORE]})
    fewer, more = (
        both.model_copy(update={"points": [point.model_copy(update={"axes": {}})]}) for point in both.points
    )
    verdicts = compare(more, fewer, GatesConfig(metrics=METRICS), name=f"{FEWER} tokens", paired=True).verdicts
    more_outcomes = report("20 % more tokens", both, verdicts)
    return int("REGRESSION" in same_outcomes.values() or {*more_outcomes.values()} != {"REGRESSION"})


if __name__ == "__main__":
    sys.exit(main())
