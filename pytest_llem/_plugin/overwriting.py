"""What a file may take the place of: one like it. A study that is named in its place by mistake stays."""

from __future__ import annotations

from pathlib import Path

#: How ours begin.
PAGE, PLAN = "<!DOCTYPE html>", "{"


def check_overwrite(file: Path, begins: str) -> str | None:
    """Return why *file* is not to be replaced; None where it may be, as it is not there, empty or alike.

    Args:
        file: Where something is to be written.
        begins: How that, and what it may replace, begins.

    Raises:
        OSError: It cannot be read.
    """
    if not file.is_file():
        return None
    with file.open("rb") as there:
        start = there.read(1024).strip()
    if not start or start.lower().startswith(begins.lower().encode()):
        return None
    return f"is something else, and not to be replaced (got '{file}')"
