"""Translate an experiment's settings into transformers' ``GenerationConfig``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode

from pytest_llem.engines.library_errors import library_errors_as_preflight
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.problems import did_you_mean, shown

#: Modes in which each step adds one token to every sequence, so that the time of each token is known.
ONE_PASS_PER_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass(frozen=True)
class SpecialTokens:
    """Special token ids of a model.

    Attributes:
        bos: Beginning of a sequence; None if there is none.
        eos: End of a sequence, or several such tokens; None if there is none.
        pad: Padding.
    """

    bos: int | None = None
    eos: int | Sequence[int] | None = None
    pad: int = 0

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> SpecialTokens:
        """Return the special tokens of a loaded model.

        The end token is the model's own, or else the tokenizer's. The padding token is the tokenizer's, or else
        the model's, or else the (first) end token, or else 0.

        Args:
            model: The model.
            tokenizer: Its tokenizer; None if it has none.
        """
        own = model.generation_config
        eos = own.eos_token_id if own.eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
        pads = getattr(tokenizer, "pad_token_id", None), own.pad_token_id, eos
        pad = next((one for one in pads if one is not None), 0)
        return cls(own.bos_token_id, eos, int(pad if isinstance(pad, int) else pad[0]))


def generation_config(config: ExperimentConfig, tokens: SpecialTokens) -> GenerationConfig:
    """Return the arguments of ``generate`` for *config*.

    Settings without effect, such as a temperature without sampling, are left out, as transformers would warn.

    Raises:
        PreflightError: ``passthrough_kwargs`` has an argument that transformers does not know.
        Exception: transformers refuses an argument, or reports that one has no effect.
    """
    further = config.passthrough_kwargs or {}
    known = tuple(sorted(name for name in vars(GenerationConfig()) if not name.startswith("_")))
    for name in further:
        if name not in known:
            hint = did_you_mean(name, known)
            raise PreflightError(f"passthrough_kwargs.{name}: transformers' generate has no such argument{hint}")
    options = config.pytorch or PyTorchConfig()
    natural = config.measurement.length_mode == "natural"
    arguments = dict(
        max_new_tokens=config.workload.output_len,
        repetition_penalty=config.decoder.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        use_cache=options.use_cache,
        cache_implementation=options.cache_implementation,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
        bos_token_id=tokens.bos,
        pad_token_id=tokens.pad,
        **{
            **_sampling(config),
            **_beams(options),
            # pytorch.torch_compile compiles the whole forward pass: generate must not compile in addition.
            "disable_compile": options.torch_compile or None,
            # Without an end-of-sequence token every sequence runs to its full length.
            **({"eos_token_id": tokens.eos, "min_new_tokens": config.decoder.min_new_tokens} if natural else {}),
            **further,
        },
    )
    made = GenerationConfig(**arguments)
    made.validate(strict=True)
    return made


def refusals_as_preflight(config: ExperimentConfig) -> AbstractContextManager[None]:
    """Return a context that turns what transformers refuses into an error that names ``passthrough_kwargs``.

    transformers checks most of their values only while it generates, and names few of them.
    """
    given = [
        f"passthrough_kwargs.{name}: {shown(value)}" for name, value in (config.passthrough_kwargs or {}).items()
    ]
    what = "generate cannot do what the experiment asks for" + (f" ({', '.join(given)})" if given else "")
    return library_errors_as_preflight(what, with_type_errors=bool(given))


def _sampling(config: ExperimentConfig) -> dict[str, Any]:
    decoder = config.decoder
    if decoder.greedy:
        return {"do_sample": False}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {"do_sample": True} | {name: getattr(decoder, name) for name in names}


def _beams(options: PyTorchConfig) -> dict[str, Any]:
    if options.num_beams == 1:
        return {}
    return {name: getattr(options, name) for name in ("num_beams", "early_stopping", "length_penalty")}


def latency_unknown_reason(generation: GenerationConfig) -> str | None:
    """Return why the time of each token is unknown; None if it is known."""
    mode = generation.get_generation_mode()
    if mode in ONE_PASS_PER_TOKEN:
        return None
    if mode == GenerationMode.ASSISTED_GENERATION:
        return "a step of speculative decoding returns several tokens at once"
    return "a beam search returns all tokens at once, at the end"


def replaced_cache(model: Any, given: str) -> str | None:
    """Return the name of the cache that transformers uses instead of *given*; None if it uses *given*."""
    prepared, _ = model._prepare_generation_config(GenerationConfig(cache_implementation=given))
    name = prepared.cache_implementation
    if name is None:
        return "dynamic"
    if name in DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS:
        return "offloaded_static" if name.startswith("offloaded") else "static"
    return None


def as_data(generation: GenerationConfig) -> dict[str, Any]:
    """Return the fields that *generation* sets, as plain data."""
    data = json.loads(generation.to_json_string(use_diff=True, ignore_metadata=True))
    assert isinstance(data, dict)
    return data
