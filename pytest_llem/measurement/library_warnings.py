"""What libraries warn of while an experiment runs: pytest shows it of a failed test only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

#: How many of them a result keeps, and how many characters of each.
MAX_WARNINGS, MAX_CHARACTERS = 20, 600

#: Categories that are for users of a program, and not for its developers.
_FOR_USERS = (UserWarning, RuntimeWarning)

#: What it says is of downloads, and of the account that makes them, which is no part of what is measured.
_DOWNLOADS = "huggingface_hub"

#: transformers' table of weights that are missing or not used: the engine says the same in one line.
_SAID_BY_ENGINE = "LOAD REPORT"


@contextmanager
def library_warnings() -> Iterator[list[str]]:
    """Collect what is logged as a warning or worse, or passed to ``warnings.warn``, each text once, on one line.

    It still goes where it would go without. The list that is yielded grows meanwhile.
    """
    found: list[str] = []

    def note(package: str, text: str) -> None:
        if package == _DOWNLOADS or _SAID_BY_ENGINE in text:
            return
        line = " ".join(text.split())
        line = line if package == "pytest_llem" else f"{package}: {line}"
        if len(line) > MAX_CHARACTERS:
            line = f"{line[: MAX_CHARACTERS - 1]}…"
        if line not in found and len(found) < MAX_WARNINGS:
            found.append(line)

    make_record = logging.getLogRecordFactory()

    def noting_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            note(record.name.partition(".")[0], record.getMessage())
        return record

    def noting_show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, _FOR_USERS):
            note(_package(filename), str(message))
        show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        for category in _FOR_USERS:  # an earlier experiment of this process may have had the same
            warnings.simplefilter("always", category)
        show = warnings.showwarning
        warnings.showwarning = noting_show
        # Not a handler: libraries keep their loggers from the root's, and make them when they are imported.
        logging.setLogRecordFactory(noting_record)
        try:
            yield found
        finally:
            logging.setLogRecordFactory(make_record)


def _package(filename: str) -> str:
    """Return the package that a file belongs to, or the file's own name where it is in none."""
    file = Path(filename)
    package = file
    for folder in file.parents:
        if not (folder / "__init__.py").is_file():
            break
        package = folder
    return package.stem
