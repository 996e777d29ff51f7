"""Turn pydantic's errors about the sections of a study file into located problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.document import IN_QUOTES, Document, KeyPath, dotted
from pytest_llem.study.problems import Problem, did_you_mean, error_sentence
from pytest_llem.study.section import section_of

#: Fields that are a value or a section: after them, pydantic inserts the alternative into an error's location.
#: Index of that part in the location, and the field's name.
_VALUE_OR_SECTION = {(1, "dataset"), (3, "input_len"), (1, "delta")}


def section_problems(
    document: Document, at: KeyPath, model: type[BaseModel], error: ValidationError
) -> list[Problem]:
    """Return the problems of the section at the key path *at* of the file."""
    return [
        document.problem((*at, *location), located_sentence(document, (*at, *location), location, detail, model))
        for location, detail in error_details(error)
    ]


def error_details(error: ValidationError) -> Iterator[tuple[KeyPath, ErrorDetails]]:
    """Yield each error with its location; for a value-or-section field, only those of the given kind."""
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        # After a field that is a value or a section, pydantic's location has the alternative that it tried.
        alternatives = [i for i in range(1, len(location)) if (i, location[i - 1]) in _VALUE_OR_SECTION]
        if alternatives and alternatives[0] == 1:
            is_section = not str(location[alternatives[-1]]).startswith("constrained-")
            if detail["type"] in ("model_type", "dict_type") if is_section else isinstance(detail["input"], dict):
                continue
            location = tuple(part for i, part in enumerate(location) if i not in alternatives)
        yield location, detail


def located_sentence(
    document: Document, at: KeyPath, location: KeyPath, detail: ErrorDetails, model: type[BaseModel]
) -> str:
    """Return what is wrong with a value, the value, and what to do.

    Args:
        document: The file.
        at: Position of the value in the file.
        location: Key path of the value in *model*.
        detail: pydantic's error.
        model: The section, or ExperimentConfig.
    """
    kind = detail["type"]
    sentence = error_sentence(detail)
    if kind == "missing":
        return sentence
    if kind == "extra_forbidden":
        return sentence + did_you_mean(str(location[-1]), _fields(model, location[:-1]))
    given = document.given(at, detail["input"])
    if model is ExperimentConfig and at[:1] != ("sweep",) and kind != "model_type" and _is_values(detail["input"]):
        return f"{sentence} {given}; a list of values goes under sweep, as {dotted(location)}: [...]"
    if kind == "int_type" and location == ("dataset", "input_len"):
        return f"{sentence} or a mapping {given}"
    if kind != "string_type":
        return f"{sentence} {given}"
    if location == ("dataset",):
        return f"{sentence} or a mapping {given}"
    quotable = not isinstance(detail["input"], list | dict | None)
    return f"{sentence} {given}{IN_QUOTES if quotable else ''}"


def _is_values(given: Any) -> bool:
    """Return whether *given* looks like the values of an axis."""
    return isinstance(given, list) and len(given) > 1 and not any(isinstance(one, list | dict) for one in given)


def _fields(model: type[BaseModel], path: Sequence[Any]) -> tuple[str, ...]:
    """Return the known keys of the section at *path*."""
    for part in path:
        inner = section_of(model.model_fields[str(part)])
        assert inner is not None
        model = inner
    return tuple(model.model_fields)
