"""Compute an experiment's deadline, after which it counts as hung and is ended."""

from __future__ import annotations

import math

from pytest_llem.planning.estimate import BYTES, generation
from pytest_llem.planning.host import Host
from pytest_llem.planning.model_files import Footprint
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.load import LoadConfig

#: Starting, importing and other small steps on a slow host, in seconds.
BASE_SECONDS = 300.0

#: Rate of a slow disk, in bytes a second: it reads 70 billion weights in bf16 in half an hour.
SLOW_DISK = 80e6

#: Allowed ratio of actual to estimated generation time; the estimates are rough, and machines differ widely.
SLACK = 20

#: Compilation time, in seconds, of an engine that may compile.
COMPILING_SECONDS = 1800.0

#: For a model of unknown size: a constant in s, a time per generated token in s, and a maximum in s, so that a
#: hung experiment does not hold its device for days.
UNKNOWN_SECONDS = 7200.0
UNKNOWN_TOKEN_SECONDS = 0.05
MAX_UNKNOWN_SECONDS = 6 * 3600.0

#: Time limits of a request that a load may take besides its window: in warm-up, ramp-up, window and drain.
_REQUEST_TIMEOUTS_OF_A_LOAD = 4

#: Ten years, in seconds: an effectively unlimited deadline.
MAX_SECONDS = 315_360_000.0


def deadline_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, needs: Needs, footprint: Footprint | None, host: Host
) -> float:
    """Return the maximum time from the start of an experiment's process, in seconds, without downloads.

    It is ``execution.experiment_timeout_seconds`` if that is given. Otherwise it is generous, so that it ends hung
    experiments but not slow ones: the sum of

    - 5 min to start, and 30 min if something may be compiled,
    - the weights on disk ÷ 80 MB/s,
    - 20 × the estimate of a pass over the prompts and of the maximum number of batches before it: the warm-up's
      (``2 · n_warmup``, up to ``max_prompts`` with ``convergence_detection``), one that still runs after
      ``thermal_floor_seconds``, the idle power measurement's, and a prefill-only pass,
    - ``min_window_seconds``, twice with ``prefill_split``, ``thermal_floor_seconds``, and 1.2 times
      ``baseline.duration_seconds``, if they apply,

    rounded up to whole minutes. If the model's size is unknown, the first three are 2 h plus 0.05 s for each
    output token of a pass, at most 6 h. For a load on a server, it is 5 min, the window, and the time limits of
    four requests: in warm-up, ramp-up, window and drain; for a search, of as many such loads as it may try.

    Args:
        config: The experiment.
        execution: The study's execution settings.
        needs: What its engine needs.
        footprint: Size of the model; None if unknown.
        host: Machine on which the experiment runs.
    """
    if execution.experiment_timeout_seconds is not None:
        return execution.experiment_timeout_seconds
    if config.load is not None:
        return _server_load_deadline(config, config.load)
    if footprint is None:
        tokens = config.n * config.max_output_tokens
        total = min(UNKNOWN_SECONDS + tokens * UNKNOWN_TOKEN_SECONDS, MAX_UNKNOWN_SECONDS)
    else:
        total = _model_load_seconds(config, needs, footprint)
        expected = generation(config, needs, footprint, host)
        total += SLACK * (expected.one_pass + _batches_before(config) * expected.batch)
        if config.measurement.prefill_split:
            total += SLACK * expected.first_pass
    total += config.measurement.min_window_seconds * (2 if config.measurement.prefill_split else 1)
    if config.warmup.enabled:
        total += config.warmup.thermal_floor_seconds
    if config.baseline.enabled:
        total += config.baseline.duration_seconds + config.baseline.part_seconds
    return math.ceil(min(total, MAX_SECONDS) / 60) * 60.0


def max_load_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, needs: Needs, footprint: Footprint | None
) -> float | None:
    """Return the maximum time in which an engine loads its model, in seconds: a start that hangs ends early.

    It is the part of :func:`deadline_seconds` for the start, the compilation and the weights.

    Returns:
        None if the model's size is unknown, if there is a server in place of an engine, or if
        ``execution.experiment_timeout_seconds`` is given: that is then the only limit.
    """
    if footprint is None or config.load is not None or execution.experiment_timeout_seconds is not None:
        return None
    return math.ceil(_model_load_seconds(config, needs, footprint) / 60) * 60.0


def _model_load_seconds(config: ExperimentConfig, needs: Needs, footprint: Footprint) -> float:
    """Return the maximum time to start a process, compile, and load the model, in seconds."""
    # A quantised model is read from disk unquantised.
    weights = footprint.parameters * BYTES[config.precision] / SLOW_DISK
    return BASE_SECONDS + (COMPILING_SECONDS if needs.compiles else 0.0) + weights


def _server_load_deadline(config: ExperimentConfig, load: LoadConfig) -> float:
    """Return the deadline of an experiment that puts a load on a server, in seconds."""
    per_load = config.measurement.min_window_seconds + _REQUEST_TIMEOUTS_OF_A_LOAD * load.request_timeout_seconds
    total = BASE_SECONDS + per_load * (load.search.max_loads if load.is_search else 1)
    return math.ceil(min(total, MAX_SECONDS) / 60) * 60.0


def _batches_before(config: ExperimentConfig) -> int:
    """Return the maximum number of batches before the window, without those that run because of a compilation."""
    idle_power, warmup = int(config.baseline.enabled), config.warmup
    if not warmup.enabled:
        return idle_power
    batches = 2 * warmup.n_warmup
    if warmup.convergence_detection:
        batches = max(batches, warmup.max_prompts)
    return idle_power + batches + 1
