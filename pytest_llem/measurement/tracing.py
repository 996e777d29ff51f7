"""Tools that watch each call or line of Python, and slow it down."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any


def active_tracer() -> str | None:
    """Return what traces Python in this thread, in words; None where nothing does.

    Coverage, debuggers and profilers reach an experiment's process too, if they follow subprocesses.
    """
    for what, hook in (("trace function", sys.gettrace()), ("profile function", sys.getprofile())):
        if hook is not None:
            kind = hook if hasattr(hook, "__qualname__") else type(hook)
            return f"a {what} is set ({kind.__module__}.{kind.__qualname__})"
    monitoring: Any = getattr(sys, "monitoring", None)  # since Python 3.12
    for tool in range(6) if monitoring is not None else ():
        if (name := monitoring.get_tool(tool)) is not None and monitoring.get_events(tool):
            return f"sys.monitoring is in use ({name})"
    return "tracemalloc is on" if tracemalloc.is_tracing() else None
