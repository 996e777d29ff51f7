"""Refuse to overwrite files of another kind, such as a study given as an output file by mistake."""

from __future__ import annotations

import os
from pathlib import Path

#: First characters of an HTML report and of a plan.
PAGE, PLAN = "<!DOCTYPE html>", "{"


def check_overwrite(file: Path, prefix: str) -> str | None:
    """Return why *file* must not be overwritten; None unless it is a file with content of another kind.

    Args:
        file: Output file.
        prefix: First characters of files of its kind.

    Raises:
        OSError: *file* cannot be read.
    """
    if not file.is_file():
        return None
    with file.open("rb") as existing:
        start = existing.read(1024).strip()
    if not start or start.lower().startswith(prefix.lower().encode()):
        return None
    return f"exists with other content and is not overwritten (got '{file}')"


def check_page(file: Path) -> str | None:
    """Return why an HTML page must not be written to *file*, such as a device; None if it may.

    Raises:
        OSError: *file* cannot be read.
    """
    if file.exists() and not file.is_file():
        return f"must be a file (got '{file}')"
    return check_overwrite(file, PAGE)


def check_html(file: Path) -> None:
    """Check, before anything runs, that an HTML report can be written to *file*.

    Raises:
        pytest.UsageError: *file* cannot be written, or a package that the report needs is not installed.
    """
    import pytest  # not for the command llem

    from pytest_llem.registry import missing_report_extra

    if (missing := missing_report_extra()) is not None:
        raise pytest.UsageError(f"--llem-html: {missing}")
    try:
        if (problem := check_page(file)) is not None:
            raise pytest.UsageError(f"--llem-html: {problem}")
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            raise pytest.UsageError(f"--llem-html: '{folder}' is not a directory")
    except OSError as error:
        raise pytest.UsageError(f"--llem-html: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise pytest.UsageError(f"--llem-html: '{folder}' cannot be written to")
