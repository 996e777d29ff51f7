"""Collect the warnings of libraries while an experiment runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

#: Maximum number of warnings in a result, and of characters of each.
MAX_WARNINGS, MAX_CHARACTERS = 20, 600

#: Categories for users of a program, not for its developers.
_FOR_USERS = (UserWarning, RuntimeWarning)

#: A package whose warnings are about downloads and accounts, not about the measurement.
_DOWNLOADS = "huggingface_hub"

#: Marks transformers' table of missing and unused weights, which the engine reports in one line.
_REPORTED_BY_ENGINE = "LOAD REPORT"


@contextmanager
def library_warnings() -> Iterator[list[str]]:
    """Yield a list that grows with log records of level WARNING or higher, and Python warnings for users.

    Each text is in the list once, as one line. Logging and warnings still work as without this context.
    """
    found: list[str] = []

    def add(package: str, text: str) -> None:
        if package == _DOWNLOADS or _REPORTED_BY_ENGINE in text:
            return
        line = " ".join(text.split())
        line = line if package == "pytest_llem" else f"{package}: {line}"
        if len(line) > MAX_CHARACTERS:
            line = f"{line[: MAX_CHARACTERS - 1]}…"
        if line not in found and len(found) < MAX_WARNINGS:
            found.append(line)

    make_record = logging.getLogRecordFactory()

    def make_and_add(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            try:
                text = record.getMessage()
            except Exception:  # wrong arguments: logging itself prints such an error, and goes on
                text = str(record.msg)
            add(record.name.partition(".")[0], text)
        return record

    def show_and_add(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, _FOR_USERS):
            add(_package(filename), str(message))
        show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        for category in _FOR_USERS:  # or a warning of this process's earlier experiment would not be repeated
            warnings.simplefilter("always", category)
        show = warnings.showwarning
        warnings.showwarning = show_and_add
        # A handler would miss records: libraries create loggers on import that do not propagate to the root.
        logging.setLogRecordFactory(make_and_add)
        try:
            yield found
        finally:
            logging.setLogRecordFactory(make_record)


def _package(filename: str) -> str:
    """Return the package that a file belongs to, or the file's stem if it is in none."""
    file = Path(filename)
    package = file
    for folder in file.parents:
        if not (folder / "__init__.py").is_file():
            break
        package = folder
    return package.stem
