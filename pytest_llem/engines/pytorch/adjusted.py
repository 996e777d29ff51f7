"""Find settings that transformers changes, mostly without an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llem.engines.models import ModelSource
from pytest_llem.engines.pytorch import generation, loading, placement
from pytest_llem.engines.tokenizer import text_config
from pytest_llem.results.experiment import AdjustedSetting
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.effects import given_value, without_effect
from pytest_llem.study.engines import PyTorchConfig


def adjusted_settings(model: Any, config: ExperimentConfig, source: ModelSource) -> list[AdjustedSetting]:
    """Return the settings of *config* that the loaded model does not run with.

    Args:
        model: The loaded model.
        config: The experiment, with its engine's options under ``pytorch``.
        source: Where the model was found.
    """
    options = config.pytorch or PyTorchConfig()
    found = [
        *_precision(model, config),
        *_quantisation(model, config.backend, options),
        *_others(model, config, options, source),
    ]
    if config.backend != "pytorch":  # a subclass: the study's own checks do not know that it has pytorch's options
        sections = {"pytorch": config.backend, "passthrough_kwargs": "passthrough_kwargs"}
        found += [
            AdjustedSetting(
                setting=f"{sections[str(at[0])]}.{at[1]}",
                given=given_value(config, at),
                reason=message.removeprefix("has no effect").lstrip(": "),
            )
            for at, message in without_effect(config)
            if at[0] in sections
        ]
    return found


def _precision(model: Any, config: ExperimentConfig) -> Iterator[AdjustedSetting]:
    quantised, options = loading.quantisation_of(model), config.pytorch or PyTorchConfig()
    if quantised and not (options.load_in_4bit or options.load_in_8bit):
        yield AdjustedSetting(
            setting="precision",
            given=config.precision,
            effective=str(quantised.get("quant_method")),
            reason="the files of the model are quantised; precision is that of the rest",
        )
        return
    main = loading.main_dtype(model)
    if main != loading.DTYPES[config.precision]:
        yield AdjustedSetting(
            setting="precision",
            given=config.precision,
            effective=loading.PRECISIONS.get(main, str(main).removeprefix("torch.")),
            reason="most of the model's weights are loaded in it",
        )


def _quantisation(model: Any, section: str, options: PyTorchConfig) -> Iterator[AdjustedSetting]:
    """Yield the bitsandbytes options that the model's own files override."""
    names = (
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
    )
    effective_settings = loading.quantisation_of(model) or {}
    for name in names:
        given, effective = getattr(options, name), effective_settings.get(name)
        if given not in (None, False) and effective != given:
            yield AdjustedSetting(
                setting=f"{section}.{name}",
                given=given,
                effective=effective,
                reason="the model's files are already quantised and set it",
            )


def _others(
    model: Any, config: ExperimentConfig, options: PyTorchConfig, source: ModelSource
) -> Iterator[AdjustedSetting]:
    """Yield the other options that transformers or torch replaced or ignored."""
    section, attention = config.backend, text_config(model.config)._attn_implementation
    if options.attn_implementation and options.attn_implementation != attention:
        yield AdjustedSetting(
            setting=f"{section}.attn_implementation",
            given=options.attn_implementation,
            effective=attention,
            reason="transformers chose another one for this model",
        )
    if options.cache_implementation and not model._supports_default_dynamic_cache():
        yield AdjustedSetting(
            setting=f"{section}.cache_implementation",
            given=options.cache_implementation,
            reason=f"{type(model).__name__} has a cache of its own",
        )
    elif options.cache_implementation:
        used_cache = generation.replaced_cache(model, options.cache_implementation)
        if used_cache is not None:
            yield AdjustedSetting(
                setting=f"{section}.cache_implementation",
                given=options.cache_implementation,
                effective=used_cache,
                reason="this version of transformers has replaced it",
            )
    how = loading.compile_settings(options)
    if how == {"mode": "reduce-overhead", "backend": "inductor"} and not placement.used_gpus(model):
        yield AdjustedSetting(
            setting=f"{section}.torch_compile_mode",
            given="reduce-overhead",
            effective="default",
            reason="it only adds CUDA graphs, which need a GPU",
        )
    if options.revision and source.kind != "hub":
        yield AdjustedSetting(
            setting=f"{section}.revision", given=options.revision, reason="the model is not from the hub"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if not config.decoder.greedy and config.decoder.top_k > vocabulary:
        yield AdjustedSetting(
            setting="decoder.top_k",
            given=config.decoder.top_k,
            effective=vocabulary,
            reason="the vocabulary has only so many tokens",
        )
