"""pydantic's errors as located, readable problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.grid import DEFAULT_BACKEND, STUDY_KEYS, Draft
from pytest_llem.study.problems import Problem, did_you_mean

_SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "unknown key",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def section_problems(
    document: Document, at: KeyPath, model: type[BaseModel], error: ValidationError
) -> list[Problem]:
    """Return the problems of one section of the file, which stands at *at*."""
    return [document.problem((*at, *_location(detail)), _sentence(detail, model)) for detail in error.errors()]


def key_problems(document: Document, draft: Draft, backends: Sequence[str]) -> dict[str, Problem]:
    """Return by key: unknown keys, sections of another engine, an engine that is not installed."""
    fields = list(ExperimentConfig.model_fields)
    backend = draft.config.get("backend", DEFAULT_BACKEND)
    problems = {}
    for key in draft.config:
        if key in backends and key != backend:
            message = f"is a section of another engine (the backend is {backend!r})"
        elif key not in fields and key not in backends:
            message = "unknown key" + did_you_mean(key, [*fields, *STUDY_KEYS])
        else:
            continue
        problems[key] = _problem(document, draft, (key,), message)
    if isinstance(backend, str) and backend not in backends:
        message = f"no engine of that name is installed (got {backend!r}; there are: {', '.join(backends)})"
        problems["backend"] = _problem(document, draft, ("backend",), message)
    return problems


def located(document: Document, draft: Draft, error: ValidationError) -> tuple[list[Problem], list[str]]:
    """Return a draft's mistakes, located, and the reasons why it is no valid combination.

    A value that is wrong by itself is a mistake in the file. Values that are right by themselves and do not
    go together only leave that combination out.
    """
    problems: list[Problem] = []
    reasons: list[str] = []
    for detail in error.errors():
        location = _location(detail)
        if detail["type"] == "value_error":  # raised by a validator that looks at a section as a whole
            reasons.append(f"{dotted(location)}: {detail['ctx']['error']}")
        else:
            problems.append(_problem(document, draft, location, _sentence(detail, ExperimentConfig)))
    return problems, reasons


def _problem(document: Document, draft: Draft, location: KeyPath, message: str) -> Problem:
    """Return a problem of the configuration's key *location*, placed where the file gives its value."""
    at = location
    for axis, origin in draft.origins.items():
        parts = tuple(axis.split("."))
        if location[: len(parts)] == parts or parts[: len(location)] == location:
            at = origin
            break
    return replace(document.problem(at, message), where=dotted(location))


def _location(detail: ErrorDetails) -> KeyPath:
    """Drop what pydantic adds for the members of a union (``dataset.DatasetConfig.n``, ``dataset.str``)."""
    return tuple(part for part in detail["loc"] if part not in ("DatasetConfig", "str"))


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    text = _SENTENCES.get(detail["type"])
    sentence = text.format(**detail.get("ctx", {})) if text else detail["msg"][:1].lower() + detail["msg"][1:]
    if detail["type"] == "missing":
        return sentence
    if detail["type"] == "extra_forbidden":
        *path, key = _location(detail)
        return sentence + did_you_mean(str(key), _fields(model, path))
    given = repr(detail["input"])
    return f"{sentence} (got {given if len(given) <= 60 else given[:57] + '...'})"


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Return the known keys of the section at *path*."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
