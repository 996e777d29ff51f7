"""Read ``skip`` and ``xfail`` rules, and find the points that a ``where`` matches."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.execution import Rule
from pytest_llem.study.identity import same_value, short_names
from pytest_llem.study.problems import Problem, did_you_mean, shown
from pytest_llem.study.section import flatten
from pytest_llem.study.section_errors import section_problems

Kind = Literal["skip", "xfail"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Kind of a rule, its position in the file, and the rule.
PlacedRule = tuple[Kind, KeyPath, Rule]


def read_rules(document: Document) -> tuple[list[PlacedRule], list[Problem]]:
    """Return the rules of a study file, and the problems with their structure."""
    rules: list[PlacedRule] = []
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
    """Return a problem for each axis or field that is given in the rule itself instead of under ``where``."""
    if not isinstance(entry, dict) or "where" in entry:
        return []
    message = "unknown key: select points under where, as in where: {{{}: ...}}"
    wrong = [key for key in entry if key not in Rule.model_fields]
    return [document.problem((*at, key), message.format(dotted((key,)))) for key in wrong]


def apply_rules(
    document: Document, rules: Sequence[PlacedRule], points: Sequence[Point]
) -> tuple[list[Point], list[Problem], list[Problem]]:
    """Return the points with their skip and xfail reasons, problems with the rules, and notes on unused rules."""
    points = list(points)
    problems: list[Problem] = []
    notes: list[Problem] = []
    selector = PointSelector(document, points)
    for kind, at, rule in rules:
        if not rule.reason.isprintable():
            problems.append(
                document.problem((*at, "reason"), f"must be one line of text (got {shown(rule.reason)})")
            )
        fitting, wrong = selector.find((*at, "where"), rule.where)
        problems += wrong
        if wrong:
            continue
        if not fitting:
            notes.append(document.problem((*at, "where"), "matches no point of this study"))
        reason = rule.reason or ", ".join(f"{name}: {json.dumps(value)}" for name, value in rule.where.items())
        for index in fitting:
            point = points[index]
            points[index] = replace(point, skip=reason) if kind == "skip" else replace(point, xfail=reason)
    return points, problems, notes


class PointSelector:
    """Select points of a study by their axes and fields.

    Args:
        document: The study file.
        points: All points of the study.
    """

    def __init__(self, document: Document, points: Sequence[Point]) -> None:
        self._document = document
        self._points = points
        axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
        #: Dotted axis, by its short name and by its dotted name.
        self._axis_of = {short: axis for axis, short in short_names(axes).items()} | {axis: axis for axis in axes}

    def find(self, at: KeyPath, where: Mapping[str, Any]) -> tuple[list[int], list[Problem]]:
        """Return the indices of the points that match *where*, and problems with it.

        Args:
            at: Position of *where* in the file.
            where: Value by axis or field, or a list of alternative values; all entries have to match.
        """
        flat = dict(flatten(where))  # fields of a section may be dotted or nested
        if unknown := [name for name in flat if name not in self._axis_of and not _is_field(name)]:
            return [], [self._unknown(at, name, where) for name in unknown]
        wanted = {self._axis_of.get(name, name): value for name, value in flat.items()}
        return [index for index, point in enumerate(self._points) if _matches(point, wanted)], []

    def _unknown(self, at: KeyPath, name: str, where: Collection[str]) -> Problem:
        hint = did_you_mean(name, (*self._axis_of, *ExperimentConfig.model_fields))
        place = name if name in where else name.partition(".")[0]
        problem = self._document.problem((*at, place), f"is neither an axis nor a field{hint}")
        return replace(problem, where=dotted((*at, name)))


def _is_field(name: str) -> bool:
    """Return whether *name* is the dotted path of a field that has a value and is not a section."""
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


def _matches(point: Point, wanted: Mapping[str, Any]) -> bool:
    for name, value in wanted.items():
        actual = point.axes[name] if name in point.axes else _value(point.config, name)
        accepted = [value, *(value if isinstance(value, list) else ())]
        if not any(same_value(actual, one) for one in accepted):
            return False
    return True


def _value(config: ExperimentConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value
