"""Generate the JSON Schema of a study file, for editors, from the pydantic classes of its sections.

Only the reader of study files checks what a schema cannot: that ``model`` is given, that fields are compatible,
that an axis belongs to the study's own engine, and that a whole number is not written as ``1.0``, which JSON
Schema accepts.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.study.budgets import BudgetConfig, LimitConfig
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import ENGINES
from pytest_llem.study.execution import ExecutionConfig, Rule
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.grid import LISTABLE
from pytest_llem.study.runners import ENGINE_CLASS, LOCAL
from pytest_llem.study.section import NullableSection, section_of

Schema = dict[str, Any]


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield *model* and all sections within it."""
    yield model
    for field in model.model_fields.values():
        if (section := section_of(field)) is not None:
            yield from _sections(section)


#: The classes under ``$defs``.
_MODELS: tuple[type[BaseModel], ...] = (
    *_sections(ExperimentConfig),
    ExecutionConfig,
    LimitConfig,
    BudgetConfig,
    GatesConfig,
    Rule,
)

_NULL: Schema = {"type": "null"}

_FREE_SECTION: Schema = {"anyOf": [{"type": "object", "additionalProperties": True}, _NULL]}

#: Special characters of regular expressions, in Python and JavaScript.
_SPECIAL = re.compile(r"[\\^$.*+?()\[\]{}|/]")


def study_schema(engines: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a study file.

    Args:
        engines: Names of engines in addition to :data:`ENGINES`. Each has a section that allows any content.
    """
    defs = _definitions([name for name in engines if name not in ENGINES])
    experiment = defs[ExperimentConfig.__name__]
    fields = {
        name: _listable(_reference(ExperimentConfig, name), one["description"]) if name in LISTABLE else one
        for name, one in experiment["properties"].items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pytest-llem study",
        "description": "Measurements of LLM inference, as pytest-llem runs them.",
        "type": "object",
        "properties": {**_study_keys(defs), **fields},
        "patternProperties": experiment["patternProperties"],
        "additionalProperties": False,
        "$defs": defs,
    }


def schema_text(engines: Sequence[str] = ()) -> str:
    """Return :func:`study_schema` as the text of a file, in ASCII."""
    return json.dumps(study_schema(engines), indent=2) + "\n"


def _definitions(engines: Sequence[str]) -> dict[str, Schema]:
    """Return the schema of each model by its name; that of an experiment has sections for *engines*."""
    _, made = models_json_schema([(model, "validation") for model in _MODELS])
    defs: dict[str, Schema] = {
        model.__name__: _described(model, made["$defs"][model.__name__]) for model in _MODELS
    }
    experiment = defs[ExperimentConfig.__name__]
    experiment["additionalProperties"] = False
    fields = experiment["properties"]
    fields["backend"] = {
        "description": fields["backend"]["description"],
        **_engine_name(engines),
        "default": fields["backend"]["default"],
    }
    for name in engines:
        fields.setdefault(
            name, {"description": f"Options of the engine {name}, under its own names.", **_FREE_SECTION}
        )
    section = {"description": "Options of an engine of your own, under its own names.", **_FREE_SECTION}
    experiment["patternProperties"] = {f"^{ENGINE_CLASS.pattern}$": section}
    return defs


def _described(model: type[BaseModel], schema: Schema) -> Schema:
    """Return pydantic's *schema* of *model* with descriptions from the docstrings."""
    summary = (inspect.getdoc(model) or "").partition("\n\n")[0]
    docstrings = field_docstrings(model)
    fields = {}
    for name, given in schema["properties"].items():
        field = {key: one for key, one in given.items() if key not in ("title", "description")}
        if issubclass(model, NullableSection) and name not in schema.get("required", ()):
            field = _or_null(field)
        fields[name] = {"description": _plain(docstrings[name]), **field}
    rest = {key: one for key, one in schema.items() if key != "title"}
    return {**rest, "description": _plain(summary), "properties": fields}


def _or_null(field: Schema) -> Schema:
    if _NULL in field.get("anyOf", ()):
        return field
    default = {"default": field["default"]} if "default" in field else {}
    return {"anyOf": [{key: one for key, one in field.items() if key != "default"}, _NULL], **default}


def _plain(text: str) -> str:
    """Return reStructuredText as plain text on one line."""
    return " ".join(text.replace("``", "").split())


def _engine_name(engines: Sequence[str]) -> Schema:
    return {
        "anyOf": [
            {"enum": [*ENGINES, *engines]},
            {"type": "string", "pattern": f"^{ENGINE_CLASS.pattern}$"},
        ]
    }


def _study_keys(defs: Mapping[str, Schema]) -> dict[str, Schema]:
    """Return the schemas of the study's own keys (``grid.STUDY_KEYS``)."""
    backend = {
        key: one for key, one in defs["ExperimentConfig"]["properties"]["backend"].items() if key == "anyOf"
    }
    rules = {"anyOf": [{"type": "array", "items": _reference(Rule)}, _NULL]}
    return {
        "name": {
            "description": "Name of the study, with which the name of its results directory begins. "
            "Default: the file's name.",
            "type": "string",
            "pattern": r"^[^/\\\u0000-\u001f\u007f]+$",
            "not": {"enum": [".", ".."]},
            "maxLength": 200,
        },
        "version": {"description": "Version of LLenergyMeasure's study format. Accepted and ignored."},
        "base": {
            "description": "Another file, relative to this one, with experiment fields that this file overrides.",
            "anyOf": [{"type": "string", "minLength": 1}, _NULL],
        },
        "sweep": {
            "description": "Values by axis. An axis is a field, dotted if in a section (pytorch.batch_size). "
            "Every combination is a point; the last axis changes fastest.",
            "type": "object",
            "minProperties": 1,
            "properties": dict(_axes(defs, ExperimentConfig.__name__)),
            "patternProperties": dict(_open_axes(defs, ExperimentConfig.__name__)),
            "additionalProperties": False,
        },
        "experiments": {
            "description": "Explicit points: each has the fields in which it differs from those of the study.",
            "type": "array",
            "minItems": 1,
            "items": _entry(defs[ExperimentConfig.__name__]),
        },
        "runners": {
            "description": f"Environment of each engine's experiments: {LOCAL} for this one (the default), "
            "or the path of a Python interpreter, absolute, with ~, or relative to this file.",
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": backend,
                    "additionalProperties": {"type": "string", "minLength": 1},
                },
                _NULL,
            ],
        },
        "execution": {
            "description": "Execution settings, which do not change what is measured.",
            "anyOf": [_reference(ExecutionConfig), _NULL],
        },
        "budgets": _budgets(),
        "gates": {
            "description": "Settings of comparisons with --llem-baseline or --llem-against.",
            "anyOf": [_reference(GatesConfig), _NULL],
        },
        "skip": {"description": "Points that are not run.", **rules},
        "xfail": {"description": "Points that are expected to fail.", **rules},
    }


