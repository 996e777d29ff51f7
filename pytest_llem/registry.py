"""Engines and meters by name, ours and anyone's, from entry points."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

BACKENDS = "pytest_llem.backends"
METERS = "pytest_llem.energy"


def installed(group: str) -> list[str]:
    """Return the names in an entry-point *group*, sorted; nothing is imported."""
    return list(_installed(group, tuple(sys.path)))


@lru_cache(maxsize=8)  # it reads the metadata of everything that is installed
def _installed(group: str, path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load(group: str, name: str) -> Any:
    """Import and return what *name* stands for in *group*.

    Raises:
        LookupError: Nothing of that name is installed.
        ImportError: It is, and cannot be imported.
    """
    found = [point for point in entry_points(group=group) if point.name == name]
    if not found:
        raise LookupError(f"{name!r} is not installed (there are: {', '.join(installed(group))})")
    return found[0].load()
