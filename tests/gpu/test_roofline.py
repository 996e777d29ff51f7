"""MFU, MBU and roofline slowdown of the 8B shape, and the energy of a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import IsolatedExperiment

Found = Callable[[str, object], None]
OnGpu = Callable[..., Any]

STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(1, {}), (1, STATIC), (8, STATIC), (64, STATIC)],
    ids=["1-eager", "1-static", "8-static", "64-static"],
)
def test_no_pass_is_faster_than_the_roofline(
    isolated_experiment: IsolatedExperiment,
    llama_8b: Path,
    found: Found,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    result = isolated_experiment(
        {
            "model": str(llama_8b),
            "n": batch_size,
            "max_input_tokens": 128,
            "max_output_tokens": 128,
            "pytorch": {"batch_size": batch_size, **options},
            "warmup": {"n_warmup": 2, "convergence_detection": False},
            "baseline": {"enabled": False},
        }
    )
    metrics = result.metrics
    for name in (
        "roofline_slowdown",
        "mbu",
        "mfu",
        "output_tokens_per_second",
        "energy_per_output_token_j",
        "itl_p50_ms",
        "mean_power_w",
        "peak_temperature_c",
        "throttled_seconds",
    ):
        found(name, metrics[name].value)
    found(
        "throttled by reason, s", result.devices[0].conditions and result.devices[0].conditions.throttled_seconds
    )
    slowdown = metrics["roofline_slowdown"].value
    assert slowdown is not None
    assert slowdown >= 1
    assert metrics["throttled_seconds"].value is not None


def test_kernel_time_is_part_of_token_time(on_gpu: OnGpu, llama_8b: Path, found: Found) -> None:
    """The time of a token beyond that of its kernels is spent in Python."""
    took, busy = on_gpu("decoding", str(llama_8b), 128)
    found("ms a token", took)
    found("of which kernels run, ms", busy)
    assert 0 < busy <= took


def test_gpu_at_its_power_limit_reports_throttling(
    isolated_experiment: IsolatedExperiment, llama_8b: Path, found: Found
) -> None:
    """Prefill keeps the GPU busy: it reaches its power limit and lowers its clocks."""
    result = isolated_experiment(
        {
            "model": str(llama_8b),
            "n": 16,
            "max_input_tokens": 512,
            "max_output_tokens": 1,
            "pytorch": {"batch_size": 16},
            "warmup": {"n_warmup": 5, "convergence_detection": False},
            "baseline": {"enabled": False},
        }
    )
    [device] = result.devices
    assert device.conditions is not None
    assert device.conditions.throttled_seconds is not None
    for name in ("mean_power_w", "peak_temperature_c", "throttled_seconds", "roofline_slowdown", "mfu"):
        found(name, result.metrics[name].value)
    found("throttled by reason, s", device.conditions.throttled_seconds)
    assert device.conditions.throttled_seconds["power"] > 0
    assert any(warning.code == "throttled" for warning in result.warnings)
