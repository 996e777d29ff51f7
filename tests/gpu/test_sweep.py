"""A whole sweep on a GPU, as a user runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_llem import StudyResult


def test_batches_and_precisions(
    study: Callable[..., StudyResult], llama_1b: Path, found: Callable[[str, object], None]
) -> None:
    result = study(
        "sweep",
        model=str(llama_1b),
        n=32,
        max_input_tokens=128,
        max_output_tokens=16,
        warmup={"n_warmup": 1, "convergence_detection": False},
        baseline={"enabled": False},
        measurement={"min_window_seconds": 5},
        sweep={"precision": ["bf16", "fp32"], "pytorch.batch_size": [1, 8, 32]},
        execution={"n_cycles": 3, "experiment_gap_seconds": 0},
    )
    assert (result.summary.completed, result.summary.failed) == (18, 0)
    for point in result.points:
        cost = point.metrics["energy_per_output_token_j"]
        assert (cost.method, cost.n) == ("measured", 3)
        speed, floor = (point.metrics[name].mean for name in ("output_tokens_per_second", "roofline_slowdown"))
        assert floor is None or floor >= 1
        found(point.id, f"{cost.mean:.4g} J, CV {cost.cv or 0:.1%}; {speed:.4g} tokens/s; {floor} × the floor")
