"""Determine how many tokens fit into a model's context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Names of the context length in configurations of transformers. Models without one, such as recurrent ones and
#: those with ALiBi, have no limit.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions")

#: Scalings of rotary embeddings whose factor multiplies the stated length. For others the length includes it.
_SCALED = ("linear", "dynamic", "yarn")

#: Model types whose stated length includes the factor of every scaling.
_INCLUDED = ("gemma3", "gemma3_text")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens of prompt and answer together; None if the configuration has no limit.

    Args:
        config: Content of ``config.json``. For a model of several parts, the language model's part.
    """
    stated = next((config[name] for name in _LENGTH_KEYS if type(config.get(name)) is int), 0)
    if stated <= 0:
        return None
    if config.get("model_type") in _INCLUDED:
        return stated
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    length = stated
    for one in (rope, *rope.values()):  # some models have one entry for each type of layer
        if isinstance(one, dict) and (one.get("rope_type") or one.get("type")) in _SCALED:
            original = one.get("original_max_position_embeddings") or stated
            length = max(length, int(original * (one.get("factor") or 1)))
    return length


def too_long(model: str, prompt: int, output: int, limit: int) -> str:
    """Return the error message for a prompt that exceeds the model's context.

    Args:
        model: The model's name in the study.
        prompt: Tokens of the prompt.
        output: Tokens to generate.
        limit: The model's :func:`context_length`.
    """
    return (
        f"model {model!r} takes {limit:,} tokens, and a prompt of {prompt:,} with max_output_tokens {output:,} is "
        f"{prompt + output:,}: lower max_input_tokens or max_output_tokens, or name a model with a longer context"
    )
