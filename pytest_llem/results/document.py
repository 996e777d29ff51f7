"""Base classes of the records and files that pytest-llem writes, and the schema version.

Files of schema 1.x and 2.x are read; :func:`upgrade` converts those of 1.x.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from pytest_llem.times import check_time

#: Major.minor. A minor version only adds fields.
SCHEMA_VERSION = "2.0"


#: A time, UTC, as ISO 8601.
Time = Annotated[str, AfterValidator(check_time)]


class Record(BaseModel):
    """Base of everything that is written to a file."""

    # protected_namespaces=(): pydantic before 2.10 warns about fields named model_….
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    def model_dump_json(self, **options: Any) -> str:
        """Return the record as JSON. Lone surrogates, which UTF-8 cannot hold, are escaped."""
        try:
            return super().model_dump_json(**options)
        except PydanticSerializationError:
            plain = type(self).model_validate(_without_surrogates(self.model_dump()))
            return super(Record, plain).model_dump_json(**options)


def _without_surrogates(value: Any) -> Any:
    """Return *value* with the lone surrogates of all strings in it as escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    return [*map(_without_surrogates, value)] if isinstance(value, list | tuple) else value


class RecordFile(Record):
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
        return RecordFile.model_validate_json(content).schema_version
    except ValidationError:
        return SCHEMA_VERSION


#: Names in 2.0 by names in 1.x, of fields and metrics at any depth.
_RENAMED = {
    "bench": "testbed",
    "subject": "sut",
    "compared_anyway": "compared_despite_mismatch",
    "idle_context_w": "idle_power_w",
    "times_floor": "roofline_slowdown",
    "idle_bare_w": "idle_power_no_context_w",
    "idle_bare_method": "no_context_method",
    "idle_bare_source": "no_context_source",
    "idle_bare_age_seconds": "no_context_age_seconds",
    "idle_bare_reason": "no_context_reason",
}

#: Fields whose keys users, engines and libraries choose: these keys are not renamed.
_VERBATIM = {"axes", "config", "effective_config", "environment", "excluded", "inputs", "settings", "versions"}


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1.x with the names of 2.0.

    Args:
        document: A manifest, a result of an experiment or of a study, or a baseline, as parsed from JSON.

    Example:
        >>> upgrade({"schema_version": "1.4", "baseline": {"idle_context_w": 61.5}})
        {'schema_version': '2.0', 'idle_power': {'idle_power_w': 61.5}}
    """
    upgraded: dict[str, Any] = _renamed(document) | {"schema_version": "2.0"}
    if "baseline" in upgraded:
        upgraded["idle_power"] = upgraded.pop("baseline")
    if isinstance(warnings := upgraded.get("warnings"), list):
        upgraded["warnings"] = [_coded(warning) for warning in warnings]
    with suppress(AttributeError, TypeError):  # a value of a wrong type, which the validation that follows reports
        for point in upgraded.get("points") or ():
            _add_coverage(point)
    return upgraded


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {_RENAMED.get(key, key): item if key in _VERBATIM else _renamed(item) for key, item in value.items()}
    if isinstance(metric := found.get("metric"), str):  # of a verdict
        found["metric"] = _RENAMED.get(metric, metric)
    return found


def _coded(warning: Any) -> Any:
    """Return a warning with a code; before 1.4 a warning was only a text."""
    if not isinstance(warning, str):
        return warning
    return {"code": "unclassified", "severity": "warning", "text": warning}


def _add_coverage(point: dict[str, Any]) -> None:
    """Set ``covers_engine`` of a point's energies, which in 1.3 and older follows from the point's facts."""
    testbed = point.get("testbed")
    if not testbed:
        return
    covered = "cpu_package" if {"cpu", "cpus"} & testbed.keys() else "gpu_board"
    for summary in point.get("metrics", {}).values():
        if summary.get("boundary") is not None and summary.get("covers_engine") is None:
            summary["covers_engine"] = covered in summary["boundary"].split("+")
