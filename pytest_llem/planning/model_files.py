"""Find out, without loading a model, whether it is on this machine, its size, and its context length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pytest_llem.engines.models import context_length, model_damage, read_header, resolve_model
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.engines.tiny_llama import BUILTIN_NAME, SHAPE
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.server import SERVER

#: Upper bound of any count in a model's configuration.
_MAX_COUNT = 10**15


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model that determine its memory and time.

    Attributes:
        parameters: Number of weights.
        layers: Number of transformer layers.
        kv_values_per_token: Keys and values of one token over all layers: 2 · layers · KV heads · head size.
        vocabulary: Number of tokens in the vocabulary.
    """

    parameters: int
    layers: int
    kv_values_per_token: int
    vocabulary: int


@cache
def model_problem(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str | None:
    """Return why a model is not on this machine and cannot be downloaded, or is damaged; None if it is usable."""
    try:
        source = resolve_model(name, model_path, revision, download=False)
        return model_damage(name, source)
    except ModelNotFoundError as error:
        return str(error)


@cache
def is_on_hub(name: str, revision: str | None, model_path: tuple[Path, ...]) -> bool:
    """Return whether a model is from the Hugging Face hub, cached or not."""
    with suppress(ModelNotFoundError):
        return resolve_model(name, model_path, revision, download=False).kind == "hub"
    return False


@cache
def _footprint(name: str, revision: str | None, model_path: tuple[Path, ...]) -> Footprint | None:
    if name == BUILTIN_NAME:
        return from_config(SHAPE)
    folder = _folder(name, revision, model_path)
    return read_footprint(folder) if folder else None


@cache
def context_length_of(name: str, revision: str | None, model_path: tuple[Path, ...]) -> int | None:
    """Return the maximum number of tokens of a model's prompt and output; None if it is unknown."""
    if name == BUILTIN_NAME:
        return context_length(SHAPE)
    folder = _folder(name, revision, model_path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
        return context_length(text_config(config))
    except (OSError, ValueError, TypeError, AttributeError):  # loading the model reports an invalid configuration
        return None


def _folder(name: str, revision: str | None, model_path: tuple[Path, ...]) -> Path | None:
    """Return the folder of a model; None if the model is not on this machine."""
    try:
        return resolve_model(name, model_path, revision, download=False).folder
    except ModelNotFoundError:
        return None


def footprint_of(config: ExperimentConfig, model_path: tuple[Path, ...]) -> Footprint | None:
    """Return the size of an experiment's model; None if unknown."""
    if config.model is None or config.backend == SERVER:  # a server's memory and time are not estimated
        return None
    stated = shipped_needs(config)
    return _footprint(config.model, stated.model_revision if stated else None, model_path)


def read_footprint(folder: Path) -> Footprint | None:
    """Return the footprint of the model in *folder*; None if it cannot be determined from the files."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return from_config(config, parameters=_count_parameters(folder))
    except Exception:  # a user's files may hold anything
        return None


def from_config(config: Mapping[str, Any], parameters: int | None = None) -> Footprint:
    """Return the footprint of a model with a transformers configuration.

    Args:
        config: Configuration of a decoder, or of a model with several parts, of which one is the decoder.
        parameters: Number of weights. If None, it is computed as for a dense Llama-like model.

    Raises:
        KeyError: A needed key is missing.
        ValueError: A value is not a valid size.
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
    """Return the decoder's part of a configuration, as transformers' ``get_text_config`` does."""
    parts = (config.get(name) for name in ("decoder", "generator", "text_config"))
    return next((part for part in parts if isinstance(part, Mapping)), config)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 < value < _MAX_COUNT:
        raise ValueError(f"not a valid size in a model's configuration: {value!r}")
    return value


def _count_parameters(folder: Path) -> int | None:
    """Return the number of weights in the safetensors files of *folder*; None if there are no such files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    shapes = (tensor["shape"] for file in files for tensor in read_header(file).values())
    return sum(map(math.prod, shapes)) or None
