"""The gates on a real GPU: equal energies are the same, and 5 % more is a regression."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.gates.regression import compare
from pytest_llem.gates.verdict_text import verdict_line
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.gates import GatesConfig
from tests.support.environments import EVERYTHING, Environment

Found = Callable[[str, object], None]
Study = Callable[..., StudyResult]

METRICS = ["energy_j", "seconds"]

QUICK: dict[str, Any] = {
    "warmup": {"n_warmup": 3, "convergence_detection": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 5},
    "gates": {"metrics": METRICS},
}

#: The GPU is always busy: many input tokens, one output token.
PREFILL = {**QUICK, "n": 32, "max_output_tokens": 1, "pytorch": {"batch_size": 32}}

#: The GPU mostly waits for Python.
DECODE = {
    **QUICK,
    "n": 8,
    "max_input_tokens": 64,
    "max_output_tokens": 64,
    "pytorch": {"batch_size": 8},
    "warmup": {"n_warmup": 1, "convergence_detection": False},
}

UNTIL_DECIDED = {"n_cycles": "auto", "max_cycles": 10, "experiment_gap_seconds": 0}


@pytest.fixture
def same(tmp_path: Path) -> str:
    """Return the option that compares with an environment with the same packages as this one."""
    return f"--llem-against={Environment(tmp_path / 'environment', *EVERYTHING).python}"


def verdicts(result: StudyResult, found: Found) -> dict[str, GateVerdict]:
    for verdict in result.points[0].verdicts:
        found("gate", f"{verdict_line(verdict)}; CV {result.points[0].metrics[verdict.metric].cv or 0:.2%}")
    return {verdict.metric: verdict for verdict in result.points[0].verdicts}


def test_two_runs_of_one_configuration_are_judged_same(
    study: Study, llama_1b: Path, same: str, found: Found
) -> None:
    """The GPU is never idle."""
    result = study("prefill", same, **PREFILL, model=str(llama_1b), max_input_tokens=512, execution=UNTIL_DECIDED)
    assert {one.verdict for one in verdicts(result, found).values()} == {"SAME"}


def test_five_percent_more_energy_is_a_regression(study: Study, llama_1b: Path, found: Found) -> None:
    cycles = {"n_cycles": 5, "experiment_gap_seconds": 0}
    fewer, more = (
        study(f"tokens-{length}", **PREFILL, model=str(llama_1b), max_input_tokens=length, execution=cycles)
        for length in (512, 538)
    )
    judged = compare(more, fewer, GatesConfig(metrics=METRICS), name="5 % fewer tokens", allow_mismatch=True)
    more = more.model_copy(
        update={"points": [more.points[0].model_copy(update={"verdicts": list(judged.verdicts)})]}
    )
    assert {one.verdict for one in verdicts(more, found).values()} == {"REGRESSION"}


def test_eager_decode_against_itself_is_not_a_regression(
    study: Study, llama_1b: Path, same: str, found: Found
) -> None:
    result = study("eager", same, **DECODE, model=str(llama_1b), execution=UNTIL_DECIDED)
    assert "REGRESSION" not in {one.verdict for one in verdicts(result, found).values()}


def test_more_tokens_cost_more(study: Study, llama_1b: Path, found: Found) -> None:
    fields = {**DECODE, "model": str(llama_1b)}
    del fields["max_output_tokens"]
    result = study(
        "tokens",
        **fields,
        sweep={"max_output_tokens": [64, 128, 256, 512]},
        execution={"n_cycles": 1, "experiment_gap_seconds": 0, "cycle_order": "sequential"},
    )
    energies = [point.metrics["energy_j"].mean for point in result.points]
    found("J a pass of 8 prompts, 64, 128, 256, 512 tokens", ", ".join(f"{one:.1f}" for one in energies if one))
    assert all(one is not None and other is not None and one < other for one, other in pairwise(energies))
