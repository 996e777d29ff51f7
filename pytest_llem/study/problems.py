"""Represent the errors in a study file, each with its location."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

REQUIRED = "is required"

_SENTENCES = {
    "missing": REQUIRED,
    "extra_forbidden": "unknown key",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "too_short": "must not be empty",
}


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
    containing = sorted((one for one in known if len(given) > 4 and given in one), key=len)
    close = containing or difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def error_sentence(error: ErrorDetails) -> str:
    """Return what is wrong with a value, such as ``must be at least 1``, from one of pydantic's errors."""
    # Bounds of float fields are floats; a message shows 0 rather than 0.0.
    limits = {name: f"{one:.15g}" if isinstance(one, float) else one for name, one in error.get("ctx", {}).items()}
    text = _SENTENCES.get(error["type"])
    return text.format(**limits) if text else error["msg"][:1].lower() + error["msg"][1:]
