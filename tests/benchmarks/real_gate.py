"""The gate on a real model: ten cycles against ten of the same, in turns, and against ten of 20 % fewer tokens.

    python tests/benchmarks/real_gate.py [--model NAME] [--model-path DIR] [--cycles N] [--seconds S]

Both sides are run by pytest as a user would, with ``--llem-against``: an environment whose engine generates as
many tokens, or fewer. Printed is what the gates on ``seconds`` and ``output_tokens_per_second`` say. Exits with 1
where the same is called a REGRESSION, or 20 % more tokens are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from pytest_llem import StudyResult
from pytest_llem.gates.text import verdict_line
from tests.support.environments import EVERYTHING, Environment

#: Of the reference; the candidate's are as many, or 20 % more.
TOKENS = 20

ENGINE = """
    from pytest_llem.backends.pytorch import PyTorchEngine

    class Engine(PyTorchEngine):
        def __init__(self, config, context):
            super().__init__(config.model_copy(update={{"max_output_tokens": {tokens}}}), context)
"""


def measure(folder: Path, reference: Path, tokens: int, options: argparse.Namespace) -> StudyResult:
    """Run the study with as many tokens here, against the environment of *reference*, and return its result."""
    here = folder / f"tokens-{tokens}"
    here.mkdir()
    (here / "gated_engine.py").write_text(ENGINE.format(tokens=tokens).replace("\n    ", "\n"))
    study = {
        "name": "gate",
        "model": options.model,
        "backend": "gated_engine:Engine",
        "n": 4,
        "max_input_tokens": 32,
        "max_output_tokens": tokens,
        "warmup": {"convergence_detection": False, "n_warmup": 2},
        "baseline": {"enabled": False},
        "measurement": {"min_window_seconds": options.seconds},
        "execution": {"n_cycles": options.cycles},
        "gates": {"metrics": ["seconds", "output_tokens_per_second"]},
    }
    (here / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "-q", "--rootdir", str(here)]
    command += [f"--llem-against={reference}"]
    if options.model_path:
        command += ["-o", f"llem_model_path={options.model_path.resolve()}"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    found = list((here / "results").glob("*/study_result.json"))
    if not found:
        raise SystemExit(f"{done.stdout}{done.stderr}")
    return StudyResult.load(found[0])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each window")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    verdicts = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        environment = Environment(folder / "reference", *EVERYTHING)
        engine = ENGINE.format(tokens=TOKENS)
        environment.add("gated-engine", "1.0", gated_engine=engine)
        for what, tokens in (("the same", TOKENS), ("20 % more tokens", TOKENS * 6 // 5)):
            result = measure(folder, environment.python, tokens, options)
            print(f"{what}:")
            for verdict in (one for point in result.points for one in point.verdicts):
                spread = next(point.metrics[verdict.metric].cv for point in result.points)
                print(
                    f"  {verdict_line(verdict)}; CV here {spread:.1%}" if spread else f"  {verdict_line(verdict)}"
                )
                verdicts[what, verdict.metric] = verdict.verdict
    print(json.dumps({f"{what}: {metric}": said for (what, metric), said in verdicts.items()}))
    false_alarm = "REGRESSION" in (verdicts["the same", name] for name in ("seconds", "output_tokens_per_second"))
    return int(false_alarm or verdicts["20 % more tokens", "seconds"] != "REGRESSION")


if __name__ == "__main__":
    sys.exit(main())
