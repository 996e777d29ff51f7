"""Where the outputs of an engine are while a window lasts."""

from __future__ import annotations

from typing import Any


def on_device(value: Any, depth: int = 3) -> bool:
    """Whether *value* is a tensor on a GPU, or holds one.

    Args:
        value: What an engine's ``generate`` returned.
        depth: Containers and objects to look into, one within another.
    """
    if getattr(value, "is_cuda", False) is True:
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        held = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    return any(on_device(one, depth - 1) for one in held)
