"""What is wrong with a study file, one located line per problem."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


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

    def __str__(self) -> str:
        where = f" {self.where}:" if self.where else ""
        return f"{self.path}:{self.line}:{self.column}:{where} {self.message}"


class StudyError(ValueError):
    """A study file that cannot be run. ``problems`` holds every mistake found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems = tuple(sorted(unique, key=lambda problem: (problem.line, problem.column)))
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """Return `` (did you mean …?)`` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
