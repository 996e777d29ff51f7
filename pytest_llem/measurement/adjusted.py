"""Find settings that did not run as they were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_llem.measurement.requests import Requests
from pytest_llem.results.experiment import AdjustedSetting, EngineRecord
from pytest_llem.study.config import DATA_TYPES, ExperimentConfig
from pytest_llem.study.effects import given_value, without_effect

#: Sections that a study may switch off: their settings then have no effect, which is reported only if the
#: setting is an axis.
SWITCHES = ("warmup", "baseline")

#: Values of ``precision`` by the names of data types that engines report.
_PRECISIONS = {"half": "fp16"} | {name: precision for precision, name in DATA_TYPES.items()}


def adjusted_settings(
    config: ExperimentConfig, axes: Mapping[str, Any], engine: EngineRecord, requests: Requests, graphs: int
) -> list[AdjustedSetting]:
    """Return the settings of an experiment that did not run as they were given.

    Args:
        config: The experiment.
        axes: The point's values by axis. A token limit that was not reached is reported only if it is an axis.
        engine: The engine's record, with the settings that it adjusted itself.
        requests: Requests of the window.
        graphs: Number of graphs that ``torch.compile`` has compiled in this process.
    """
    ineffective = [
        AdjustedSetting(
            setting=setting,
            given=given_value(config, path),
            reason=message.removeprefix("has no effect").lstrip(": "),
        )
        for path, message in without_effect(config)
        if (setting := ".".join(map(str, path))) in axes or path[0] not in SWITCHES
    ]
    return [
        *ineffective,
        *engine.adjusted,
        *_data_type(config, engine),
        *_compilation(config, engine, graphs),
        *_batches(config, requests),
        *_limits(config, axes, requests),
    ]


def _data_type(config: ExperimentConfig, engine: EngineRecord) -> Iterator[AdjustedSetting]:
    """Yield ``precision`` if the engine's settings contain a ``dtype`` of another precision."""
    effective = _PRECISIONS.get(str(engine.settings.get("dtype")).removeprefix("torch."))
    known = {one.setting for one in engine.adjusted}
    if effective not in (None, config.precision) and "precision" not in known:
        yield AdjustedSetting(
            setting="precision",
            given=config.precision,
            effective=effective,
            reason="the engine reports this dtype",
        )


def _compilation(config: ExperimentConfig, engine: EngineRecord, graphs: int) -> Iterator[AdjustedSetting]:
    """Yield ``torch_compile`` if nothing was compiled: torch then runs the model uncompiled without a warning."""
    if engine.settings.get("torch_compile") and not graphs:
        yield AdjustedSetting(
            setting=f"{config.backend}.torch_compile",
            given=True,
            reason="torch.compile compiled nothing; unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE",
        )


def _batches(config: ExperimentConfig, requests: Requests) -> Iterator[AdjustedSetting]:
    """Yield the batch size if no batch was that large."""
    given, largest = config.engine_section.get("batch_size"), max(requests.sizes, default=None)
    if isinstance(given, int) and largest is not None and largest != given:
        yield AdjustedSetting(
            setting=f"{config.backend}.batch_size",
            given=given,
            effective=largest,
            reason="this is the largest batch of a pass",
        )


def _limits(config: ExperimentConfig, axes: Mapping[str, Any], requests: Requests) -> Iterator[AdjustedSetting]:
    """Yield the token limits that are an axis and were not reached."""
    longest = {
        "max_input_tokens": ([one.input_tokens for one in requests.all()], "no prompt is longer"),
        "max_output_tokens": ([one.output_tokens for one in requests.all()], "every answer ended before"),
    }
    for name, (counts, reason) in longest.items():
        tokens = max((count for count in counts if count is not None), default=None)
        if name in axes and tokens is not None and tokens < (given := getattr(config, name)):
            yield AdjustedSetting(setting=name, given=given, effective=tokens, reason=reason)
