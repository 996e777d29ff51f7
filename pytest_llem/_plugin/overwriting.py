"""Refuse to overwrite files of another kind, such as a study given as an output file by mistake."""

from __future__ import annotations

from pathlib import Path

#: First characters of an HTML report and of a plan.
PAGE, PLAN = "<!DOCTYPE html>", "{"


def check_overwrite(file: Path, begins: str) -> str | None:
    """Return why *file* must not be overwritten; None if it is missing, empty or of the same kind.

    Args:
        file: Output file.
        begins: First characters of files of its kind.

    Raises:
        OSError: *file* cannot be read.
    """
    if not file.is_file():
        return None
    with file.open("rb") as existing:
        start = existing.read(1024).strip()
    if not start or start.lower().startswith(begins.lower().encode()):
        return None
    return f"exists with other content and is not overwritten (got '{file}')"
