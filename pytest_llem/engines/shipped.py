"""Describe pytest-llem's own engines without importing their libraries, and find why an experiment cannot run.

Each function ``unmet_by_…`` yields one sentence for each reason, with what to do. What depends on the model, or
only the library itself can check, is reported when the engine loads.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

from pytest_llem.study.config import DecoderConfig, ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs
from pytest_llem.study.engines import COMMAND, CommandConfig, PyTorchConfig, VLLMConfig
from pytest_llem.study.server import ServerConfig
from pytest_llem.study.substitution import command_values

#: The package that reads datasets of the Hugging Face hub, for every engine.
DATASETS = "datasets"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # its parent package is missing
        return False


@dataclass(frozen=True)
class Packages:
    """The environment that an experiment runs in.

    Attributes:
        has: Returns whether an optional module, given by its name, is installed.
        pip: The command for pip in this environment.
    """

    has: Callable[[str], bool] = _is_installed
    pip: str = "pip"


THIS_ENVIRONMENT = Packages()


#: Attention kernels and the packages of which one must be installed, each as module and pip name. If ``kernels``
#: is installed, transformers downloads a kernel from the hub.
ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
}

#: Packages that quantise a cache, as module and pip name, by backend in transformers' ``cache_config``.
CACHES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}

#: Modules that only some experiments of the engine ``pytorch`` need.
PYTORCH_OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    *(module for module, _ in CACHES.values()),
    *(module for kernels in ATTENTION.values() for module, _ in kernels),
)

#: Arguments of transformers' GenerationConfig that a field of the study sets. ``{section}`` is that of the engine.
GENERATION_FIELDS = {
    "max_new_tokens": "max_output_tokens",
    "max_length": "max_output_tokens",
    "min_length": "decoder.min_new_tokens",
    "compile_config": "{section}.torch_compile",
    **{name: f"decoder.{name}" for name in DecoderConfig.model_fields},
    **{name: f"{{section}}.{name}" for name in PyTorchConfig.model_fields},
}

_SET_BY_MODEL = "the model and measurement.length_mode set it"
_ENDS_EARLY = "it would end sequences without an end token, and token counts would be wrong; use max_output_tokens"
_DISCARDED = "its output would be discarded"

#: Arguments that only the engine can set, and why.
SET_BY_ENGINE = {
    "num_return_sequences": "every prompt must have one answer, or metrics per request would be wrong",
    "eos_token_id": _SET_BY_MODEL,
    "pad_token_id": _SET_BY_MODEL,
    "bos_token_id": _SET_BY_MODEL,
    "max_time": _ENDS_EARLY,
    "stop_strings": _ENDS_EARLY,
    "token_healing": "it would change the prompts",
    "is_assistant": "the model is not a draft model",
    **dict.fromkeys(
        (
            "return_dict_in_generate",
            "output_scores",
            "output_logits",
            "output_attentions",
            "output_hidden_states",
        ),
        _DISCARDED,
    ),
}


def unmet_by_pytorch(config: ExperimentConfig, packages: Packages = THIS_ENVIRONMENT) -> Iterator[str]:
    """Yield why an experiment of the engine ``pytorch``, or of a subclass of it, cannot run in *packages*."""
    options, section = config.pytorch or PyTorchConfig(), config.backend
    if options.num_processes > 1:
        yield f"{section}.num_processes {options.num_processes} is not supported yet: leave it at 1"
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name):
            yield from _missing(packages, f"{section}.{name}", "bitsandbytes", "accelerate")
    if options.device_map is not None:
        yield from _missing(packages, f"{section}.device_map", "accelerate")
    if options.cache_implementation == "paged":
        batching = "is for continuous batching, which is not supported: leave it out"
        yield f"{section}.cache_implementation 'paged' {batching}"
    if options.cache_implementation == "quantized":
        yield from _quantised_cache(config, packages)
    attention = options.attn_implementation or ""
    if attention.startswith("paged|"):
        yield f"{section}.attn_implementation {attention!r} is for continuous batching, which is not supported"
    kernels = ATTENTION.get(attention, (("kernels", "kernels"),) if "/" in attention else ())
    if kernels and not any(packages.has(module) for module, _ in kernels):
        either = " or ".join(package for _, package in kernels)
        yield f"{section}.attn_implementation {attention!r} needs {either}: {packages.pip} install {kernels[0][1]}"
    for name in config.passthrough_kwargs or {}:
        if name in GENERATION_FIELDS:
            yield f"passthrough_kwargs.{name}: use {GENERATION_FIELDS[name].format(section=section)}"
        elif name in SET_BY_ENGINE:
            yield f"passthrough_kwargs.{name} cannot be given: {SET_BY_ENGINE[name]}"


def _quantised_cache(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    settings = (config.passthrough_kwargs or {}).get("cache_config")
    backend = settings.get("backend", "quanto") if isinstance(settings, dict) else "quanto"
    module, package = CACHES.get(backend, (None, None))
    if module is not None and not packages.has(module):
        option = f"{config.backend}.cache_implementation 'quantized'"
        yield f"{option} needs {package}: {packages.pip} install {package}"


def _missing(packages: Packages, field: str, *names: str) -> Iterator[str]:
    absent = [name for name in names if not packages.has(name)]
    if absent:
        yield f"{field} needs {' and '.join(absent)}: {packages.pip} install {' '.join(absent)}"


#: Arguments of vLLM's engine that only pytest-llem sets, and what to use instead, or why.
ENGINE_FIELDS = {
    "model": "use model",
    "dtype": "use precision",
    "seed": "use random_seed",
    "disable_log_stats": "vLLM has to report the times of its requests",
    "worker_extension_cls": "pytest-llem measures memory with an extension of its own",
}

#: Arguments of vLLM's sampling that only pytest-llem sets, and what to use instead, or why.
SAMPLING_FIELDS = {
    "n": "every prompt must have one answer, or metrics per request would be wrong",
    "max_tokens": "use max_output_tokens",
    "min_tokens": "use decoder.min_new_tokens",
    "ignore_eos": "use measurement.length_mode",
    "seed": "use random_seed",
    "output_kind": "pytest-llem times every token",
    **{name: f"use decoder.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
}


def unmet_by_vllm(config: ExperimentConfig, packages: Packages = THIS_ENVIRONMENT) -> Iterator[str]:
    """Yield why an experiment of the engine ``vllm``, or of a subclass of it, cannot run in *packages*."""
    if not packages.has("vllm"):
        yield f"engine 'vllm' needs vLLM: {packages.pip} install vllm"
    options = config.vllm
    if options is None:
        return
    if options.beam_search is not None:
        yield f"{config.backend}.beam_search is not supported: leave it out"
    for section, given, fields in (
        ("engine", options.engine, ENGINE_FIELDS),
        ("sampling", options.sampling, SAMPLING_FIELDS),
    ):
        for name in given or {}:
            if name in fields:
                yield f"{config.backend}.{section}.{name} cannot be given: {fields[name]}"


def unmet_by_server(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    """Yield why no load can be put on a server."""
    if not packages.has("aiohttp"):
        yield f"backend 'server' needs aiohttp: {packages.pip} install 'pytest-llem[server]'"


def unmet_by_command(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    """Yield why a command cannot run. The command is not run."""
    assert config.command is not None
    [program] = command_values(config, python=sys.executable).fill(config.command.run[:1])
    if "/" not in program and shutil.which(program) is None:
        yield f"command.run: program {program!r} not found in PATH: install it, or give its path"
    if config.passthrough_kwargs:
        yield "passthrough_kwargs: a command has none: write the arguments in command.run"


@dataclass(frozen=True)
class ShippedEngine:
    """An engine of pytest-llem's own.

    Attributes:
        options: Class of its options.
        supports: Abilities of its class, as :func:`pytest_llem.engines.options.abilities` returns them.
        unmet_requirements: Yields why an experiment cannot run in an environment, one sentence for each reason.
        optional_modules: Modules that its experiments, or some of them, need and that may be missing.
        checks_options: Whether only the library that it runs can check its options.
    """

    options: type[EngineOptions]
    supports: frozenset[str]
    unmet_requirements: Callable[[ExperimentConfig, Packages], Iterable[str]]
    optional_modules: tuple[str, ...] = ()
    checks_options: bool = False


SHIPPED = {
    "pytorch": ShippedEngine(
        options=PyTorchConfig,
        supports=frozenset({"model_shape", "prefill_only", "preload"}),
        unmet_requirements=unmet_by_pytorch,
        optional_modules=PYTORCH_OPTIONAL,
    ),
    "vllm": ShippedEngine(
        options=VLLMConfig,
        supports=frozenset({"cache_memory", "prefill_only"}),
        unmet_requirements=unmet_by_vllm,
        optional_modules=("vllm",),
        checks_options=True,
    ),
    "server": ShippedEngine(
        options=ServerConfig,
        supports=frozenset(),
        unmet_requirements=unmet_by_server,
        optional_modules=("aiohttp",),
    ),
    COMMAND: ShippedEngine(
        options=CommandConfig,
        supports=frozenset(),
        unmet_requirements=unmet_by_command,
    ),
}

#: Engines whose options can be checked without importing their libraries.
KNOWN_WHOLLY = {name for name, engine in SHIPPED.items() if not engine.checks_options}

#: Modules that only some experiments need.
OPTIONAL_MODULES = (DATASETS, *(module for engine in SHIPPED.values() for module in engine.optional_modules))


def shipped_needs(config: ExperimentConfig, parameters: int | None = None) -> Needs | None:
    """Return what an experiment needs from its engine, if that is one of pytest-llem's own; else None.

    Args:
        config: The experiment.
        parameters: Number of the model's weights; None if unknown.
    """
    engine = SHIPPED.get(config.backend)
    if engine is None:
        return None
    section = getattr(config, config.backend)
    options = section if isinstance(section, engine.options) else engine.options.from_config(config)
    return replace(options.needs(config, parameters), supports=engine.supports)
