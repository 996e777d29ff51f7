"""Find settings that are given but have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pytest_llem.study.config import PRESETS, DecoderConfig, ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig

if TYPE_CHECKING:  # an experiment's process may not have PyYAML
    from pytest_llem.study.document import KeyPath

#: Fields that are used only with sampling.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p")

#: Fields that are used only with beam search.
_BEAM_FIELDS = ("early_stopping", "length_penalty")

#: Fields that are used only with convergence detection.
_CONVERGENCE_FIELDS = ("cv_threshold", "window_size", "min_prompts", "max_prompts")

#: Arguments of transformers' ``generate`` that are used only if a model drafts tokens, and those that make it
#: draft.
_DRAFT_ARGUMENTS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
)
_DRAFTING = ("assistant_early_exit", "use_mtp")

#: Arguments that ``generate`` accepts but that never have an effect in the engine, and why.
_UNUSED_ARGUMENTS = {
    **dict.fromkeys(("num_beam_groups", "diversity_penalty"), "without a group beam search: not supported"),
    "penalty_alpha": "without a contrastive search: not supported",
    "low_memory": "in this version of transformers",
    "decoder_start_token_id": "on a model without an encoder",
    **dict.fromkeys(
        ("assistant_lookbehind", "target_lookbehind", "speculation_type"), "without a second model: not supported"
    ),
    "continuous_batching_config": "without continuous batching: not supported",
    "transformers_version": "beside the version that is installed",
}

#: Caches that grow, so that they have no maximum length.
_GROWING_CACHES = (None, "dynamic", "offloaded", "quantized")


def without_effect(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path of each setting of *config* that is given but has no effect, and a message."""
    decoder = config.decoder
    if decoder.greedy:
        for name in _SAMPLING_FIELDS:
            if _is_given(decoder, name) and not (name == "temperature" and decoder.temperature == 0):
                yield ("decoder", name), "has no effect: the likeliest token is taken, nothing is sampled"
    if decoder.min_new_tokens is not None and config.measurement.length_mode == "fixed":
        yield ("decoder", "min_new_tokens"), "has no effect with measurement.length_mode: fixed"
    options = config.pytorch
    if options and options.num_beams == 1:
        for name in _BEAM_FIELDS:
            if _is_given(options, name):
                yield ("pytorch", name), "has no effect without num_beams above 1"
    if config.dataset_order != "interleaved" and not config.has_texts:
        yield ("dataset_order",), "has no effect on synthetic prompts"
    yield from _in_disabled_features(config)
    if options:
        for name, why in _unused_arguments(options, config.passthrough_kwargs or {}):
            yield ("passthrough_kwargs", name), f"has no effect {why}"


def _unused_arguments(options: PyTorchConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each argument of transformers' ``generate`` in *given* that has no effect, and the reason."""
    if "cache_config" in given and options.cache_implementation != "quantized":
        yield "cache_config", "without cache_implementation: quantized"
    if "max_cache_len" in given and options.cache_implementation in _GROWING_CACHES:
        yield "max_cache_len", "without cache_implementation: static"
    if "max_matching_ngram_size" in given and options.prompt_lookup_num_tokens is None:
        yield "max_matching_ngram_size", "without prompt_lookup_num_tokens"
    if not any(given.get(name) for name in _DRAFTING):
        yield from ((name, f"without {' or '.join(_DRAFTING)}") for name in _DRAFT_ARGUMENTS if name in given)
    yield from ((name, why) for name, why in _UNUSED_ARGUMENTS.items() if name in given)


def _in_disabled_features(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    warmup = config.warmup
    if not warmup.enabled:
        for name in type(warmup).model_fields:
            if name != "enabled" and _is_given(warmup, name):
                yield ("warmup", name), "has no effect with enabled: false"
    elif not warmup.convergence_detection:
        for name in _CONVERGENCE_FIELDS:
            if _is_given(warmup, name):
                yield ("warmup", name), "has no effect with convergence_detection: false"
    if _is_given(config.baseline, "duration_seconds"):
        if not config.baseline.enabled:
            yield ("baseline", "duration_seconds"), "has no effect with enabled: false"
        elif config.energy.backend is None:
            yield ("baseline", "duration_seconds"), "has no effect without a meter (energy.backend is null)"
        elif config.energy.backend == "estimate":
            message = "has no effect with energy.backend: estimate: idle power is never estimated"
            yield ("baseline", "duration_seconds"), message


def given_value(config: ExperimentConfig, location: KeyPath) -> Any:
    """Return the value of *config* at the key path *location*, as plain data."""
    value: Any = config.model_dump(mode="json")
    for part in location:
        value = value[part]
    return value


def in_effect(config: ExperimentConfig) -> ExperimentConfig:
    """Return *config* with the default in place of each setting without effect.

    Points for which the returned configuration is equal are the same experiment under different names.
    """
    update: dict[str, Any] = {}
    for location, _ in without_effect(config):
        name, *inner = map(str, location)
        section = update.get(name, getattr(config, name))
        if not inner:
            update[name] = _default(config, name)
        elif isinstance(section, BaseModel):
            update[name] = section.model_copy(update={inner[0]: _default(section, inner[0])})
        else:
            update[name] = {key: value for key, value in section.items() if key != inner[0]} or None
    return config.model_copy(update=update)


def smaller_batches(config: ExperimentConfig) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path of the batch size of *config*, and a message, if the last batch of a pass is smaller."""
    if config.pytorch and (rest := config.n % config.pytorch.batch_size):
        size = config.pytorch.batch_size
        yield ("pytorch", "batch_size"), f"{size} does not divide n {config.n}: the last batch holds {rest}"


def _is_given(section: BaseModel, name: str) -> bool:
    """Return whether a field differs from its default."""
    return bool(getattr(section, name) != _default(section, name))


def _default(section: BaseModel, name: str) -> Any:
    """Return the value of a field that is not given: the decoder preset's, or else the field's default."""
    preset = section.preset if isinstance(section, DecoderConfig) else None
    values = PRESETS[preset] if preset else {}
    return values.get(name, type(section).model_fields[name].default)
