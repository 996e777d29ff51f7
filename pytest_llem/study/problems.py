"""Represent the errors in a study file, each with its location."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One error in, or note on, a study file.

    Attributes:
        path: The file.
        line: Line, from 1.
        column: Column, from 1.
        where: Dotted path of the key, empty for the whole file.
        message: Description with the given value.
    """

    path: Path
    line: int
    column: int
    where: str
    message: str

    def shown_from(self, directory: Path) -> Problem:
        """Return a copy with a path relative to *directory*, if the file is below it."""
        inside = self.path.is_relative_to(directory)
        return replace(self, path=Path(os.path.relpath(self.path, directory))) if inside else self

    def __str__(self) -> str:
        where = f" {self.where}:" if self.where else ""
        return f"{self.path}:{self.line}:{self.column}:{where} {self.message}"


class StudyError(ValueError):
    """A study file is invalid.

    Attributes:
        problems: All errors that were found, in file order.

    Example:
        try:
            study = load_study("studies/llama.yaml")
        except StudyError as error:
            for problem in error.problems:
                print(problem.line, problem.where, problem.message)
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems = tuple(sorted(unique, key=lambda problem: (problem.path, problem.line, problem.column)))
        super().__init__("\n".join(map(str, self.problems)))


class _Shown(reprlib.Repr):
    """Show values in YAML's spelling, and shorten long values without formatting them in full."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802 (the name that reprlib looks up)
        return "null"


_SHOWN = _Shown()


def shown(value: Any) -> str:
    """Return *value* for a message, on one line and shortened to 62 characters."""
    text = _SHOWN.repr(value)
    return text if len(text) <= 62 else f"{text[:57]}..."


def printable(text: str) -> str:
    """Return *text* with unprintable characters escaped, such as a line break in a model's name."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


@lru_cache(maxsize=1024)  # called again for every point of the sweep
def did_you_mean(given: str, known: tuple[str, ...]) -> str:
    """Return `` (did you mean …?)`` for a misspelt name, or an empty text."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
