"""Turn an experiment into the arguments of vLLM, and check those that a study gives under vLLM's own names."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import UnionType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind

from pytest_llem.engines.shipped import ENGINE_FIELDS, SAMPLING_FIELDS
from pytest_llem.study.config import DATA_TYPES, ExperimentConfig
from pytest_llem.study.engines import VLLMConfig
from pytest_llem.study.problems import did_you_mean, shown

#: Arguments of vLLM's sampling that end an answer, also with ``ignore_eos``.
ENDS_ANSWERS = {"stop", "stop_token_ids", "structured_outputs", "repetition_detection"}

#: Generic types that are plain if their arguments are: see :func:`_is_plain`.
_PLAIN = (typing.Union, UnionType, list, dict, tuple)

#: An extension of vLLM's worker, which runs where the model is.
WORKER_EXTENSION = "pytest_llem.engines.vllm.worker.WorkerExtension"


def engine_arguments(config: ExperimentConfig, location: str, *, has_tokenizer: bool) -> dict[str, Any]:
    """Return the arguments of ``vllm.EngineArgs`` for an experiment.

    Prefix caching is off unless the study asks for it: every pass has the same prompts. vLLM loads a tokenizer
    only if it has to know the end-of-sequence token: prompts and answers are token ids.

    Args:
        config: The experiment.
        location: Folder or hub name of the model.
        has_tokenizer: Whether the model has a tokenizer.
    """
    given = _typed(EngineArgs, (config.vllm or VLLMConfig()).engine)
    return {
        "enable_prefix_caching": False,
        "skip_tokenizer_init": config.measurement.length_mode == "fixed" or not has_tokenizer,
        **given,
        "model": location,
        "dtype": DATA_TYPES[config.precision],
        "seed": config.random_seed % 2**32,
        "disable_log_stats": False,
        "worker_extension_cls": WORKER_EXTENSION,
    }


def sampling_arguments(config: ExperimentConfig, index: int = 0) -> dict[str, Any]:
    """Return the arguments of ``vllm.SamplingParams`` for a request of an experiment.

    Args:
        config: The experiment.
        index: Number of the prompt in its pass. Each has its own seed, the same in every pass.
    """
    decoder, tokens = config.decoder, config.workload.output_len
    given = _typed(SamplingParams, (config.vllm or VLLMConfig()).sampling)
    fixed = config.measurement.length_mode == "fixed"
    return {
        "detokenize": False,
        **given,
        "max_tokens": tokens,
        "min_tokens": 0 if fixed else decoder.min_new_tokens or 0,
        "ignore_eos": fixed,
        "temperature": 0.0 if decoder.greedy else decoder.temperature,
        "top_k": decoder.top_k,
        "top_p": decoder.top_p,
        "min_p": decoder.min_p or 0.0,
        "repetition_penalty": decoder.repetition_penalty,
        "seed": None if decoder.greedy else (config.random_seed + index) % 2**63,
        "output_kind": RequestOutputKind.DELTA,
    }


def argument_problems(config: ExperimentConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the key path of each argument that vLLM does not have, or cannot be given, and a message.

    An argument cannot be given if its type is wrong, or if it may end answers that have a fixed length.
    """
    options = config.vllm or VLLMConfig()
    engine = {one.name for one in dataclasses.fields(EngineArgs)}
    sampling = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    # Names in ENGINE_FIELDS and SAMPLING_FIELDS are reported by unmet_by_vllm, which does not need vLLM.
    sections = (
        ("engine", options.engine, EngineArgs, engine, ENGINE_FIELDS),
        ("sampling", options.sampling, SamplingParams, sampling, SAMPLING_FIELDS),
    )
    fixed = config.measurement.length_mode == "fixed"
    for section, given, kind, arguments, fields in sections:
        hints, known = _hints(kind), arguments - fields.keys()
        for name, value in (given or {}).items():
            if name in fields:
                continue
            if name not in known:
                hint = did_you_mean(name, tuple(sorted(known)))
                yield (config.backend, section, name), f"vLLM has no such argument{hint}"
            elif (problem := _type_problem(hints.get(name), value)) is not None:
                yield (config.backend, section, name), problem
            elif kind is SamplingParams and name in ENDS_ANSWERS and value and fixed:
                message = "it may end answers before max_output_tokens: set measurement.length_mode to natural"
                yield (config.backend, section, name), message


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    """Return the types of a class's fields, without those that only type checkers import."""
    found: dict[str, Any] = {}
    for name, hint in inspect.get_annotations(kind).items():
        alone = type(kind.__name__, (), {"__annotations__": {name: hint}, "__module__": kind.__module__})
        with suppress(NameError, TypeError):
            found |= typing.get_type_hints(alone)
    return found


def _typed(kind: type, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return arguments with values of their types: in JSON, the keys of ``logit_bias`` are strings."""
    hints = _hints(kind)
    return {name: _value(hints.get(name), value) for name, value in (given or {}).items()}


def _is_plain(hint: Any) -> bool:
    """Return whether YAML can express all values of a type. Only vLLM can check those of other types."""
    if hint in (int, float, bool, str, type(None), Any) or typing.get_origin(hint) is typing.Literal:
        return True
    return typing.get_origin(hint) in _PLAIN and all(map(_is_plain, typing.get_args(hint)))


def _value(hint: Any, value: Any) -> Any:
    """Return *value* as one of the type *hint*, unless only vLLM can check it.

    Raises:
        ValidationError: *value* is not of that type.
    """
    if value is None or not _is_plain(hint):  # null is the default of arguments whose type does not say so
        return value
    return TypeAdapter(hint).validate_python(value)


def _type_problem(hint: Any, value: Any) -> str | None:
    """Return what is wrong with a value of the type *hint*; None if it is right, or only vLLM can check it."""
    try:
        _value(hint, value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        return f"{message[:1].lower()}{message[1:]} (got {shown(value)})"
    return None
