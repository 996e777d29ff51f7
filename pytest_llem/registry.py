"""Find engines and meters by name among the installed entry points."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

ENGINE_GROUP = "pytest_llem.engines"
METER_GROUP = "pytest_llem.meters"


def installed(group: str) -> list[str]:
    """Return the sorted names in an entry-point *group*, without importing them."""
    return list(_installed(group, tuple(sys.path)))


@lru_cache(maxsize=8)  # reads the metadata of every installed distribution
def _installed(group: str, path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load(group: str, name: str) -> Any:
    """Import and return the object that *name* refers to in *group*.

    Args:
        group: The entry-point group.
        name: The name of an entry point, or ``package.module:Class``.

    Raises:
        LookupError: *name* is not installed, or not in the module.
        ImportError: The module cannot be imported.
    """
    if ":" in name:
        return _attribute(name)
    found = [point for point in entry_points(group=group) if point.name == name]
    if not found:
        raise LookupError(f"{name!r} is not installed (there are: {', '.join(installed(group))})")
    return _attribute(found[0].value)


def _attribute(name: str) -> Any:
    """Return what ``package.module:Class`` names."""
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise LookupError(f"expected package.module:Class (got {name!r})")
    try:
        module = import_module(module_name)
    except ImportError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ImportError(f"{module_name} raises {type(error).__name__}: {error}") from error
    found: Any = module
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            # The file, since a module of the same name may come first in sys.path. Namespace packages have none.
            raise LookupError(f"there is no {attribute!r} in {getattr(module, '__file__', None) or module_name}")
        found = getattr(found, attribute)
    return found


def missing_report_extra() -> str | None:
    """Return an error message if packages of the extra ``report`` are not installed, else None.

    Nothing is imported.
    """
    missing = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install 'pytest-llem[report]'"
