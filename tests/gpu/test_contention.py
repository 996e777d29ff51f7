"""Other programs on the GPU or on the host's CPUs are seen, or said to be unknown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.gates.verdict_text import verdict_line

Found = Callable[[str, object], None]

#: Eager decoding waits for the host: it is sensitive to both.
FIELDS: dict[str, Any] = {
    "n": 8,
    "max_input_tokens": 64,
    "max_output_tokens": 64,
    "pytorch": {"batch_size": 8},
    "warmup": {"n_warmup": 1, "convergence_detection": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 4},
    "execution": {"n_cycles": 2, "experiment_gap_seconds": 0, "contended_retries": 0},
    "gates": {"metrics": ["seconds", "energy_j"]},
}

#: Codes of other processes, which print a line when they are busy.
SPIN = "print('busy', flush=True)\nwhile True: pass"

GPU_SHARE = "from tests.gpu.loads import disturb; disturb({})"


@contextmanager
def _beside(code: str, count: int) -> Iterator[None]:
    """Run *count* processes of *code* within the context."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"busy\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture
def run(
    study: Callable[..., StudyResult], llama_1b: Path, tmp_path: Path
) -> Callable[..., tuple[StudyResult, list[ExperimentResult]]]:
    def run(*options: str) -> tuple[StudyResult, list[ExperimentResult]]:
        known = set((tmp_path / "results").glob("*/experiments/*.json"))
        result = study("shared", "--llem-start-method=forkserver", *options, **FIELDS, model=str(llama_1b))
        files = set((tmp_path / "results").glob("*/experiments/*.json")) - known
        return result, [ExperimentResult.read(file) for file in files]

    return run


def _note(found: Found, name: str, results: Sequence[ExperimentResult]) -> list[str]:
    states: list[str] = []
    for one in results:
        assert one.contention is not None
        states.append(one.contention.state)
        [gpu] = one.contention.gpus
        found(f"{name}: state", f"{one.contention.state}: {'; '.join(one.contention.reasons)}")
        found(f"{name}: GPU", gpu.model_dump(exclude_none=True))
        found(f"{name}: CPU time received / wanted", one.contention.cpu_received_share)
        found(f"{name}: s of a pass", one.metrics["seconds"].value)
        found(f"{name}: J of a pass", one.metrics["energy_j"].value)
    return states


#: What runs beside the experiment: its code, and in how many processes.
BESIDE = {
    "5 % of the GPU": (GPU_SHARE.format(0.05), 1),
    "50 % of the GPU": (GPU_SHARE.format(0.5), 1),
    "all CPUs": (SPIN, len(os.sched_getaffinity(0))),
}


def test_other_programs_are_seen_or_unknown(
    run: Callable[..., tuple[StudyResult, list[ExperimentResult]]], found: Found
) -> None:
    _, results = run("--llem-save=alone")
    assert "contended" not in _note(found, "alone", results)
    seen = {}
    for name, (code, count) in BESIDE.items():
        with _beside(code, count):
            result, results = run("--llem-baseline=alone")
        seen[name] = set(_note(found, name, results))
        for verdict in result.points[0].verdicts:
            found(f"{name}: {verdict.metric}", verdict_line(verdict))
            assert "contended" not in seen[name] or verdict.verdict == "INCONCLUSIVE"
    assert not [name for name, states in seen.items() if "uncontended" in states]
