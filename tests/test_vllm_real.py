"""The engine vllm with the real vLLM, in the environment of the interpreter LLEM_VLLM_PYTHON: ``nox -s vllm``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pytest_llem import StudyResult
from tests.support.processes import gone, wait_until
from tests.support.weights import MODEL

PYTHON = os.environ.get("LLEM_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LLEM_VLLM_PYTHON names no interpreter that has vLLM"),
]

#: A short start: nothing is compiled.
ENGINE = {"enforce_eager": True, "max_model_len": 256}

#: Number of prompts and of new tokens of the comparison.
PROMPTS, TOKENS = 10, 16

STUDY: dict[str, Any] = {
    "name": "engines",
    "model": MODEL,
    "n": PROMPTS,
    "max_input_tokens": 32,
    "max_output_tokens": TOKENS,
    "decoder": {"do_sample": False},
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "energy": {"backend": "estimate"},
    "measurement": {"min_window_seconds": 0},
    "execution": {"n_cycles": 1, "cycle_order": "sequential", "contended_retries": 0},
    "runners": {"vllm": PYTHON},
    "vllm": {"engine": ENGINE},
}

#: Prints the tokens of an engine's answers to prompts, in the engine's environment.
GENERATE = """
import json, sys
from pathlib import Path
from pytest_llem import registry
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.study.config import ExperimentConfig

if __name__ == "__main__":  # vLLM starts processes that import this file
    fields, texts, model_path, output = json.loads(sys.argv[1])
    config = ExperimentConfig.model_validate(fields)
    engine = registry.load(registry.ENGINE_GROUP, config.backend)(config, EngineContext((Path(model_path),)))
    engine.fetch()
    engine.load()
    batches = engine.prepare([engine.encode(text) for text in texts])
    records = [one for batch in batches for one in engine.requests(batch, engine.generate(batch))]
    Path(output).write_text(json.dumps([[int(token) for token in one.output_ids] for one in records]))
    engine.close()
"""

SUBJECTS = ("the sea", "bread", "a fox", "the Moon", "trains", "rain", "Rome", "a violin", "chess", "winter")


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def _generated(folder: Path, backend: str, precision: str, model_path: Path) -> list[list[int]]:
    of_others = {"name", "execution", "runners", "vllm"} - {backend}
    fields = {key: value for key, value in STUDY.items() if key not in of_others}
    fields |= {"backend": backend, "precision": precision}
    (folder / "generate.py").write_text(GENERATE)
    output = folder / f"{backend}-{precision}.json"
    texts = [f"Write one sentence about {subject}." for subject in SUBJECTS]
    question = json.dumps([fields, texts, str(model_path), str(output)])
    python = PYTHON if backend == "vllm" else sys.executable
    subprocess.run([python, "generate.py", question], cwd=folder, check=True)
    found: list[list[int]] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9), ("bf16", 0.3)])
def test_greedy_tokens_are_those_of_pytorch(
    tmp_path: Path, smollm2: Path, precision: str, share: float, record_property: Any
) -> None:
    """In bf16 on a CPU, answers differ sooner or later: 69 % of 16 were the same when this was written."""
    ours, theirs = (_generated(tmp_path, backend, precision, smollm2) for backend in ("pytorch", "vllm"))
    assert {len(one) for one in (*ours, *theirs)} == {TOKENS}
    same = sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(SUBJECTS)
    record_property("share_of_equal_answers", same)
    print(f"{precision}: {same:.0%} of answers are the same")
    assert same >= share


def _start(folder: Path, model_path: Path, **changes: Any) -> subprocess.Popen[str]:
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    options = [f"--rootdir={folder}", "-o", f"llem_model_path={model_path}"]
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_study_measures_both_engines(tmp_path: Path, smollm2: Path) -> None:
    sweep = {"backend": ["pytorch", "vllm"], "precision": ["fp32", "bf16"]}
    with _start(tmp_path, smollm2, sweep=sweep) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    [directory] = (one for one in (tmp_path / "results").iterdir() if one.is_dir())
    study = StudyResult.load(directory)
    assert study.summary.completed == 4
    points = [(point.axes["backend"], point.axes["precision"]) for point in study.points]
    assert points == [*product(*sweep.values())]
    for point in study.points:
        assert point.metrics["output_tokens_per_second"].mean
        assert point.metrics["output_tokens"].mean == PROMPTS * TOKENS
        for name in ("ttft_p50_ms", "itl_p50_ms", "tpot_p50_ms"):
            assert point.metrics[name].mean, name
        if point.axes["backend"] == "vllm":
            assert point.metrics["queue_p50_ms"].mean is not None
            assert point.metrics["cache_memory_mb"].mean == pytest.approx(2**30 / 1e6, rel=0.02)
    lines = [line for line in output.splitlines() if line.startswith(("pytorch ", "vllm "))]
    assert len(lines) == 4, "one table"


@pytest.mark.parametrize("victim", ["worker", "pytest"])
def test_killed_process_leaves_no_process_of_vllm(tmp_path: Path, smollm2: Path, victim: str) -> None:
    changes = {"backend": "vllm", "precision": "fp32", "measurement": {"min_window_seconds": 600}}
    with _start(tmp_path, smollm2, **changes) as process:
        family: list[psutil.Process] = []

        def names() -> str:
            family[:] = psutil.Process(process.pid).children(recursive=True)
            return " ".join(one.name() for one in family if one.is_running())

        wait_until(lambda: "VLLM::EngineCor" in names() and "VLLM::Worker" in names(), 300)
        killed = process.pid
        if victim == "worker":
            [core] = (one for one in family if one.name().startswith("VLLM::EngineCor"))
            killed = core.ppid()
        os.kill(killed, signal.SIGKILL)
        process.communicate()
    wait_until(lambda: all(gone(one.pid) for one in family), 30)
