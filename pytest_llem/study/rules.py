"""``skip`` and ``xfail``: which points pytest is told not to run, or to expect to fail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.execution import Rule
from pytest_llem.study.grid import flatten
from pytest_llem.study.identity import same_value, short_names
from pytest_llem.study.problems import Problem, did_you_mean, shown
from pytest_llem.study.validation import section_problems

Kind = Literal["skip", "xfail"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: A rule, where it stands, and of which kind it is.
Placed = tuple[Kind, KeyPath, Rule]


def read_rules(document: Document) -> tuple[list[Placed], list[Problem]]:
    """Return the rules of a study file, and what is wrong with their shape."""
    rules: list[Placed] = []
    problems: list[Problem] = []
    for kind in KINDS:
        given = document.data.get(kind)
        if given is not None and not isinstance(given, list):
            message = f"must be a list of {{where, reason}} {document.given((kind,), given)}"
            problems.append(document.problem((kind,), message))
            continue
        for index, entry in enumerate(given or ()):
            try:
                rules.append((kind, (kind, index), Rule.model_validate(entry)))
            except ValidationError as error:
                problems += _misplaced(document, (kind, index), entry) or section_problems(
                    document, (kind, index), Rule, error
                )
    return rules, problems


def _misplaced(document: Document, at: KeyPath, entry: Any) -> list[Problem]:
    """Return what is wrong where points are named in a rule itself and not under ``where``."""
    if not isinstance(entry, dict) or "where" in entry:
        return []
    told = "unknown key: points are named under where, as where: {{{}: ...}}"
    wrong = [key for key in entry if key not in Rule.model_fields]
    return [document.problem((*at, key), told.format(dotted((key,)))) for key in wrong]


def apply_rules(
    document: Document, rules: Sequence[Placed], points: Sequence[Point]
) -> tuple[list[Point], list[Problem], list[Problem]]:
    """Return the points with what the rules say of them, mistakes in the rules, and rules that fit no point."""
    points = list(points)
    problems: list[Problem] = []
    notes: list[Problem] = []
    axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
    full = {short: axis for axis, short in short_names(axes).items()} | {axis: axis for axis in axes}
    for kind, at, rule in rules:
        if not rule.reason.isprintable():
            problems.append(
                document.problem((*at, "reason"), f"must be one line of text (got {shown(rule.reason)})")
            )
        where = dict(flatten(rule.where))  # a section may be written as experiments have it
        unknown = [name for name in where if name not in full and not _is_field(name)]
        for name in unknown:
            hint = did_you_mean(name, (*full, *ExperimentConfig.model_fields))
            place = name if name in rule.where else name.partition(".")[0]
            problem = document.problem((*at, "where", place), f"is no axis and no field{hint}")
            problems.append(replace(problem, where=dotted((*at, "where", name))))
        if unknown:
            continue
        wanted = {full.get(name, name): value for name, value in where.items()}
        fitting = [index for index, point in enumerate(points) if _fits(point, wanted)]
        if not fitting:
            notes.append(document.problem((*at, "where"), "fits no point of this study"))
        reason = rule.reason or ", ".join(f"{name}: {json.dumps(value)}" for name, value in rule.where.items())
        for index in fitting:
            point = points[index]
            points[index] = replace(point, skip=reason) if kind == "skip" else replace(point, xfail=reason)
    return points, problems, notes


def _is_field(name: str) -> bool:
    """Whether *name* is the dotted path of a field that holds a value, and no section."""
    model: Any = ExperimentConfig
    for part in name.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return model is dict
        if part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
        kinds = [getattr(one, "__origin__", one) for one in (annotation, *get_args(annotation))]
        model = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel | dict)), None)
    return model is None or name == "dataset"


def _fits(point: Point, wanted: Mapping[str, Any]) -> bool:
    for name, value in wanted.items():
        actual = point.axes[name] if name in point.axes else _value(point.config, name)
        either = [value, *(value if isinstance(value, list) else ())]
        if not any(same_value(actual, one) for one in either):
            return False
    return True


def _value(config: ExperimentConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value
