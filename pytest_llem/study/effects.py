"""Settings that are given and change nothing: no mistake, and nothing to stay silent about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pytest_llem.study.config import PRESETS, DecoderConfig, ExperimentConfig

if TYPE_CHECKING:  # an experiment's process may have no YAML
    from pytest_llem.study.document import KeyPath

#: What only sampling looks at.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

#: What only a beam search looks at.
_OF_BEAMS = ("early_stopping", "length_penalty")

#: What only a search for settled latencies looks at.
_OF_CONVERGENCE = ("cv_threshold", "window_size", "min_prompts", "max_prompts")


def without_effect(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    """Yield each setting of *config* that was given and has no effect, and why."""
    decoder = config.decoder
    if decoder.greedy:
        for name in _OF_SAMPLING:
            if _is_given(decoder, name) and not (name == "temperature" and decoder.temperature == 0):
                yield ("decoder", name), "has no effect: the likeliest token is taken, nothing is sampled"
    if decoder.min_new_tokens is not None and config.measurement.length_mode == "fixed":
        yield ("decoder", "min_new_tokens"), "has no effect with measurement.length_mode: fixed"
    options = config.pytorch
    if options and options.num_beams == 1:
        for name in _OF_BEAMS:
            if _differs(options, name):
                yield ("pytorch", name), "has no effect without num_beams above 1"
    if config.dataset_order != "interleaved" and not config.has_texts:
        yield ("dataset_order",), "has no effect on synthetic prompts"
    yield from _of_what_is_off(config)
    further = config.passthrough_kwargs or {}
    if options and "cache_config" in further and options.cache_implementation != "quantized":
        yield ("passthrough_kwargs", "cache_config"), "has no effect without cache_implementation: quantized"
    if options and "max_matching_ngram_size" in further and options.prompt_lookup_num_tokens is None:
        yield ("passthrough_kwargs", "max_matching_ngram_size"), "has no effect without prompt_lookup_num_tokens"


def _of_what_is_off(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    warmup = config.warmup
    if not warmup.enabled:
        for name in type(warmup).model_fields:
            if name != "enabled" and _differs(warmup, name):
                yield ("warmup", name), "has no effect with enabled: false"
    elif not warmup.convergence_detection:
        for name in _OF_CONVERGENCE:
            if _differs(warmup, name):
                yield ("warmup", name), "has no effect with convergence_detection: false"
    if _differs(config.baseline, "duration_seconds"):
        if not config.baseline.enabled:
            yield ("baseline", "duration_seconds"), "has no effect with enabled: false"
        elif config.energy.backend is None:
            yield ("baseline", "duration_seconds"), "has no effect without a meter (energy.backend is null)"


def given_value(config: ExperimentConfig, location: KeyPath) -> Any:
    """Return the value of *config* at *location*, as plain data."""
    value: Any = config.model_dump(mode="json")
    for part in location:
        value = value[part]
    return value


def in_effect(config: ExperimentConfig) -> ExperimentConfig:
    """Return *config* with every setting that has no effect at its default: what two points share that are the
    same experiment under different names.
    """
    update: dict[str, Any] = {}
    for location, _ in without_effect(config):
        name, *inner = map(str, location)
        section = update.get(name, getattr(config, name))
        if not inner:
            update[name] = type(config).model_fields[name].default
        elif isinstance(section, BaseModel):
            default = type(section).model_fields[inner[0]].default
            update[name] = section.model_copy(update={inner[0]: default})
        else:
            update[name] = {key: value for key, value in section.items() if key != inner[0]} or None
    return config.model_copy(update=update)


def smaller_batches(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    """Yield the batch size of *config* where the last batch of a pass is smaller, and by how much."""
    if config.pytorch and (rest := config.n % config.pytorch.batch_size):
        size = config.pytorch.batch_size
        yield ("pytorch", "batch_size"), f"{size} does not divide n {config.n}: the last batch holds {rest}"


def _differs(section: BaseModel, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _is_given(decoder: DecoderConfig, name: str) -> bool:
    """Whether a value was given that is not the default, nor the preset's."""
    preset = PRESETS[decoder.preset] if decoder.preset else {}
    default = preset.get(name, DecoderConfig.model_fields[name].default)
    return bool(getattr(decoder, name) != default)
