"""Load a transformers model with an experiment's settings, check it, and find the settings that are in effect."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from pytest_llem.engines.library_errors import library_errors_as_preflight, one_line
from pytest_llem.engines.models import ModelSource, resolve_model
from pytest_llem.engines.protocol import EngineContext, ModelNotFoundError, PreflightError
from pytest_llem.engines.pytorch.placement import device_id, device_map, input_device
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.problems import did_you_mean

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


def origin(options: PyTorchConfig) -> dict[str, Any]:
    """Return the arguments of every ``from_pretrained`` call: revision, and whether the model's code may run."""
    revision = {"revision": options.revision} if options.revision else {}
    return {**revision, "trust_remote_code": options.trust_remote_code}


def import_class(source: ModelSource, options: PyTorchConfig) -> None:
    """Import the model's class, so that the load time excludes it. Errors are ignored: loading reports them."""
    with suppress(Exception):
        config = AutoConfig.from_pretrained(source.location, **origin(options))
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def preload_classes(config: ExperimentConfig, context: EngineContext) -> None:
    """Import the classes of a model and its tokenizer if its files are local and have no code of their own."""
    options = config.pytorch or PyTorchConfig()
    if options.trust_remote_code:
        return
    with suppress(ModelNotFoundError):
        source = resolve_model(config.model_name, context.model_path, options.revision, download=False)
        folder = source.folder
        if folder is not None and folder.is_dir():
            import_class(ModelSource(str(folder), "local"), PyTorchConfig())
            with suppress(Exception):
                name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
                tokenizer_class_from_name(name)
        elif source.kind == "builtin":  # generated later
            MODEL_FOR_CAUSAL_LM_MAPPING.get(LlamaConfig, None)


def main_dtype(model: Any) -> torch.dtype:
    """Return the data type of most of a model's weights that are floating-point numbers."""
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=model.dtype)


