"""What is wrong with a study file, one located line per problem."""

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
    """One mistake in a study file.

    Attributes:
        path: The file that holds it.
        line: Line, counted from 1.
        column: Column, counted from 1.
        where: Dotted path of the key at fault, empty for the whole file.
        message: What is wrong, and what was given.
    """

    path: Path
    line: int
    column: int
    where: str
    message: str

    def shown_from(self, directory: Path) -> Problem:
        """Return it with its path as somebody in *directory* would type it."""
        inside = self.path.is_relative_to(directory)
        return replace(self, path=Path(os.path.relpath(self.path, directory))) if inside else self

    def __str__(self) -> str:
        where = f" {self.where}:" if self.where else ""
        return f"{self.path}:{self.line}:{self.column}:{where} {self.message}"


class StudyError(ValueError):
    """A study file that cannot be run. ``problems`` holds every mistake found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems = tuple(sorted(unique, key=lambda problem: (problem.path, problem.line, problem.column)))
        super().__init__("\n".join(map(str, self.problems)))


class _Shown(reprlib.Repr):
    """Values in YAML's words. Short ones in full; long ones are not even looked at in full."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802 (reprlib's way to name a type)
        return "null"


_SHOWN = _Shown()


def shown(value: Any) -> str:
    """Return *value* as a message quotes it: on one line, cut where it is long."""
    text = _SHOWN.repr(value)
    return text if len(text) <= 62 else f"{text[:57]}..."


def printable(text: str) -> str:
    """Return *text* with what no terminal should be sent, such as a line break in a model's name, spelt out."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


@lru_cache(maxsize=1024)  # a wrong key is looked up once for every point of the sweep
def did_you_mean(given: str, known: tuple[str, ...]) -> str:
    """Return `` (did you mean …?)`` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