def _entry(experiment: Schema) -> Schema:
    """Return the schema of an entry of ``experiments``: an experiment's fields and its own budgets."""
    fields = {
        name: {"description": one["description"], **_reference(ExperimentConfig, name)}
        for name, one in experiment["properties"].items()
    }
    own = "Limits on the results of this point; they replace the study's budgets."
    return {
        "type": "object",
        "properties": {**fields, "budgets": {"description": own, "$ref": "#/properties/budgets"}},
        "patternProperties": experiment["patternProperties"],
        "additionalProperties": False,
    }


def _budgets() -> Schema:
    limit = [{"type": "number"}, _reference(LimitConfig)]
    metrics = {
        name: {"description": f"{one.meaning}. In {one.unit}: the maximum, or {{max, min}}.", "anyOf": limit}
        for name, one in CATALOGUE.items()
    }
    return {
        "description": "Limits on the mean over the cycles, by metric, or a list with limits for some points.",
        "anyOf": [
            {"type": "object", "properties": metrics, "additionalProperties": False},
            {"type": "array", "items": _reference(BudgetConfig)},
            _NULL,
        ],
    }


def _axes(defs: Mapping[str, Schema], model: str, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield the fields of *model* as axes by dotted path, each followed by the fields inside it."""
    for name, field in defs[model]["properties"].items():
        path = f"{prefix}{name}"
        value = {"$ref": f"#/$defs/{model}/properties/{name}"}
        is_list = any(kind.get("type") == "array" for kind in _kinds(field))
        yield path, _listable(value, field["description"], is_list=is_list)
        for kind in _kinds(field):
            if "$ref" in kind:
                yield from _axes(defs, _target(kind), f"{path}.")


def _open_axes(defs: Mapping[str, Schema], model: str, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield the axes inside mappings with arbitrary keys, by the pattern of their dotted paths."""
    for name, field in defs[model]["properties"].items():
        path = f"{prefix}{name}"
        for kind in _kinds(field):
            inner = defs[_target(kind)] if "$ref" in kind else kind
            if values := inner.get("additionalProperties"):
                yield _inside(path), _listable({} if values is True else values, field["description"])
            elif "$ref" in kind:
                yield from _open_axes(defs, _target(kind), f"{path}.")
    for pattern, section in defs[model].get("patternProperties", {}).items():
        kind = {key: one for key, one in section.items() if key != "description"}
        yield pattern, _listable(kind, section["description"])
        yield f"{pattern.removesuffix('$')}\\..+", _listable({}, section["description"])


def _kinds(field: Schema) -> list[Schema]:
    """Return the alternative schemas of a field."""
    return list(field.get("anyOf", [field]))


def _target(kind: Schema) -> str:
    """Return the name of the definition that *kind* refers to."""
    return str(kind["$ref"]).rpartition("/")[2]


def _inside(path: str) -> str:
    """Return a pattern of the dotted paths below *path*."""
    return "^" + _SPECIAL.sub(r"\\\g<0>", path) + r"\..+"


def _listable(value: Schema, description: str, *, is_list: bool = False) -> Schema:
    """Return the schema of a *value* or of a non-empty list of values; if a value *is_list*, only the latter."""
    if not value:  # any value but an empty list
        return {"description": description, "minItems": 1}
    several = {"type": "array", "items": value, "minItems": 1}
    return {"description": description, **(several if is_list else {"anyOf": [value, several]})}


def _reference(model: type[BaseModel], field: str | None = None) -> Schema:
    inner = f"/properties/{field}" if field else ""
    return {"$ref": f"#/$defs/{model.__name__}{inner}"}


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields, also of inherited ones, by the fields' names.

    pydantic's ``use_attribute_docstrings`` would read them whenever a class is made, which is nearly half of the
    import time of each process.

    Example:
        >>> from pytest_llem.results.metrics import Metric
        >>> field_docstrings(Metric)["value"]
        'Value in ``unit``; null if it is not available, never 0 instead.'
    """
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if one.__module__.startswith("pytest_llem."):
            found |= _of_classes(one.__module__)[one.__name__]
    return found


@cache
def _of_classes(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of fields by the names of a module's classes."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {one.name: dict(_of_fields(one)) for one in tree.body if isinstance(one, ast.ClassDef)}


def _of_fields(definition: ast.ClassDef) -> list[tuple[str, str]]:
    return [
        (field.target.id, inspect.cleandoc(text.value.value))
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]


if __name__ == "__main__":  # generates pytest_llem/study.schema.json
    print(schema_text(), end="")
