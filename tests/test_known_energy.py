"""Experiments of known energy and tokens, on a GPU with scripted power to which the engine adds."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.energy.account import Meters
from tests.conftest import NOOP_STUDY
from tests.support import nvml
from tests.support.marks import slow
from tests.support.narrow import not_none
from tests.support.warned import texts

GPU = "GPU-known"
IDLE_W, BUSY_W = 100.0, 300.0

#: Four prompts in batches of two, with three output tokens each.
TOKENS = 12


def measure(changes: Any) -> Any:
    """Return the result of an experiment as plain data. Runs in a process with the scripted GPU; ``tail`` is added
    to its script as the window has begun.
    """
    tail, gpus = changes.pop("tail", ""), changes.pop("gpus", GPU)
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    given = {**fields, "n": 4, "energy": {"backend": "nvml"}, **changes}
    given["noop"] = {"gpu": gpus, "watts": [IDLE_W, BUSY_W], "size": 2, "seconds": 0.25, "first_seconds": 0.1}
    begin = Meters.begin
    opened: list[Meters] = []

    def begin_and_change(meters: Meters) -> None:
        begin(meters)
        opened.append(meters)
        if len(opened) == 2 and tail:  # the first window is that of the load
            _change(tail)

    pytest.MonkeyPatch().setattr(Meters, "begin", begin_and_change)  # the process ends after this call
    return ExperimentOrchestrator(ExperimentConfig.model_validate(given)).run().result.model_dump(mode="json")


def _change(tail: Any) -> None:
    """Add lines to the GPU's script, in which NOW is the current time, and NOW+1.5 is 1.5 s later."""
    path = Path(os.environ["LLEM_SCRIPTED_NVML"])
    text = path.read_text()
    start = float(not_none(re.search(r"^start (.*)$", text, re.MULTILINE))[1])
    changed = path.with_suffix(".changed")
    now = time.monotonic() - start
    changed.write_text(text + re.sub(r"NOW([+][\d.]+)?", lambda found: f"{now + float(found[1] or 0):.9f}", tail))
    changed.replace(path)


@pytest.fixture
def gpu(tmp_path: Path, nvml_library: Path, noop_engine: None) -> Callable[..., Any]:
    """Return a function that measures on a scripted GPU, and returns the result and the GPU's power over time."""

    def run(more: Any = None, rules: Any = (), call_ms: float = 0.0, others: Any = (), **changes: Any) -> Any:
        gpu = nvml.ScriptedGpu(GPU, [(0, IDLE_W)], dict(more or {}), rules=list(rules))
        script = nvml.Script(tmp_path / "nvml.script", [*others, gpu], call_ms)
        script.write()
        env = nvml.environment(nvml_library, script) | {"LLEM_POWERCAP_ROOT": str(tmp_path / "powercap")}
        result = nvml.run(env, measure, changes)
        its_own = Path(script.path).read_text().rpartition("device ")[2]
        lines = re.findall(r"^power (\S+) (\S+)$", its_own, re.MULTILINE)
        return result, nvml.ScriptedGpu(GPU, [(float(at), float(watts)) for at, watts in lines])

    return run


def known_energy_j(gpu: Any, passes: Any) -> Any:
    """Return the energy of a pass, from the start of work in the window's first pass to its end in the last."""
    edges = [at for at, _ in gpu.power]
    return gpu.energy_j(edges[-4 * passes], edges[-1]) / passes


