"""vLLM's server under load: its energy against an independent logger, and what is left when it or pytest ends."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.hardware.gpus import Gpu
from pytest_llem.results.points import PointResult
from tests.gpu.counters import Log, logging
from tests.gpu.kills import FREE_BYTES, kill_in_window, used_bytes

Found = Callable[[str, object], None]
Study = Callable[..., StudyResult]

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

#: Options of the server. Weights are random, and no prompt is in the cache of an earlier one.
ARGS = {
    "load_format": "dummy",
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.8,
}

SERVED: dict[str, Any] = {
    "backend": "server",
    "server": {"preset": "vllm", "args": ARGS},
    "max_input_tokens": 128,
    "max_output_tokens": 128,
    "decoder": {"do_sample": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 12},
    "execution": {"n_cycles": 1, "cycle_order": "sequential", "experiment_gap_seconds": 0, "contended_retries": 0},
}

#: Requests per second of each shape's open loops, which it serves.
RATES = {"1b": (20, 80), "8b": (10, 40)}

METRICS = (
    "energy_per_output_token_j",
    "output_tokens_per_second",
    "mean_power_w",
    "ttft_p50_ms",
    "tpot_p50_ms",
    "batch_mean",
)

#: ML.ENERGY benchmark 3.0, lm-arena-chat, on an H100 with vLLM 0.11.1 in its steady state, with answers of 390 to
#: 405 tokens on average of Llama 3.1 8B, and 611 to 625 of Qwen3 14B: J per output token by requests at a time.
PUBLISHED = {
    "llama_8b": {8: 0.455, 16: 0.263, 32: 0.165, 64: 0.119, 128: 0.0951, 256: 0.0766},
    "qwen_14b": {8: 0.706, 32: 0.244, 128: 0.128, 256: 0.112},
}


def _name(point: PointResult) -> str:
    load = point.config["load"]
    return ", ".join(f"{kind} {load[kind]}" for kind in ("concurrency", "rate") if load.get(kind))


def _results(folder: Path) -> list[ExperimentResult]:
    files = (folder / "results").glob("*/experiments/*.json")
    return sorted(map(ExperimentResult.read, files), key=lambda one: one.started_at)


def _serve(study: Study, folder: Path, gpu: Gpu, found: Found, name: str, **fields: Any) -> StudyResult:
    """Measure loads, and check that each window's energy is what the logger saw, and that nothing is left."""
    before, file = used_bytes(gpu), folder / "counters"
    with logging(file):
        result = study(name, **{**SERVED, **fields})
    log, results = Log(file), _results(folder)
    for point in result.points:
        for metric in METRICS:
            found(f"{_name(point)}: {metric}", point.metrics[metric].mean)
    server = results[-1].server
    assert server is not None
    found("s until the server was ready", server.ready_seconds)
    if server.drift:
        found("first load, at first", server.drift.before)
        found("first load, at last", server.drift.after)
    found("memory left, bytes", left := used_bytes(gpu) - before)
    assert left <= FREE_BYTES
    assert result.summary.failed == 0
    for one in results:
        [device] = one.devices
        assert device.device == gpu.uuid
        assert device.energy_j is not None, device.reason
        assert one.window.began_at is not None
        assert one.window.ended_at is not None
        assert log.has(gpu.uuid, device.energy_j, one.window.began_at, one.window.ended_at)
        assert one.load is not None
        assert one.load.client_output_tokens == one.load.server_output_tokens
        assert one.load.failed == 0
        assert one.server is not None
        assert one.server.id == server.id
    found("windows whose energy the logger saw exactly", len(results))
    return result


@pytest.mark.parametrize("shape", ["8b", "1b"])
def test_a_servers_energy_is_that_of_its_window(
    study: Study, request: pytest.FixtureRequest, tmp_path: Path, gpu: Gpu, found: Found, shape: str
) -> None:
    loads = [{"concurrency": number} for number in (1, 8, 32, 64, 128)] + [{"rate": rate} for rate in RATES[shape]]
    result = _serve(
        study,
        tmp_path,
        gpu,
        found,
        f"serving-{shape}",
        model=str(request.getfixturevalue(f"llama_{shape}_shape")),
        experiments=[{"load": load} for load in loads],
    )
    costs = [point.metrics["energy_per_output_token_j"].mean or 0 for point in result.points]
    assert sorted(costs[:5], reverse=True) == costs[:5], "a token costs less in a larger batch"


@pytest.mark.parametrize(("model", "tokens"), [("llama_8b", 400), ("qwen_14b", 620)])
def test_published_energy_per_token(
    study: Study,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    gpu: Gpu,
    found: Found,
    model: str,
    tokens: int,
) -> None:
    """Published figures are of another board, other prompts and another version: the ratio is what is found."""
    result = _serve(
        study,
        tmp_path,
        gpu,
        found,
        "published",
        model=str(request.getfixturevalue(f"{model}_shape")),
        max_output_tokens=tokens,
        sweep={"load.concurrency": [*PUBLISHED[model]]},
    )
    for point in result.points:
        cost, published = (
            point.metrics["energy_per_output_token_j"].mean,
            PUBLISHED[model][point.axes["load.concurrency"]],
        )
        found(f"{_name(point)}: J per output token / published", cost and cost / published)


def test_sigkill_of_pytest_under_load_ends_the_server(
    tmp_path: Path, llama_1b_shape: Path, gpu: Gpu, found: Found
) -> None:
    study = {
        "name": "killed",
        **SERVED,
        "model": str(llama_1b_shape),
        "load": {"concurrency": 32},
        "measurement": {"min_window_seconds": 600},
    }
    assert kill_in_window(study, tmp_path, gpu, found) > 2**32, "the server has its cache"
