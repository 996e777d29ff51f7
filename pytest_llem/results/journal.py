"""The manifest's journal: one line for each change of a status since the manifest was last written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from pytest_llem.results.document import Record
from pytest_llem.results.manifest_records import ManifestEntry


class Line(Record):
    """A transition from one status to another: its increasing number, and the whole entry after it."""

    sequence: int
    entry: ManifestEntry


class Journal:
    """A file to which only whole lines are appended.

    The file is opened for each write, so that a removed or moved directory is detected.

    Args:
        path: The file, which is created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0

    def append(self, lines: Sequence[Line], *, durable: bool) -> None:
        """Append all of *lines* or none.

        Args:
            lines: New transitions.
            durable: Whether to wait until they would survive a power failure.

        Raises:
            OSError: The lines could not be written, or the earlier lines are missing.
        """
        text = "".join(f"{line.model_dump_json()}\n" for line in lines).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(file).st_size != self._size:
                raise OSError(f"{self._path.name} was changed or removed by another process")
            try:
                rest = memoryview(text)
                while rest:
                    rest = rest[os.write(file, rest) :]
                if durable:
                    os.fsync(file)
            except BaseException:
                with suppress(OSError):  # if this fails, the next append finds the wrong size and raises
                    os.ftruncate(file, self._size)
                raise
            self._size += len(text)
        finally:
            os.close(file)

    def clear(self) -> None:
        """Drop all lines, which the manifest includes. If that fails, the next append raises OSError."""
        self._size = 0
        with suppress(OSError):
            os.truncate(self._path, 0)

    def remove(self) -> None:
        """Remove the file if possible. Lines that remain are older than the manifest and are ignored."""
        self._size = 0
        with suppress(OSError):
            self._path.unlink()


def read_journal(path: Path, after: int) -> Iterator[ManifestEntry]:
    """Yield the entries of *path* whose numbers are above *after*. Invalid lines are skipped.

    Raises:
        OSError: *path* exists and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for text in content.split(b"\n"):
        try:
            line = Line.model_validate_json(text)
        except ValidationError:  # cut off by a power failure, or not written by pytest-llem
            continue
        if line.sequence > after:
            yield line.entry
