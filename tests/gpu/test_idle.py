"""Idle power without a context, with a context, and with allocated memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llem import IsolatedExperiment
from pytest_llem.hardware.gpus import Gpu

Found = Callable[[str, object], None]


def test_engine_without_work_has_no_active_energy(
    isolated_experiment: IsolatedExperiment, llama_1b: Path, gpu: Gpu, found: Found
) -> None:
    """Runs first: idle power without a context is measured before anything has used the GPU."""
    result = isolated_experiment(
        {
            "model": str(llama_1b),
            "backend": "tests.gpu.engines:Idle",
            "n": 1,
            "max_output_tokens": 1,
            "warmup": {"enabled": False},
            "measurement": {"min_window_seconds": 30},
        },
    )
    assert result.idle_power is not None
    assert result.idle_power.idle_power_w is not None
    assert result.idle_power.idle_power_no_context_w is not None
    no_context, context = result.idle_power.idle_power_no_context_w[gpu.uuid], result.idle_power.idle_power_w
    active = result.metrics["active_energy_j"]
    passes, seconds = result.window.passes or 0, result.window.window_seconds
    assert active.value is not None
    assert active.uncertainty is not None
    assert result.idle_power.after_w is not None
    assert result.idle_power.drift_w is not None
    found("no context, W", no_context)
    found("context - no context, W", context - no_context)
    found("active energy of 30 s without work, J", passes * active.value)
    found("its standard uncertainty, J", passes * active.uncertainty)
    found("idle power after the window - before it, W", result.idle_power.after_w - context)
    found("standard uncertainty of its drift, W", result.idle_power.drift_w)
    assert 15 <= context - no_context <= 70
    assert abs(active.value) <= 4 * active.uncertainty, "a 95 % interval would fail once in twenty runs"
    assert passes * active.uncertainty <= 2 * seconds, "the interval is narrow enough to mean something"


def test_allocated_memory_draws_little_power(on_gpu: Callable[..., Any], found: Found) -> None:
    little, much = on_gpu("held", (1, 40), 8.0)
    found("1 GB, W", little)
    found("40 GB, W", much)
    assert abs(much - little) <= 3
