"""Read prompts from a text or JSON-lines file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llem.engines.protocol import PreflightError
from pytest_llem.study.dataset import ALIASES, FILE_TYPES, SYNTHETIC

#: Half of a surrogate pair. JSON can escape it, but it is not valid text.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """A text prompt.

    Attributes:
        text: The prompt; the first turn of a conversation.
        source: Name of the collection that the prompt is from, by which ``dataset_order`` groups or alternates
            prompts: the dataset's field ``source``; None if there is none.
        later: What the user says in the later turns of a conversation.
    """

    text: str
    source: str | None = None
    later: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        """What the user says in each turn."""
        return (self.text, *self.later)


def file_problem(dataset: str, directory: Path) -> str | None:
    """Return why a file of prompts cannot be read; None if it can be. The file is opened but not read.

    Args:
        dataset: Path of the file.
        directory: Folder to which the path is relative.
    """
    if Path(dataset).suffix not in FILE_TYPES:
        names = ", ".join(map(repr, (SYNTHETIC, *ALIASES)))
        expected = f"{names}, a .txt or .jsonl file, or owner/name of the Hugging Face hub"
        return f"dataset {dataset!r}: expected {expected}"
    try:
        path = directory / Path(dataset).expanduser()
        if path.exists() and not path.is_file():  # opening a pipe, for example, would block
            return f"dataset {dataset!r} is not a file"
        with path.open("rb"):
            return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~user of no such user
        return f"dataset {dataset!r} cannot be read: {error}"


def read_file(dataset: str, directory: Path) -> list[Prompt]:
    """Return the prompts in a file: its lines, or the JSON objects in its lines. Blank ones are left out.

    Args:
        dataset: Path of the file.
        directory: Folder to which the path is relative.

    Raises:
        PreflightError: The file cannot be read, or a line has another format.
    """
    if problem := file_problem(dataset, directory):
        raise PreflightError(problem)
    path = directory / Path(dataset).expanduser()
    try:
        if path.suffix == ".jsonl":
            return list(_objects(path))
        return [Prompt(line) for _, line in _numbered_lines(path)]
    except OSError as error:
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of *path* that are not blank, with their numbers.

    Only ``\n`` and ``\r\n`` end a line: a prompt may hold any other separator that Unicode has.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise PreflightError(f"{path}:{number}: is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    if "\0" in text:  # English text in UTF-16 without a byte-order mark is valid UTF-8
        number = text.count("\n", 0, text.index("\0")) + 1
        raise PreflightError(f"{path}:{number}: holds a NUL character, as UTF-16 does: save the file as UTF-8")
    for number, line in enumerate(text.split("\n"), 1):
        # An editor's byte-order mark; further ones where files were concatenated.
        prompt = line.removeprefix("\ufeff")
        if prompt.strip():
            yield number, prompt.removesuffix("\r")


def _objects(path: Path) -> Iterator[Prompt]:
    for number, line in _numbered_lines(path):
        try:
            entry = json.loads(line)
            text, *later = _turns(entry)
        except (ValueError, AttributeError, TypeError, KeyError):
            raise PreflightError(
                f"{path}:{number}: expected a JSON object with a string under 'prompt' or 'text', or with "
                "ShareGPT's turns ('from', 'value') under 'conversations'"
            ) from None
        if surrogate := _SURROGATE.search("".join((text, *later))):
            raise PreflightError(
                f"{path}:{number}: the prompt holds the lone surrogate \\u{ord(surrogate[0]):x}, which no "
                "tokenizer takes: remove it, or write the character's pair in full"
            )
        source = entry.get("source")
        if not isinstance(source, str | None):
            raise PreflightError(f"{path}:{number}: expected a string under 'source'")
        if text.strip():
            yield Prompt(text, source, tuple(later))


def _turns(entry: Any) -> list[str]:
    """Return what the user says in each turn of an object: one prompt, or a conversation in ShareGPT's form.

    Raises:
        ValueError: It has no such text.
    """
    if isinstance(talk := entry.get("conversations"), list):
        found = [turn["value"] for turn in talk if turn["from"] in ("human", "user")]
    else:
        found = [entry[key] for key in ("prompt", "text") if isinstance(entry.get(key), str)][:1]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError
    return found
