"""Find why an experiment of the engine ``pytorch`` cannot run, without importing torch."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llem.engines.packages import THIS_ENVIRONMENT, Packages
from pytest_llem.study.config import DecoderConfig, ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig

#: Attention kernels and the packages of which one must be installed, each as module and pip name. If ``kernels``
#: is installed, transformers downloads a kernel from the hub.
ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
}

#: Packages that quantise a cache, as module and pip name, by backend in transformers' ``cache_config``.
CACHES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}

#: Modules that only some experiments need.
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    *(module for module, _ in CACHES.values()),
    *(module for kernels in ATTENTION.values() for module, _ in kernels),
)

#: Arguments of transformers' GenerationConfig that a field of the study sets.
FIELDS = {
    "max_new_tokens": "max_output_tokens",
    "max_length": "max_output_tokens",
    "min_length": "decoder.min_new_tokens",
    "compile_config": "pytorch.torch_compile",
    **{name: f"decoder.{name}" for name in DecoderConfig.model_fields},
    **{name: f"pytorch.{name}" for name in PyTorchConfig.model_fields},
}

_MODEL = "the model and measurement.length_mode set it"
_ENDS = "it would end sequences without an end token, and token counts would be wrong; use max_output_tokens"
_NOT_KEPT = "its output would be discarded"

#: Arguments that only the engine can set, and why.
SET_BY_ENGINE = {
    "num_return_sequences": "every prompt must have one answer, or metrics per request would be wrong",
    "eos_token_id": _MODEL,
    "pad_token_id": _MODEL,
    "bos_token_id": _MODEL,
    "max_time": _ENDS,
    "stop_strings": _ENDS,
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
        _NOT_KEPT,
    ),
}


def unmet_requirements(config: ExperimentConfig, packages: Packages = THIS_ENVIRONMENT) -> list[str]:
    """Return why *config* cannot run: one sentence for each problem, with what to do.

    Nothing is imported. Problems that depend on the model or on transformers are reported when the engine loads.

    Args:
        config: An experiment of the engine ``pytorch``.
        packages: The environment in which it will run.
    """
    return list(_unmet(config, config.pytorch or PyTorchConfig(), packages))


def _unmet(config: ExperimentConfig, options: PyTorchConfig, packages: Packages) -> Iterator[str]:
    if options.num_processes > 1:
        yield f"pytorch.num_processes {options.num_processes} is not supported yet: leave it at 1"
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name):
            yield from _missing(packages, f"pytorch.{name}", "bitsandbytes", "accelerate")
    if options.device_map is not None:
        yield from _missing(packages, "pytorch.device_map", "accelerate")
    if options.cache_implementation == "paged":
        batching = "is for continuous batching, which is not supported: leave it out"
        yield f"pytorch.cache_implementation 'paged' {batching}"
    if options.cache_implementation == "quantized":
        yield from _quantised_cache(config, packages)
    attention = options.attn_implementation or ""
    if attention.startswith("paged|"):
        yield f"pytorch.attn_implementation {attention!r} is for continuous batching, which is not supported"
    kernels = ATTENTION.get(attention, (("kernels", "kernels"),) if "/" in attention else ())
    if kernels and not any(packages.has(module) for module, _ in kernels):
        either = " or ".join(package for _, package in kernels)
        yield f"pytorch.attn_implementation {attention!r} needs {either}: {packages.pip} install {kernels[0][1]}"
    for name in config.passthrough_kwargs or {}:
        if name in FIELDS:
            yield f"passthrough_kwargs.{name}: use {FIELDS[name]}"
        elif name in SET_BY_ENGINE:
            yield f"passthrough_kwargs.{name} cannot be given: {SET_BY_ENGINE[name]}"


def _quantised_cache(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    settings = (config.passthrough_kwargs or {}).get("cache_config")
    backend = settings.get("backend", "quanto") if isinstance(settings, dict) else "quanto"
    module, package = CACHES.get(backend, (None, None))
    if module is not None and not packages.has(module):
        yield f"pytorch.cache_implementation 'quantized' needs {package}: {packages.pip} install {package}"


def _missing(packages: Packages, field: str, *names: str) -> Iterator[str]:
    absent = [name for name in names if not packages.has(name)]
    if absent:
        yield f"{field} needs {' and '.join(absent)}: {packages.pip} install {' '.join(absent)}"
