"""Prompts in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.backends.protocol import PreflightError
from pytest_llem.study.dataset import ALIASES, FILE_TYPES, SYNTHETIC


@dataclass(frozen=True)
class Prompt:
    """A prompt that is a text, and where it is from, as far as its dataset says."""

    text: str
    source: str | None = None


def file_problem(dataset: str, directory: Path) -> str | None:
    """Return what keeps a file of prompts from being read, or None. It is opened, and not read.

    Args:
        dataset: Its path.
        directory: What that is relative to.
    """
    if Path(dataset).suffix not in FILE_TYPES:
        names = ", ".join(map(repr, (SYNTHETIC, *ALIASES)))
        expected = f"{names}, a .txt or .jsonl file, or owner/name of the Hugging Face hub"
        return f"dataset {dataset!r}: expected {expected}"
    try:
        path = directory / Path(dataset).expanduser()
        if path.exists() and not path.is_file():  # a pipe, say, which opening would wait for
            return f"dataset {dataset!r} is no file"
        with path.open("rb"):
            return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        return f"dataset {dataset!r} cannot be read: {error}"


def read_file(dataset: str, directory: Path) -> list[Prompt]:
    """Return the prompts in a file: its lines, or the objects in them. Blank lines are none.

    Args:
        dataset: Its path.
        directory: What that is relative to.

    Raises:
        PreflightError: It cannot be read, or holds something else.
    """
    if problem := file_problem(dataset, directory):
        raise PreflightError(problem)
    path = directory / Path(dataset).expanduser()
    try:
        return _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error


def _lines(path: Path) -> list[Prompt]:
    return [Prompt(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _objects(path: Path) -> list[Prompt]:
    return list(_each_object(path))


def _each_object(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = next(entry[key] for key in ("prompt", "text") if isinstance(entry.get(key), str))
        except (ValueError, AttributeError, StopIteration):
            raise PreflightError(
                f"{path}:{number}: expected a JSON object with a string under 'prompt' or 'text'"
            ) from None
        source = entry.get("source")
        if not isinstance(source, str | None):
            raise PreflightError(f"{path}:{number}: expected a string under 'source'")
        yield Prompt(text, source)


_READERS: dict[str, Callable[[Path], list[Prompt]]] = {".txt": _lines, ".jsonl": _objects}
