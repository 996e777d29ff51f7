"""The size of a model, read from its files and not from the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llem.engines.models import read_header

#: More than anything that is counted in a model.
_NO_MODEL = 10**15


@dataclass(frozen=True)
class Footprint:
    """What a model's memory and time grow with.

    Attributes:
        parameters: Number of weights.
        layers: Number of transformer layers.
        kv_values_per_token: Keys and values of one token over all layers: 2 · layers · KV heads · head size.
        vocabulary: Number of tokens it knows.
    """

    parameters: int
    layers: int
    kv_values_per_token: int
    vocabulary: int


def read_footprint(folder: Path) -> Footprint | None:
    """Return the footprint of the model in *folder*; None where its files do not tell."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return from_config(config, parameters=_count_parameters(folder))
    except (
        Exception,
        RecursionError,
    ):  # anybody's files: whatever they hold, their model's size is not known then
        return None


def from_config(config: Mapping[str, Any], parameters: int | None = None) -> Footprint:
    """Return the footprint of a model of this configuration, named as transformers does.

    Args:
        config: Of a decoder; of a model with several parts, the decoder's is taken.
        parameters: Number of weights; counted for a dense Llama-like model where it is not known.

    Raises:
        KeyError: The configuration lacks what is needed.
        ValueError: It holds what no model has.
    """
    config = text_config(config)
    hidden, layers = _size(config["hidden_size"]), _size(config["num_hidden_layers"])
    heads, vocabulary = _size(config["num_attention_heads"]), _size(config["vocab_size"])
    kv_heads = _size(config.get("num_key_value_heads") or heads)
    head_size = _size(config.get("head_dim") or hidden // heads)
    if parameters is None:
        if any("expert" in name for name in config):
            raise KeyError("number of weights")
        attention = 2 * hidden * head_size * (heads + kv_heads)
        mlp = 3 * hidden * _size(config["intermediate_size"])
        embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        parameters = layers * (attention + mlp + 2 * hidden) + hidden + embeddings
    return Footprint(_size(parameters), layers, 2 * layers * kv_heads * head_size, vocabulary)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that describes the decoder, as transformers' ``get_text_config`` does without its files."""
    parts = (config.get(name) for name in ("decoder", "generator", "text_config"))
    return next((part for part in parts if isinstance(part, Mapping)), config)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 < value < _NO_MODEL:
        raise ValueError(f"no size of a model: {value!r}")
    return value


def _count_parameters(folder: Path) -> int | None:
    """Return the number of weights in the safetensors files of *folder*; None where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    shapes = (tensor["shape"] for file in files for tensor in read_header(file).values())
    return sum(map(math.prod, shapes)) or None