@pytest.mark.parametrize(("seconds", "tick_ms", "call_ms"), [slow(1.0, 20, 0), (2.0, 100, 4)])
def test_energy_per_token_is_right_for_any_window_length(
    gpu: Callable[..., Any], seconds: float, tick_ms: int, call_ms: int
) -> None:
    result, drawn = gpu(
        {"tick_ms": tick_ms, "counter_mj": 5_000_000_000},
        call_ms=call_ms,
        measurement={"min_window_seconds": seconds},
        baseline={"enabled": False},
    )
    window, metrics = result["window"], result["metrics"]
    passes = window["passes"]
    assert 1 <= passes <= seconds / 0.5 + 1
    assert window["window_seconds"] >= seconds
    known = known_energy_j(drawn, passes)
    # The GPU is idle around the passes; the end of the window waits for a tick.
    span = drawn.power[-1][0] - drawn.power[-4 * passes][0]
    around = window["energy_seconds"] - span
    assert -2.5 * result["devices"][0]["uncertainty_j"] / IDLE_W <= around
    exact = (known * passes + around * IDLE_W) / passes
    assert metrics["energy_j"]["value"] == pytest.approx(exact, rel=0.005)
    assert metrics["energy_per_output_token_j"]["value"] == pytest.approx(exact / TOKENS, rel=0.005)
    # Beyond the passes the window contains at most a tick, which the result records.
    assert around == pytest.approx(window["tail_seconds"], abs=0.02)
    assert metrics["energy_j"]["value"] - known <= (tick_ms / 1000 + 0.02) * IDLE_W / passes + 0.005 * known
    assert metrics["energy_per_output_token_j"]["value"] == pytest.approx(metrics["energy_j"]["value"] / TOKENS)
    assert metrics["energy_per_request_j"]["value"] == pytest.approx(metrics["energy_j"]["value"] / 4)
    for name in ("energy_j", "energy_per_output_token_j", "gpu_energy_j"):
        assert (metrics[name]["method"], metrics[name]["source"]) == ("measured", "nvml_total_energy")
    assert metrics["energy_j"]["boundary"] == "gpu_board"
    assert metrics["cpu_energy_j"]["value"] is None
    # A pass has half a second of work for any window; on a busy machine it has pauses.
    assert metrics["seconds"]["value"] >= 0.5
    assert metrics["energy_j"]["value"] >= 0.5 * BUSY_W * 0.995


@pytest.mark.slow
def test_two_gpus_have_their_own_energy_and_a_token_the_sum(gpu: Callable[..., Any]) -> None:
    """The GPUs tick at different times and rates."""
    other = nvml.ScriptedGpu("GPU-other", [(0, 50.0)], {"tick_ms": 100, "phase_ms": 30})
    result, drawn = gpu(
        others=[other],
        gpus=["GPU-other", GPU],
        measurement={"min_window_seconds": 1.5},
        baseline={"enabled": False},
    )
    passes, metrics = result["window"]["passes"], result["metrics"]
    idle, busy = result["devices"]
    assert [one["device"] for one in (idle, busy)] == ["GPU-other", GPU]
    blur_j = 2.5 * math.hypot(idle["uncertainty_j"], busy["uncertainty_j"])
    assert idle["energy_j"] == pytest.approx(50.0 * idle["seconds"], rel=0.005, abs=blur_j)
    # The window waits for the first tick of both GPUs, and for the second tick only of this one.
    around = busy["seconds"] - (drawn.power[-1][0] - drawn.power[-4 * passes][0])
    exact_j = known_energy_j(drawn, passes) * passes + around * IDLE_W
    assert busy["energy_j"] == pytest.approx(exact_j, rel=0.005, abs=blur_j)
    total_j = idle["energy_j"] + busy["energy_j"]
    assert metrics["gpu_energy_j"] == metrics["energy_j"]
    assert metrics["energy_j"]["value"] == pytest.approx(total_j / passes)
    assert metrics["energy_per_output_token_j"]["value"] == pytest.approx(total_j / passes / TOKENS)
    assert 0 < result["window"]["read_skew_seconds"] < 0.2


@pytest.mark.slow
def test_active_energy_is_the_energy_of_the_work(gpu: Callable[..., Any]) -> None:
    result, drawn = gpu(measurement={"min_window_seconds": 1.0}, baseline={"duration_seconds": 5})
    assert result["idle_power"]["idle_power_w"] == pytest.approx(IDLE_W, rel=0.01)
    passes, metrics = result["window"]["passes"], result["metrics"]
    edges = [at for at, _ in drawn.power]
    idle_j = IDLE_W * (edges[-1] - edges[-4 * passes]) / passes
    active = metrics["active_energy_j"]
    assert active["value"] == pytest.approx(known_energy_j(drawn, passes) - idle_j, rel=0.02)
    assert active["method"] == "measured"


