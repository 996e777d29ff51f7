"""Estimate an experiment's time and memory, roughly, for the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.planning.host import Host, this_host
from pytest_llem.planning.model_files import Footprint, footprint_of
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.execution import ExecutionConfig

#: Bytes per weight.
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}

#: Memory of a process without a model, in bytes: PyTorch's libraries, a CUDA context.
RUNTIME_BYTES = 0.5 * 2**30

#: Time to start a process and import PyTorch and transformers, and to fork one that has imported them, in seconds.
STARTUP_SECONDS, FORK_SECONDS = 8.0, 0.5

#: Rate of reading weights into memory, in bytes a second.
LOAD_RATE = 0.5e9

#: Typical rates of a device: memory bandwidth in bytes/s, floating-point operations/s, and the overhead of Python
#: and kernel launches per layer and decoding step, in s.
CPU_RATES = (8e9, 5e10, 0.001)
GPU_RATES = (1.0e12, 1e14, 0.0008)


def weight_bytes(config: ExperimentConfig, needs: Needs, footprint: Footprint) -> float:
    """Return the size of the weights in memory, in bytes."""
    return needs.weight_bytes or footprint.parameters * BYTES[config.precision]


def memory_bytes(config: ExperimentConfig, needs: Needs, footprint: Footprint) -> float:
    """Return an experiment's memory in bytes: weights, KV cache and logits of a full batch, and the runtime."""
    tokens, sequences = config.max_input_tokens + config.max_output_tokens, needs.sequences or 1
    cache = sequences * tokens * footprint.kv_values_per_token * BYTES[config.precision]
    logits = sequences * footprint.vocabulary * 4 * 3  # in fp32, with two copies while a token is sampled
    return weight_bytes(config, needs, footprint) + cache + logits + RUNTIME_BYTES


@dataclass(frozen=True)
class Generation:
    """Generation times, in s.

    Attributes:
        batch: Time of one batch.
        one_pass: Time of one pass over all prompts.
        first_pass: Time of one pass with one new token per prompt.
    """

    batch: float
    one_pass: float
    first_pass: float


def generation(config: ExperimentConfig, needs: Needs, footprint: Footprint, host: Host) -> Generation:
    """Return the estimated generation times.

    Assumes that a decoding step reads every weight once and that prefill does 2 operations per weight and token.
    The time of a pass that the engine states replaces the estimate of a pass and of a batch.
    """
    bandwidth, operations, per_layer = GPU_RATES if _on_gpus(config, needs, footprint, host) else CPU_RATES
    together = needs.sequences or 1
    prefill = 2 * footprint.parameters * config.max_input_tokens * together / operations
    reading = weight_bytes(config, needs, footprint) / bandwidth
    step = reading + footprint.layers * per_layer + (prefill if needs.recomputes else 0)
    batch = prefill + config.max_output_tokens * step
    batches = math.ceil(config.n / together)
    if needs.seconds is not None:
        return Generation(needs.seconds / batches, needs.seconds, min(needs.seconds, batches * (prefill + step)))
    return Generation(batch, batches * batch, batches * (prefill + step))


def _on_gpus(config: ExperimentConfig, needs: Needs, footprint: Footprint, host: Host) -> bool:
    """Return whether the whole model is expected to be on GPUs."""
    if not host.gpus or needs.gpus is not None:
        return bool(host.gpus) and needs.gpus != 0
    in_gpus = weight_bytes(config, needs, footprint) < sum(gpu.memory_bytes for gpu in host.gpus)
    return in_gpus and not needs.offloads


def seconds(
    config: ExperimentConfig, execution: ExecutionConfig, needs: Needs, footprint: Footprint, host: Host
) -> float:
    """Return the estimated time of an experiment, in seconds, with gap and start-up.

    The idle power measurement of a point's first cycle is not included. The window is rounded up to whole passes.
    """
    expected = generation(config, needs, footprint, host)
    batches = 0
    if config.warmup.enabled:
        batches = 2 * config.warmup.n_warmup
        if config.warmup.convergence_detection:
            batches = max(batches, config.warmup.window_size)
    warmup = max(batches * expected.batch, config.warmup.thermal_floor_seconds)
    window = _window(config, expected.one_pass)
    if config.measurement.prefill_split:
        window += _window(config, expected.first_pass)
    gap = execution.experiment_gap_seconds
    # The gap "auto" lasts until GPUs have cooled down; 15 s is a rough guess.
    idle = (15.0 if host.gpus else 0.0) if isinstance(gap, str) else gap
    if idle_power_seconds(config, host):
        idle += config.baseline.part_seconds  # idle power is measured again after the window
    loading = weight_bytes(config, needs, footprint) / LOAD_RATE
    forked = execution.start_method == "forkserver"
    return (FORK_SECONDS if forked else STARTUP_SECONDS) + loading + warmup + window + idle


def rough_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, model_path: tuple[Path, ...]
) -> float | None:
    """Return the estimated time of an experiment on this machine, in s; None if its model's size is unknown."""
    if (footprint := footprint_of(config, model_path)) is None:
        return None
    needs = shipped_needs(config, footprint.parameters) or Needs()
    return seconds(config, execution, needs, footprint, this_host())


def server_seconds(execution: ExecutionConfig) -> float:
    """Return the time that a study's forkserver takes to import, in seconds; 0 without a forkserver."""
    return STARTUP_SECONDS if execution.start_method == "forkserver" else 0.0


def _window(config: ExperimentConfig, one_pass: float) -> float:
    """Return the time of the whole passes that fill a window, in seconds."""
    return max(1, math.ceil(config.measurement.min_window_seconds / one_pass)) * one_pass


def idle_power_seconds(config: ExperimentConfig, host: Host) -> float:
    """Return the time of the idle power measurement in a point's first cycle, in seconds; 0 if there is none.

    Without GPUs it is 0, because whether the machine has another meter is not known here.
    """
    measured = bool(host.gpus) and config.energy.backend not in (None, "estimate")
    return config.baseline.duration_seconds if config.baseline.enabled and measured else 0.0


def duration_text(total: float) -> str:
    """Return *total* seconds in a readable unit, as in ``90 min``."""
    if total < 90:
        return f"{total:.0f} s"
    if total < 90 * 60:
        return f"{total / 60:.0f} min"
    if total < 36 * 3600:
        return f"{total / 3600:.1f} h"
    return f"{total / 86400:,.0f} days"


def gib(size: float) -> str:
    """Return a size in bytes as text in GiB."""
    return f"{size / 2**30:.1f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"
