"""The journal: what happened since the manifest was last written whole, a line each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from pytest_llem.results.document import Record
from pytest_llem.results.models import ManifestEntry


class Line(Record):
    """A transition: its number, which only grows, and the whole entry after it."""

    sequence: int
    entry: ManifestEntry


class JournalLostError(OSError):
    """The file is not what was written: somebody removed or changed it."""


class Journal:
    """A file to which lines are appended, and never a part of one.

    Nothing is held open, so that a directory that is gone, or moved, is noticed.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0

    def append(self, lines: Sequence[Line], *, durable: bool) -> None:
        """Write *lines* at the end, all or none.

        Args:
            lines: What is new.
            durable: Wait until they would survive a power failure.

        Raises:
            JournalLostError: The earlier lines are not there.
            OSError: They could not be written.
        """
        text = "".join(f"{line.model_dump_json()}\n" for line in lines).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(file).st_size != self._size:
                raise JournalLostError(f"{self._path.name} was changed or removed by somebody else")
            try:
                rest = memoryview(text)
                while rest:
                    rest = rest[os.write(file, rest) :]
                if durable:
                    os.fsync(file)
            except BaseException:
                with suppress(OSError):  # else the next size is not the expected one
                    os.ftruncate(file, self._size)
                raise
            self._size += len(text)
        finally:
            os.close(file)

    def clear(self) -> None:
        """Drop all lines: the manifest holds what they say. Where that fails, the next one does not fit."""
        self._size = 0
        with suppress(OSError):
            os.truncate(self._path, 0)

    def remove(self) -> None:
        """Take the file away, as far as possible: what is left is older than the manifest."""
        self._size = 0
        with suppress(OSError):
            self._path.unlink()


def read_journal(path: Path, after: int) -> Iterator[ManifestEntry]:
    """Yield the entries of *path* whose numbers are above *after*. A line that is none is passed over.

    Raises:
        OSError: It is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for text in content.split(b"\n"):
        try:
            line = Line.model_validate_json(text)
        except ValidationError:  # torn as the power went, or not ours
            continue
        if line.sequence > after:
            yield line.entry
