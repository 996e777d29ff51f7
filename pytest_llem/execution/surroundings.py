"""What an experiment's process takes over from the one of pytest that starts it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def import_path(config: pytest.Config) -> list[Path]:
    """Return where an engine of the user's own is looked for, whatever the interpreter."""
    try:
        own = config.getini("pythonpath")
    except ValueError:  # its plugin is switched off
        own = []
    return [config.rootpath, *own]


def controller(config: pytest.Config) -> int | None:
    """Return the process of xdist's controller, where this is a worker on the same machine."""
    found: int | None = getattr(config, "workerinput", {}).get("llem_controller")
    return found