def load_model(source: ModelSource, config: ExperimentConfig, device: torch.device) -> Any:
    """Return the model, ready to run.

    Args:
        source: Where the model was found.
        config: The experiment.
        device: The model's device, unless ``device_map`` or bitsandbytes choose it.

    Raises:
        PreflightError: The model cannot be loaded with these settings.
    """
    options = config.pytorch or PyTorchConfig()
    wanted = origin(options) | {"dtype": DTYPES[config.precision]}
    if options.attn_implementation:
        wanted["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit or options.load_in_8bit:
        wanted["quantization_config"] = _quantisation(options)
    if options.device_map is not None:
        wanted["device_map"] = device_map(options)
    if options.max_memory:
        wanted["max_memory"] = {device_id(key): size for key, size in options.max_memory.items()}
    with library_errors_as_preflight(f"model {config.model!r} cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source.location,
            ignore_mismatched_sizes=True,  # check_weights reports them: transformers would not name the weight
            output_loading_info=True,
            **wanted,
        )
    check_weights(config.model_name, model, found)
    if isinstance(options.device_map, dict):
        check_modules(model, options.device_map, config.backend)
    # bitsandbytes has placed its model, which cannot be moved.
    if "device_map" not in wanted and not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        model = model.to(device)
    model.eval()
    check_causal(config.model_name, model)
    if how := compile_settings(options):
        _compile(model, how, config.backend)
    return model


def _quantisation(options: PyTorchConfig) -> BitsAndBytesConfig:
    names = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return BitsAndBytesConfig(load_in_4bit=options.load_in_4bit, load_in_8bit=options.load_in_8bit, **given)


def quantisation_of(model: Any) -> dict[str, Any] | None:
    """Return the quantisation settings of *model*; None if it is not quantised."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    found = json.loads(config.to_json_string(use_diff=False))
    if found.get("quant_method") == "bitsandbytes":  # the settings for the other number of bits have no effect
        other = "bnb_4bit" if found.get("load_in_8bit") else "llm_int8"
        found = {name: value for name, value in found.items() if not name.startswith((other, "_"))}
    assert isinstance(found, dict)
    return found


def constants(model: Any) -> list[torch.Tensor]:
    """Return the quantisation constants of *model*, which bitsandbytes keeps as neither parameters nor buffers.

    Empty if bitsandbytes has quantised no layer.
    """
    tensors: list[torch.Tensor | None] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # With 8 bits, they belong to the weight until the layer has run, and then to the layer's state.
        tensors += [getattr(holder, "SCB", None) for holder in (weight, getattr(module, "state", None))]
        state = getattr(weight, "quant_state", None)
        while state is not None:  # with double quantisation, the constants are quantised, too
            tensors += [state.absmax, state.code]
            state = getattr(state, "state2", None)
    return [one for one in tensors if one is not None]


def compile_settings(options: PyTorchConfig) -> dict[str, str] | None:
    """Return mode and backend of ``torch.compile``; None if the model is not compiled."""
    if not options.torch_compile:
        return None
    return {
        "mode": options.torch_compile_mode or "default",
        "backend": options.torch_compile_backend or "inductor",
    }


def check_compiler(options: PyTorchConfig, section: str, gpus: Sequence[int]) -> None:
    """Check that the C++ compiler that ``torch.compile`` may need is installed.

    Args:
        options: Options of the engine.
        section: Their section in the study, for messages.
        gpus: Indices of the GPUs that the model may use.

    Raises:
        PreflightError: It is not installed.
    """
    how = compile_settings(options)
    if how is None or how["backend"] != "inductor" or gpus:  # torch includes the compiler for GPUs
        return
    compiler = os.environ.get("CXX", "g++")  # inductor's own rule
    if shutil.which(compiler) is None:
        raise PreflightError(
            f"{section}.torch_compile needs a C++ compiler, and there is no {compiler}: install one"
        )


def _compile(model: Any, how: dict[str, str], section: str) -> None:
    try:
        model.forward = torch.compile(model.forward, mode=how["mode"], backend=how["backend"])
    except RuntimeError as error:  # an unknown mode or backend
        raise PreflightError(f"{section}.torch_compile: {one_line(error)}") from error


#: Accepted relative difference, due to rounding, of a token's logits when only later tokens differ.
CAUSAL_TOLERANCE = 1e-3


def check_weights(name: str, model: Any, found: Mapping[str, Collection[Any]]) -> None:
    """Check that the weights of *model* are from its files: transformers initialises missing ones at random.

    Warns of missing and of unused weights. If some are missing, the model is marked as having random weights.

    Args:
        name: The model's name in the study.
        model: The loaded model.
        found: transformers' loading info.

    Raises:
        PreflightError: None of its weights is in the files, or some have another shape.
    """
    architecture = type(model).__name__
    if mismatched := sorted(found["mismatched_keys"]):
        weight, given, expected = mismatched[0]
        raise PreflightError(
            f"model {name!r} cannot be loaded: its files have {_count(mismatched)} of another shape than "
            f"config.json: {weight} is {_shape(given)} and not {_shape(expected)}"
        )
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    parameters = {parameter for parameter, _ in model.named_parameters()}
    if parameters and parameters <= set(missing):
        held = f", which hold {_some(unused)}" if unused else ""
        raise PreflightError(
            f"model {name!r} cannot be loaded: none of the {len(parameters)} weights of {architecture} is in its "
            f"files{held}: check that config.json names the architecture of the weights in them"
        )
    if missing:
        model.config.random_weights = True
        warnings.warn(
            f"the files of model {name!r} are missing {_count(missing)} of {architecture}, now random: "
            f"{_some(missing)}",
            stacklevel=2,
        )
    if unused:
        warnings.warn(
            f"the files of model {name!r} have {_count(unused)} that {architecture} does not use: {_some(unused)}",
            stacklevel=2,
        )


def _count(weights: Sequence[Any]) -> str:
    return f"{len(weights)} weight{'s' * (len(weights) > 1)}"


def _some(weights: Sequence[str]) -> str:
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return ", ".join(weights[:3]) + more


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def check_causal(name: str, model: Any) -> None:
    """Check that no token of *model* depends on later ones: transformers also loads encoders, with a warning.

    If neither the configuration nor a layer says that the model is causal, two prompts that differ in their last
    token are run. This is needed for GPT-NeoX models, which are decoders and do not say so.

    Raises:
        PreflightError: The model is an encoder.
    """
    config = model.config
    is_decoder = getattr(config, "is_decoder", getattr(config, "causal", True))  # "causal" is XLM's name for it
    if is_decoder or any(getattr(module, "is_causal", False) for module in model.modules()):
        return
    try:
        prompts = torch.tensor([[5, 6], [5, 7]], device=input_device(model))
        with torch.inference_mode():
            first, second = model(input_ids=prompts).logits[:, 0].float()
    except Exception:  # a model may have code of its own; an error will be reported when it generates
        return
    if (first - second).abs().max() > CAUSAL_TOLERANCE * first.abs().max():
        raise PreflightError(
            f"model {name!r} is an encoder ({type(model).__name__}), whose tokens depend on later ones: name a "
            "decoder, or set is_decoder: true in its config.json if it was trained as one"
        )


def check_modules(model: Any, places: Mapping[str, int | str], section: str) -> None:
    """Check that *model* has the modules that *places* names: transformers ignores unknown ones.

    Args:
        model: The loaded model.
        places: Devices by module, from ``device_map``.
        section: Section of ``device_map`` in the study, for messages.

    Raises:
        PreflightError: The model has no module of that name.
    """
    known = (*dict(model.named_modules()), *dict(model.named_parameters()))
    for name in places:
        if name not in known:
            hint = did_you_mean(name, known)
            raise PreflightError(f"{section}.device_map: {type(model).__name__} has no module {name!r}{hint}")
