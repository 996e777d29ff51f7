"""What every file of ours is: records, and documents that say by which schema they were written.

Readers accept files of the same major schema version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

#: Major.minor. A minor version only adds fields.
SCHEMA_VERSION = "1.4"


class Record(BaseModel):
    """Base of everything that is written."""

    # Fields may be called model_…, which pydantic before 2.10 warns of.
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class Document(Record):
    """A record that is a file of its own, and says by which schema it was written."""

    schema_version: str = SCHEMA_VERSION

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what *file* holds.

        Raises:
            ValueError: It is no such document, or one of another major schema version.
            OSError: It cannot be read.
        """
        content = file.read_bytes()
        try:
            found = cls.model_validate_json(content)
            version, reason = found.schema_version, None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            version, reason = _version(content), f"{where}: {first['msg']}"
        if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
            raise ValueError(f"{file}: schema version {version} cannot be read here (this is {SCHEMA_VERSION})")
        if reason is not None:
            raise ValueError(f"{file}: not a {cls.__name__}: {reason}")
        return found


def _version(content: bytes) -> str:
    """Return the schema version of a document that is not as expected; ours where it says none."""
    try:
        return Document.model_validate_json(content).schema_version
    except ValidationError:
        return SCHEMA_VERSION
