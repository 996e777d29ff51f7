"""Base classes of the records and files that pytest-llem writes, and the schema version.

Files of schema 1.x and 2.x are read; :func:`pytest_llem.results.upgrade.upgrade` converts those of 1.x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pytest_llem.results.upgrade import upgrade

#: Major.minor. A minor version only adds fields.
SCHEMA_VERSION = "2.0"


class Record(BaseModel):
    """Base of everything that is written to a file."""

    # protected_namespaces=(): pydantic before 2.10 warns about fields named model_….
    model_config = ConfigDict(
        extra="ignore", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )


class Document(Record):
    """A record that is a file of its own, with its schema version."""

    schema_version: str = SCHEMA_VERSION
    """Version of the file's format, ``major.minor``. A minor version only adds keys."""

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, document: Any) -> Any:
        is_old = isinstance(document, dict) and str(document.get("schema_version")).startswith("1.")
        return upgrade(document) if is_old else document

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the document in *file*.

        Raises:
            ValueError: *file* is not such a document, or has another major schema version.
            OSError: *file* cannot be read.
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
            raise ValueError(
                f"{file}: schema version {version} cannot be read (this pytest-llem has schema {SCHEMA_VERSION})"
            )
        if reason is not None:
            raise ValueError(f"{file}: not a {cls.__name__}: {reason}")
        return found


def _version(content: bytes) -> str:
    """Return the schema version of an invalid document; the current one if it has none."""
    try:
        return Document.model_validate_json(content).schema_version
    except ValidationError:
        return SCHEMA_VERSION
