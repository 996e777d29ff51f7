"""Settings that are given and change nothing: no mistake, and nothing to stay silent about."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llem.study.config import PRESETS, DecoderConfig, ExperimentConfig
from pytest_llem.study.document import KeyPath

#: What only sampling looks at.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

#: What only a beam search looks at.
_OF_BEAMS = ("early_stopping", "length_penalty")


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
            if getattr(options, name) != type(options).model_fields[name].default:
                yield ("pytorch", name), "has no effect without num_beams above 1"
    if config.dataset_order != "interleaved" and not config.has_texts:
        yield ("dataset_order",), "has no effect on synthetic prompts"


def _is_given(decoder: DecoderConfig, name: str) -> bool:
    """Whether a value was given that is not the default, nor the preset's."""
    preset = PRESETS[decoder.preset] if decoder.preset else {}
    default = preset.get(name, DecoderConfig.model_fields[name].default)
    return bool(getattr(decoder, name) != default)
