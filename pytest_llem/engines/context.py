"""How many tokens a model can take, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What configurations of transformers call it. Models without one (ALiBi, recurrent ones) have no limit.
_NAMES = ("max_position_embeddings", "n_positions")

#: Ways to scale rotary embeddings whose factor comes on top of what is stated; for others it is part of it.
_STRETCHED = ("linear", "dynamic", "yarn")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens of prompt and answer together; None where its configuration states no limit.

    Args:
        config: As in ``config.json``, of the part that is the language model where a model has several.
    """
    stated = next((config[name] for name in _NAMES if type(config.get(name)) is int), 0)
    if stated <= 0:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    length = stated
    for one in (rope, *rope.values()):  # of a layer's type each, in some
        if isinstance(one, dict) and (one.get("rope_type") or one.get("type")) in _STRETCHED:
            original = one.get("original_max_position_embeddings") or stated
            length = max(length, int(original * (one.get("factor") or 1)))
    return length


def too_long(model: str, prompt: int, output: int, limit: int) -> str:
    """Return why a prompt does not fit, and what to do.

    Args:
        model: Its name in the study.
        prompt: Tokens of the prompt.
        output: Tokens to generate.
        limit: The model's :func:`context_length`.
    """
    return (
        f"model {model!r} takes {limit:,} tokens, and a prompt of {prompt:,} with max_output_tokens {output:,} is "
        f"{prompt + output:,}: lower max_input_tokens or max_output_tokens, or name a model with a longer context"
    )
