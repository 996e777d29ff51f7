"""Settings that did not run as they were given: a result says what ran, beside what its label says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_llem.measurement.requests import Requests
from pytest_llem.results.experiment import AdjustedSetting, EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.effects import given_value, without_effect

#: Sections that may be switched off: what they hold then is expected to have no effect, unless it is an axis.
SWITCHES = ("warmup", "baseline")


#: Values of ``precision`` by the names of data types that engines state.
DATA_TYPES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


def adjusted_settings(
    config: ExperimentConfig, axes: Mapping[str, Any], engine: EngineRecord, requests: Requests, graphs: int
) -> list[AdjustedSetting]:
    """Return the settings of an experiment that did not run as they were given.

    Args:
        config: The experiment.
        axes: What tells its point apart: limits that nothing came near to are no adjustment, unless they are axes.
        engine: What ran, with what the engine itself has adjusted.
        requests: Of the window.
        graphs: How many ``torch.compile`` has compiled in this process.
    """
    idle = [
        AdjustedSetting(
            setting=setting,
            given=given_value(config, at),
            reason=message.removeprefix("has no effect").lstrip(": "),
        )
        for at, message in without_effect(config)
        if (setting := ".".join(map(str, at))) in axes or at[0] not in SWITCHES
    ]
    return [
        *idle,
        *engine.adjusted,
        *_data_type(config, engine),
        *_compilation(config, engine, graphs),
        *_batches(config, requests),
        *_limits(config, axes, requests),
    ]


def _data_type(config: ExperimentConfig, engine: EngineRecord) -> Iterator[AdjustedSetting]:
    """Yield ``precision`` where an engine states a ``dtype`` of another one among its settings. The engine pytorch
    has counted its weights itself.
    """
    runs = DATA_TYPES.get(str(engine.settings.get("dtype")).removeprefix("torch."))
    known = {one.setting for one in engine.adjusted}
    if engine.name != "pytorch" and runs not in (None, config.precision) and "precision" not in known:
        yield AdjustedSetting(
            setting="precision", given=config.precision, effective=runs, reason="the engine states this dtype"
        )


def _compilation(config: ExperimentConfig, engine: EngineRecord, graphs: int) -> Iterator[AdjustedSetting]:
    """Yield ``torch_compile`` where nothing was compiled: torch then runs the model as it is, without a word."""
    if engine.settings.get("torch_compile") and not graphs:
        yield AdjustedSetting(
            setting=f"{config.backend}.torch_compile",
            given=True,
            reason="torch.compile compiled nothing; unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE",
        )


def _batches(config: ExperimentConfig, requests: Requests) -> Iterator[AdjustedSetting]:
    """Yield the batch size where no batch was that large, whatever the engine."""
    given, largest = config.engine_section.get("batch_size"), max(requests.sizes, default=None)
    if isinstance(given, int) and largest is not None and largest != given:
        yield AdjustedSetting(
            setting=f"{config.backend}.batch_size",
            given=given,
            effective=largest,
            reason="this is the largest batch of a pass",
        )


def _limits(config: ExperimentConfig, axes: Mapping[str, Any], requests: Requests) -> Iterator[AdjustedSetting]:
    records = [request for one in requests.passes for request in one]
    longest = {
        "max_input_tokens": (max(one.input_tokens for one in records), "no prompt is longer"),
        "max_output_tokens": (max(len(one.output_ids) for one in records), "every answer ended before"),
    }
    for name, (tokens, reason) in longest.items():
        if name in axes and tokens < (given := getattr(config, name)):
            yield AdjustedSetting(setting=name, given=given, effective=tokens, reason=reason)
