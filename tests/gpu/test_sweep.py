"""A study of many points, as a user runs it: its figures, and where its time and energy go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pytest_llem import ExperimentResult, StudyResult
from tests.gpu.counters import Log, logging, note_parts


@pytest.mark.parametrize(("start_method", "lengths"), [("forkserver", (4, 8, 16, 24, 32)), ("spawn", (4, 32))])
def test_where_time_and_energy_of_a_sweep_go(
    study: Callable[..., StudyResult],
    llama_1b: Path,
    tmp_path: Path,
    found: Callable[[str, object], None],
    start_method: str,
    lengths: Sequence[int],
) -> None:
    count = 6 * len(lengths)
    file = tmp_path / "counters"
    with logging(file):
        result = study(
            "sweep",
            f"--llem-start-method={start_method}",
            model=str(llama_1b),
            n=32,
            max_input_tokens=128,
            warmup={"n_warmup": 1, "convergence_detection": False},
            baseline={"enabled": False},
            measurement={"min_window_seconds": 3},
            sweep={
                "precision": ["bf16", "fp32"],
                "pytorch.batch_size": [1, 8, 32],
                "max_output_tokens": [*lengths],
            },
            execution={"n_cycles": 1, "experiment_gap_seconds": 0},
        )
    assert (result.summary.completed, result.summary.failed) == (count, 0)
    for point in result.points:
        cost = point.metrics["energy_per_output_token_j"]
        assert cost.method == "measured"
        speed, slowdown = (point.metrics[name].mean for name in ("output_tokens_per_second", "roofline_slowdown"))
        assert slowdown is None or slowdown >= 1
        found(point.id, f"{cost.mean:.4g} J, {speed:.4g} tokens/s, {slowdown} × the roofline")
    results = [ExperimentResult.read(one) for one in (tmp_path / "results").glob("*/experiments/*.json")]
    note_parts(found, results, Log(file))
