"""How long an experiment may take and how much memory it needs: rough figures, good for a plan and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_llem.planning.footprint import Footprint
from pytest_llem.planning.host import Host
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.execution import ExecutionConfig

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}

#: What bitsandbytes' formats come to with their constants and the layers that stay as they are.
BYTES_4BIT, BYTES_8BIT = 0.6, 1.1

#: What a process needs before there is a model: PyTorch's libraries, a CUDA context.
RUNTIME_BYTES = 0.5 * 2**30

#: Starting a process and importing PyTorch and transformers, in seconds; and forking one that has imported them.
STARTUP_SECONDS, FORK_SECONDS = 8.0, 0.5

#: Reading weights into memory, in bytes a second.
LOAD_RATE = 0.5e9

#: What a device does in practice: bytes and floating-point operations a second, and the seconds that a step takes
#: Python and the launch of kernels, for each layer.
CPU_RATES = (8e9, 5e10, 0.001)
GPU_RATES = (1.0e12, 1e14, 0.0008)


def weight_bytes(config: ExperimentConfig, footprint: Footprint) -> float:
    """Return the memory of the weights, in bytes."""
    options = config.pytorch
    each = BYTES[config.precision]
    if options and options.load_in_4bit:
        each = BYTES_4BIT
    elif options and options.load_in_8bit:
        each = BYTES_8BIT
    return footprint.parameters * each


def sequences(config: ExperimentConfig) -> int:
    """Return how many sequences are generated at a time."""
    options = config.pytorch
    return options.batch_size * options.num_beams if options else 1


def memory_bytes(config: ExperimentConfig, footprint: Footprint) -> float:
    """Return an experiment's memory, in bytes: weights, a full batch's keys, values and logits, the runtime."""
    tokens = config.max_input_tokens + config.max_output_tokens
    cache = sequences(config) * tokens * footprint.kv_values_per_token * BYTES[config.precision]
    logits = sequences(config) * footprint.vocabulary * 4 * 3
    return weight_bytes(config, footprint) + cache + logits + RUNTIME_BYTES


@dataclass(frozen=True)
class Generation:
    """How long generating takes, in seconds.

    Attributes:
        batch: One batch.
        one_pass: All prompts once.
        first_pass: All prompts once, with one new token each.
    """

    batch: float
    one_pass: float
    first_pass: float


def generation(config: ExperimentConfig, footprint: Footprint, host: Host) -> Generation:
    """Return how long generating may take.

    A step of decoding reads every weight once, and prefill does two operations a weight and token.
    """
    bandwidth, operations, per_layer = GPU_RATES if _on_gpus(config, footprint, host) else CPU_RATES
    cached = config.pytorch is None or config.pytorch.use_cache
    together = sequences(config)
    prefill = 2 * footprint.parameters * config.max_input_tokens * together / operations
    reading = weight_bytes(config, footprint) / bandwidth
    step = reading + footprint.layers * per_layer + (0 if cached else prefill)
    batch = prefill + config.max_output_tokens * step
    batches = math.ceil(config.n / max(1, together))
    return Generation(batch, batches * batch, batches * (prefill + step))


def _on_gpus(config: ExperimentConfig, footprint: Footprint, host: Host) -> bool:
    """Whether the whole model is on GPUs, as far as is known."""
    options = config.pytorch
    if not host.gpus or options is None or options.device_map is None:
        return bool(host.gpus)
    placed = options.device_map.values() if isinstance(options.device_map, dict) else [options.device_map]
    if any(str(place).startswith(("cpu", "disk")) for place in (*placed, *(options.max_memory or {}))):
        return False
    return weight_bytes(config, footprint) < sum(gpu.memory_bytes for gpu in host.gpus)


def seconds(config: ExperimentConfig, execution: ExecutionConfig, footprint: Footprint, host: Host) -> float:
    """Return how long an experiment may take, in seconds, gap and start-up included, without the idle baselines.

    Warm-up and window are filled with whole batches and passes.
    """
    expected = generation(config, footprint, host)
    runs = 0
    if config.warmup.enabled:
        runs = 2 * config.warmup.n_warmup
        if config.warmup.convergence_detection:
            runs = max(runs, config.warmup.window_size)
    warmup = max(runs * expected.batch, config.warmup.thermal_floor_seconds)
    window = _window(config, expected.one_pass)
    if config.measurement.prefill_split:
        window += _window(config, expected.first_pass)
    gap = execution.experiment_gap_seconds
    idle = (15.0 if host.gpus else 0.0) if isinstance(gap, str) else gap
    if idle_power_seconds(config, host):
        idle += config.baseline.part_seconds  # again, after the window
    loading = weight_bytes(config, footprint) / LOAD_RATE
    forked = execution.start_method == "forkserver"
    return (FORK_SECONDS if forked else STARTUP_SECONDS) + loading + warmup + window + idle


def server_seconds(execution: ExecutionConfig) -> float:
    """Return how long a study's forkserver imports, in seconds; 0 where it has none."""
    return STARTUP_SECONDS if execution.start_method == "forkserver" else 0.0


def _window(config: ExperimentConfig, one_pass: float) -> float:
    """Return how long whole passes take that fill a window, in seconds."""
    return max(1, math.ceil(config.measurement.min_window_seconds / one_pass)) * one_pass


def idle_power_seconds(config: ExperimentConfig, host: Host) -> float:
    """Return how long the idle machine is measured for, in seconds, which the first cycle of a point does; 0 where
    it is not. That there is a meter is known of GPUs alone.
    """
    measured = bool(host.gpus) and config.energy.backend not in (None, "estimate")
    return config.baseline.duration_seconds if config.baseline.enabled and measured else 0.0


def duration_text(total: float) -> str:
    """Return *total* seconds as a person says it."""
    if total < 90:
        return f"{total:.0f} s"
    if total < 90 * 60:
        return f"{total / 60:.0f} min"
    if total < 36 * 3600:
        return f"{total / 3600:.1f} h"
    return f"{total / 86400:,.0f} days"
