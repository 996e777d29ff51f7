"""When an experiment that is still running is taken for hung."""

from __future__ import annotations

import math

from pytest_llem.planning.estimate import BYTES, generation
from pytest_llem.planning.footprint import Footprint
from pytest_llem.planning.host import Host
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.execution import ExecutionConfig

#: Starting, importing and all that is small, on the slowest of hosts, in seconds.
BASE_SECONDS = 300.0

#: A slow disk, in bytes a second: 70 billion weights in bf16 take half an hour.
SLOW_DISK = 80e6

#: How much longer than estimated generating may take: estimates are rough, and machines differ as much.
SLACK = 20

#: What compiling may take, in seconds: ``pytorch.torch_compile``, and engines that decide it for themselves.
COMPILING_SECONDS = 1800.0

#: In place of all that where the model's size is unknown, in seconds; for each token that a pass generates; and at
#: most, since one that hangs would otherwise hold its device for days.
UNKNOWN_SECONDS = 7200.0
UNKNOWN_TOKEN_SECONDS = 0.05
UNKNOWN_MOST_SECONDS = 6 * 3600.0

#: Ten years, which is as good as never.
LONGEST = 315_360_000.0


def deadline_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, footprint: Footprint | None, host: Host
) -> float:
    """Return how long an experiment may take from the start of its process, in seconds, downloads left out.

    It is ``execution.experiment_timeout_seconds`` where that is given. Otherwise it is generous, being there to
    end what hangs and not what is slow: the sum of

    - 5 min to start, and 30 min where something may be compiled,
    - the weights on disk ÷ 80 MB/s,
    - 20 × what is estimated for a pass over the prompts and for the most batches before it: the warm-up's
      (``2 · n_warmup``, up to ``max_prompts`` with ``convergence_detection``), one that is under way at
      ``thermal_floor_seconds``, the baseline's, and a pass of prefill alone,
    - ``min_window_seconds``, ``thermal_floor_seconds`` and ``baseline.duration_seconds``, where they apply,

    rounded up to whole minutes. Where the model's size is unknown, the first three are 2 h and 0.05 s for each
    token of a pass, 6 h at most.

    Args:
        config: The experiment.
        execution: How it is run.
        footprint: The size of its model; None where it is not known.
        host: Where it runs.
    """
    if execution.experiment_timeout_seconds is not None:
        return execution.experiment_timeout_seconds
    if footprint is None:
        tokens = config.n * config.max_output_tokens
        total = min(UNKNOWN_SECONDS + tokens * UNKNOWN_TOKEN_SECONDS, UNKNOWN_MOST_SECONDS)
    else:
        total = BASE_SECONDS + (COMPILING_SECONDS if _may_compile(config) else 0.0)
        # Quantising begins with the whole weights, too.
        total += footprint.parameters * BYTES[config.precision] / SLOW_DISK
        expected = generation(config, footprint, host)
        total += SLACK * (expected.one_pass + _batches_before(config) * expected.batch)
        if config.measurement.prefill_split:
            total += SLACK * expected.first_pass
    total += config.measurement.min_window_seconds * (2 if config.measurement.prefill_split else 1)
    if config.warmup.enabled:
        total += config.warmup.thermal_floor_seconds
    if config.baseline.enabled:
        total += config.baseline.duration_seconds + config.baseline.part_seconds
    return math.ceil(min(total, LONGEST) / 60) * 60.0


def _may_compile(config: ExperimentConfig) -> bool:
    return config.pytorch is None or config.pytorch.torch_compile


def _batches_before(config: ExperimentConfig) -> int:
    """Return the most batches that are generated before the window."""
    baseline, warmup = int(config.baseline.enabled), config.warmup
    if not warmup.enabled:
        return baseline
    runs = 2 * warmup.n_warmup
    if warmup.convergence_detection:
        runs = max(runs, warmup.max_prompts)
    return baseline + runs + 1
