"""Packages that only some installations have: what needs them, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

#: The packages of each extra of pyproject.toml that something here needs, by the names they are imported by.
EXTRAS = {"report": ("jinja2", "plotly")}


def lacking(extra: str) -> str | None:
    """Return what to say of the packages of *extra* that are not installed; None where all are. Imports none."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install 'pytest-llem[{extra}]'"
