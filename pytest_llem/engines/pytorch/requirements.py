"""What keeps an experiment of the engine ``pytorch`` from running, known without loading torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from pytest_llem.study.config import DecoderConfig, ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig

LORA = "lora is not supported yet: leave it out, or name a model with the adapter merged into it"

#: Attention kernels and the packages of which one has to be there: by module, and as pip calls it. transformers
#: takes a kernel from the hub where ``kernels`` is installed.
ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
}

#: What quantises a cache, by the name of the backend in transformers' ``cache_config``, likewise.
CACHES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}

#: What reads datasets of the Hugging Face hub, whatever the engine.
DATASETS = "datasets"

#: Modules of packages that only some experiments need, here or in another interpreter.
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    DATASETS,
    *(module for module, _ in CACHES.values()),
    *(module for kernels in ATTENTION.values() for module, _ in kernels),
)

#: Arguments of transformers' GenerationConfig that a field of another name decides.
FIELDS = {
    "max_new_tokens": "max_output_tokens",
    "max_length": "max_output_tokens",
    "min_length": "decoder.min_new_tokens",
    "compile_config": "pytorch.torch_compile",
    **{name: f"decoder.{name}" for name in DecoderConfig.model_fields},
    **{name: f"pytorch.{name}" for name in PyTorchConfig.model_fields},
}

_MODEL = "the model and measurement.length_mode decide it"
_ENDS = "it would end sequences where token counts cannot see it; max_output_tokens limits their length"
_NOT_KEPT = "nothing of it would be kept"

#: Those that the engine has to decide itself, and why.
OWN = {
    "num_return_sequences": "every prompt has one answer, or figures per request would be wrong",
    "eos_token_id": _MODEL,
    "pad_token_id": _MODEL,
    "bos_token_id": _MODEL,
    "max_time": _ENDS,
    "stop_strings": _ENDS,
    "token_healing": "it would change the prompts",
    "is_assistant": "the model drafts for no other",
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


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # nor is the package that it would be in
        return False


@dataclass(frozen=True)
class Packages:
    """The environment that an experiment runs in.

    Attributes:
        has: Whether it has one of the OPTIONAL modules.
        pip: The command that installs into it.
    """

    has: Callable[[str], bool] = _is_here
    pip: str = "pip"


HERE = Packages()


def unmet(config: ExperimentConfig, packages: Packages = HERE) -> list[str]:
    """Return what keeps *config* from running, a sentence each, with what to do about it.

    Nothing is imported for it: what is only found to be wrong with the model at hand, or by transformers, is told
    when the engine loads.

    Args:
        config: An experiment of the engine ``pytorch``.
        packages: Of the environment that it is to run in.
    """
    return list(_unmet(config, config.pytorch or PyTorchConfig(), packages))


def _unmet(config: ExperimentConfig, options: PyTorchConfig, packages: Packages) -> Iterator[str]:
    if config.lora is not None:
        yield LORA
    if options.num_processes > 1:
        yield f"pytorch.num_processes {options.num_processes} is not supported yet: leave it at 1"
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name):
            yield from _missing(packages, f"pytorch.{name}", "bitsandbytes", "accelerate")
    if options.device_map is not None:
        yield from _missing(packages, "pytorch.device_map", "accelerate")
    if options.cache_implementation == "paged":
        yield "pytorch.cache_implementation 'paged' batches by itself, which is not supported: leave it out"
    if options.cache_implementation == "quantized":
        yield from _quantised_cache(config, packages)
    attention = options.attn_implementation or ""
    if attention.startswith("paged|"):
        yield f"pytorch.attn_implementation {attention!r} is for batches of its own, which are not supported"
    kernels = ATTENTION.get(attention, (("kernels", "kernels"),) if "/" in attention else ())
    if kernels and not any(packages.has(module) for module, _ in kernels):
        either = " or ".join(package for _, package in kernels)
        yield f"pytorch.attn_implementation {attention!r} needs {either}: {packages.pip} install {kernels[0][1]}"
    for name in config.passthrough_kwargs or {}:
        if name in FIELDS:
            yield f"passthrough_kwargs.{name}: use {FIELDS[name]}"
        elif name in OWN:
            yield f"passthrough_kwargs.{name} cannot be given: {OWN[name]}"


def _quantised_cache(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    told = (config.passthrough_kwargs or {}).get("cache_config")
    backend = told.get("backend", "quanto") if isinstance(told, dict) else "quanto"
    module, package = CACHES.get(backend, (None, None))
    if module is not None and not packages.has(module):
        yield f"pytorch.cache_implementation 'quantized' needs {package}: {packages.pip} install {package}"


def _missing(packages: Packages, field: str, *names: str) -> Iterator[str]:
    absent = [name for name in names if not packages.has(name)]
    if absent:
        yield f"{field} needs {' and '.join(absent)}: {packages.pip} install {' '.join(absent)}"
