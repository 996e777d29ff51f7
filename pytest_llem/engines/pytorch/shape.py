"""Determine the shape of a transformers decoder: the sizes from which FLOPs and bytes of a token are computed.

They are found in its modules, and by running one token through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.pytorch_utils import Conv1D

from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.protocol import ModelShape, ShapeUnknownError
from pytest_llem.engines.pytorch import generation, loading, placement
from pytest_llem.engines.tokenizer import text_config

#: Accepted relative difference between counted and computed FLOPs of a token. The latter omit rotary embeddings.
TOLERANCE = 0.01

_NOT_STANDARD = "its attention is not the standard one of queries, keys and values"


def uncounted_reason(options: GenerationConfig) -> str | None:
    """Return why FLOPs or bytes of ``generate`` do not follow from prompts and answers; None if they do."""
    mode = options.get_generation_mode()
    if mode == GenerationMode.ASSISTED_GENERATION:
        return "speculative decoding computes drafts that are thrown away"
    if mode not in generation.ONE_PASS_PER_TOKEN:
        return f"{mode.value.replace('_', ' ')} computes more than its answers show"
    if options.guidance_scale not in (None, 1):
        return "guidance runs every token through the model twice"
    if options.use_cache is False:
        return "without a cache every step computes its whole context again"
    if options.cache_implementation == "quantized":
        return "the bytes that a quantised cache takes are not known"
    return None


def model_shape(model: Any) -> ModelShape:
    """Return the shape of *model*, a decoder on one device.

    Raises:
        ShapeUnknownError: Its FLOPs do not follow from linear layers and attention.
    """
    if loading.quantisation_of(model) is not None:
        raise ShapeUnknownError("the weights are quantised")
    config = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ShapeUnknownError("the model is an encoder and a decoder")
    if any("expert" in name and value for name, value in config.to_dict().items()):
        raise ShapeUnknownError("a mixture of experts computes with a part of its weights")
    weights = list(model.parameters())
    if len({weight.device for weight in weights}) > 1 or weights[0].device.type == "meta":
        raise ShapeUnknownError("the model is spread over several devices, or offloaded")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ShapeUnknownError("the model has no head of one linear layer")

    linear, looked_up = _linear(model, head), _looked_up(model, head)
    counted, layers = _one_token(model)
    widths = [_width(layer, getattr(config, "num_attention_heads", None)) for layer in layers]
    if not layers or len(layers) != getattr(config, "num_hidden_layers", None):
        raise ShapeUnknownError("not every layer keeps keys and values of its own")
    shape = ModelShape(
        parameters=sum(weight.numel() for weight in linear),
        head_parameters=head.weight.numel(),
        attention_width=sum(widths),
        kv_values_per_token=sum(layer.keys.numel() + layer.values.numel() for layer in layers),
        kv_bytes_per_value=layers[0].keys.element_size(),
        weight_bytes=sum(one.numel() * one.element_size() for one in weights if id(one) not in looked_up),
        precision=_precision([*linear, head.weight]),
        sliding_window=min((layer.sliding_window for layer in layers if layer.is_sliding), default=None),
    )
    min_flops = 2 * (shape.parameters + shape.head_parameters)
    max_flops = min_flops + 4 * shape.attention_width  # torch does not count every attention kernel
    if not (1 - TOLERANCE) * min_flops <= counted <= (1 + TOLERANCE) * max_flops:
        raise ShapeUnknownError(f"a token takes {counted:,} FLOPs, but {min_flops:,} by its linear layers")
    return shape


def _linear(model: Any, head: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights of the linear layers except the head. Every other matrix must be an embedding."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            found += [module.weight] if module is not head else []
        elif not isinstance(module, torch.nn.Embedding) and any(
            weight.dim() > 1 for weight in module.parameters(recurse=False)
        ):
            raise ShapeUnknownError(f"{type(module).__name__} is neither a linear layer nor an embedding")
    return found


def _looked_up(model: Any, head: torch.nn.Module) -> set[int]:
    """Return the ``id()`` of the weights of embeddings of which a step reads only a few rows."""
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return {id(one.weight) for one in embeddings} - {id(weight) for weight in head.parameters()}


def _precision(weights: list[torch.Tensor]) -> str:
    kinds = {weight.dtype for weight in weights}
    if len(kinds) > 1:
        raise ShapeUnknownError(f"the weights are of several types: {', '.join(sorted(map(str, kinds)))}")
    (kind,) = kinds
    if kind == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return loading.PRECISIONS.get(kind, str(kind).removeprefix("torch."))


def _one_token(model: Any) -> tuple[int, list[Any]]:
    """Run a token through *model*. Return its FLOPs, and its entry in each layer's KV cache."""
    token = torch.zeros((1, 1), dtype=torch.long, device=placement.input_device(model))
    try:
        # Plain matrix products for attention: torch does not count kernels with fewer KV heads than query heads.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
            # The class's forward: the model's may be compiled, and would be recompiled for this shape.
            output = type(model).forward(model, input_ids=token, use_cache=True)
        # Since transformers 5.24 the output warns of its older name.
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        return counter.get_total_flops(), list(cache.layers)
    except Exception as error:  # a model may have code of its own; the measurement is already complete
        raise ShapeUnknownError(f"a token cannot be run through the model: {one_line(error)}") from error


def _width(layer: Any, heads: Any) -> float:
    """Return query heads · head size of a layer, from its KV cache for one token: [1, KV heads, 1, head size]."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or not isinstance(heads, int):
        raise ShapeUnknownError(_NOT_STANDARD)
    known = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3]
    if not known or (keys.shape[0], keys.shape[2]) != (1, 1) or heads % keys.shape[1]:
        raise ShapeUnknownError(_NOT_STANDARD)
    return float(heads * (keys.shape[3] + values.shape[3]) / 2)