@pytest.mark.slow
def test_prefill_and_decode_have_their_scripted_energies(gpu: Callable[..., Any]) -> None:
    measurement = {"min_window_seconds": 1.0, "prefill_split": True}
    result, drawn = gpu(measurement=measurement, baseline={"enabled": False})
    window, prefill, metrics = result["window"], result["prefill_window"], result["metrics"]
    edges = [at for at, _ in drawn.power]
    first = len(edges) - 4 * prefill["passes"]
    both = first - 2  # one more batch runs between the windows
    first_j = drawn.energy_j(edges[first], edges[-1]) / prefill["passes"]
    whole_j = drawn.energy_j(edges[both - 4 * window["passes"]], edges[both - 1]) / window["passes"]
    # Both windows end by waiting for a tick.
    tail_j = 0.021 * IDLE_W * (1 / prefill["passes"] + 1 / window["passes"])
    found = {name: metrics[name]["value"] for name in ("prefill_energy_j", "decode_energy_j")}
    assert found["prefill_energy_j"] == pytest.approx(first_j, abs=tail_j + 0.01 * first_j)
    assert found["decode_energy_j"] == pytest.approx(whole_j - first_j, abs=tail_j + 0.01 * whole_j)
    assert {metrics[name]["method"] for name in found} == {"attributed"}
    assert metrics["energy_per_input_token_j"]["value"] == pytest.approx(
        found["prefill_energy_j"] / result["tokens"]["input_tokens"]
    )


# ---- failures ----


def test_gpu_lost_in_the_window_has_no_energy_and_warns_first(
    gpu: Callable[..., Any],
) -> None:
    """RAPL cannot be read either, as on most machines with GPUs: the GPU's reason is reported all the same."""
    quick = {"measurement": {"min_window_seconds": 1.0}, "baseline": {"enabled": False}}
    result, _ = gpu(energy={"backend": "auto"}, tail="lost_at NOW\n", **quick)
    metrics = result["metrics"]
    for name in ("energy_j", "energy_per_output_token_j", "gpu_energy_j", "tokens_per_joule", "edp_js"):
        assert (metrics[name]["value"], metrics[name]["method"]) == (None, "unavailable"), name
        assert "GPU is lost" in metrics[name]["reason"], name
    assert metrics["output_tokens_per_second"]["value"] > 0
    assert metrics["load_energy_j"]["value"] > 0, "it was not lost by then"
    no_energy, *_, rapl = texts(result["warnings"])
    assert no_energy.startswith(f"no energy: {GPU}: NVML: nvmlDeviceGetTotalEnergyConsumption: GPU is lost")
    assert rapl.startswith("meter rapl: no package counter")


def test_gpu_with_mig_has_no_energy_and_warns_first(gpu: Callable[..., Any]) -> None:
    quick = {"measurement": {"min_window_seconds": 0.5}, "baseline": {"enabled": False}}
    result, _ = gpu({"mig": 1}, energy={"backend": "auto"}, **quick)
    assert result["metrics"]["energy_j"]["value"] is None
    assert result["devices"] == []
    assert texts(result["warnings"])[0].startswith(f"no energy: nvml: {GPU}: MIG is on")


@pytest.mark.slow
def test_counter_throttling_and_temperature_warnings_worst_first(
    gpu: Callable[..., Any],
) -> None:
    """The counter is twice too high, and the GPU is throttled by power for half of the time.

    Power changes every quarter of a second: a smaller error could be one of sampling.
    """
    result, drawn = gpu(
        {"counter_gain": 2},
        rules=["throttle power 0 0.5", "temperature 0 40"],
        tail="temperature NOW 40\ntemperature NOW+1.5 70 ramp\n",
        measurement={"min_window_seconds": 2.0},
        baseline={"enabled": False},
    )
    # On a busy machine there may be warnings of drift and contention, too.
    of_the_machine = ("drift", "contended", "host-bound")
    off, throttled, warmer, *_ = [one for one in texts(result["warnings"]) if not one.startswith(of_the_machine)]
    assert off.startswith(f"energy counter and sampled power disagree on {GPU}: ")
    assert throttled.startswith(f"throttled: {GPU} for ")
    assert warmer.startswith(f"temperature of {GPU} went from 40 to 70 °C")
    [device] = result["devices"]
    # On a busy machine the sampler samples less often, and has a larger uncertainty.
    blur = 3 * device["integral_uncertainty_j"] / device["energy_j"]
    assert device["integral_j"] / device["energy_j"] == pytest.approx(1 / 2, abs=max(0.03, blur))
    known = known_energy_j(drawn, result["window"]["passes"])
    assert result["metrics"]["energy_j"]["value"] == pytest.approx(2 * known, rel=0.02), "it is the counter's"
    seconds = result["window"]["window_seconds"]
    assert result["metrics"]["throttled_seconds"]["value"] == pytest.approx(seconds / 2, abs=0.1)
    conditions = device["conditions"]
    assert conditions["peak_temperature_c"] == result["metrics"]["peak_temperature_c"]["value"] == 70
    assert conditions["throttled_seconds"] == {"power": pytest.approx(seconds / 2, abs=0.1)}
