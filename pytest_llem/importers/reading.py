"""Read untrusted JSON with bounded memory, and report what is wrong with it in one line."""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pytest_llem.study.problems import shown

#: Maximum size of a file, in bytes. A request with 128 tokens takes 3 KB.
MAX_BYTES = 128_000_000

#: Maximum number of lists and objects in a file, since empty ones take 20 times their size in memory.
MAX_NODES = 4_000_000

_CONTROL = dict.fromkeys([*range(32), 127], " ")


class ImportFileError(ValueError):
    """A result file cannot be imported. The message is one line, and begins with the file's name."""


def fail(file: Path, message: str) -> NoReturn:
    """Raise an error about *file*.

    Raises:
        ImportFileError: Always.
    """
    raise ImportFileError(f"{file}: {message}") from None


def read_text(file: Path) -> str:
    """Return the content of *file*.

    Raises:
        ImportFileError: It is not a file, is larger than :data:`MAX_BYTES`, or is not UTF-8 text.
    """
    try:
        with file.open("rb") as opened:  # checked once it is open, so that it cannot be replaced in between
            state = os.fstat(opened.fileno())
            if not stat.S_ISREG(state.st_mode):
                fail(file, "is not a file")
            if state.st_size > MAX_BYTES:
                size = f"{state.st_size / 1e6:,.0f} MB"
                fail(file, f"has {size}, and at most {MAX_BYTES / 1e6:,.0f} MB can be imported: use a shorter run")
            content = opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        fail(file, "no such file or folder")
    except (OSError, ValueError) as error:
        if isinstance(error, ImportFileError):
            raise
        fail(file, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if not content.strip():
        fail(file, "is empty")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        fail(file, f"is not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start:,})")


def parse(file: Path, text: str) -> list[Any]:
    """Return the JSON values in *text*: one, or one a line.

    Raises:
        ImportFileError: *text* is not JSON, or has more than :data:`MAX_NODES` lists and objects.
    """
    if text.count("[") + text.count("{") > MAX_NODES:
        fail(file, f"holds more than {MAX_NODES:,} lists and objects")
    try:
        return [_DECODER.decode(text)]
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            _fail_to_parse(file, text, error)
    except (RecursionError, ValueError) as error:
        _fail_to_parse(file, text, error)
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                found.append(_DECODER.decode(line))
            except (RecursionError, ValueError) as error:
                _fail_to_parse(file, line, error, number)
    return found


def _fail_to_parse(file: Path, text: str, error: Exception, line: int | None = None) -> NoReturn:
    where = f"{file}:{line}" if line else f"{file}"
    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(text.rstrip()):
            raise ImportFileError(f"{where}: ends in the middle of its JSON: was the tool interrupted?") from None
        where += f":{error.colno}" if line else f":{error.lineno}:{error.colno}"
        raise ImportFileError(f"{where}: not valid JSON: {error.msg}") from None
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    raise ImportFileError(f"{where}: not valid JSON: {reason}") from None


#: Python's json writes these, which are not JSON, for SGLang's infinite request rate and for means of nothing.
_CONSTANTS = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}

_DECODER = json.JSONDecoder(parse_constant=_CONSTANTS.__getitem__)


class Fields:
    """The fields of one JSON object, with checks of their types.

    A missing field and null are None: a version of a tool may not write it. A value of another type is an error.

    Example:
        >>> Fields(Path("out.json"), {"duration": 11.6}).number("duration")
        11.6

    Args:
        file: The file, for messages.
        data: The object.
        at: Its place in the file, for messages; empty for the whole file.
    """

    def __init__(self, file: Path, data: Any, at: str = "") -> None:
        self.file, self.at = file, at
        if not isinstance(data, Mapping):
            self.fail("", f"must be an object (got {shown(data)})")
        self.data: Mapping[str, Any] = data

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise an error about the field *name*.

        Raises:
            ImportFileError: Always.
        """
        place = ".".join(filter(None, (self.at, name)))
        fail(self.file, f"{place}: {message}" if place else message)

    def section(self, name: str) -> Fields:
        """Return the object in a field; an empty one if it is missing."""
        value = self.data.get(name)
        return Fields(self.file, {} if value is None else value, ".".join(filter(None, (self.at, name))))

    def sections(self, name: str) -> list[Fields]:
        """Return the objects in the list of a field."""
        at = ".".join(filter(None, (self.at, name)))
        return [Fields(self.file, one, f"{at}[{place}]") for place, one in enumerate(self.items(name) or ())]

    def items(self, name: str) -> list[Any] | None:
        """Return a list."""
        value: list[Any] | None = self._typed(name, list, "a list")
        return value

    def text(self, name: str) -> str | None:
        """Return a string, with spaces in place of control characters."""
        value: str | None = self._typed(name, str, "a string")
        return None if value is None else value.translate(_CONTROL)

    def number(self, name: str) -> float | None:
        """Return a number, at least 0."""
        value = self.data.get(name)
        return None if value is None else self._number(name, value)

    def count(self, name: str) -> int | None:
        """Return a whole number, at least 0."""
        value = self.number(name)
        if value is not None and not value.is_integer():
            self.fail(name, f"must be a whole number (got {shown(value)})")
        return None if value is None else int(value)

    def numbers(self, name: str) -> list[float] | None:
        """Return a list of numbers, each at least 0."""
        values = self.items(name)
        if values is None:
            return None
        return [self._number(f"{name}[{place}]", value) for place, value in enumerate(values)]

    def _typed(self, name: str, kind: type, noun: str) -> Any:
        value = self.data.get(name)
        if value is not None and not isinstance(value, kind):
            self.fail(name, f"must be {noun} (got {shown(value)})")
        return value

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"must be a number (got {shown(value)})")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number < 0:
            self.fail(name, f"must be a finite number, at least 0 (got {shown(value)})")
        return number


def scalars(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of each text, number and boolean in nested objects and lists of one."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) == 1:
            yield from scalars({name: value[0]}, prefix)
        elif isinstance(value, str | int | float):
            yield f"{prefix}{name}", value


def utc_time(seconds: float | None) -> datetime | None:
    """Return the time *seconds* after 1970; None if unknown or not a time."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None
