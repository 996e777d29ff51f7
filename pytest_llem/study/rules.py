"""Read ``skip`` and ``xfail`` rules and apply them to points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pydantic import ValidationError

from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.execution import Rule
from pytest_llem.study.point_selector import PointSelector
from pytest_llem.study.problems import Problem, shown
from pytest_llem.study.section_errors import section_problems

Kind = Literal["skip", "xfail"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Kind of a rule, its position in the file, and the rule.
Placed = tuple[Kind, KeyPath, Rule]


def read_rules(document: Document) -> tuple[list[Placed], list[Problem]]:
    """Return the rules of a study file, and the problems with their structure."""
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
    """Return a problem for each axis or field that is given in the rule itself instead of under ``where``."""
    if not isinstance(entry, dict) or "where" in entry:
        return []
    message = "unknown key: select points under where, as in where: {{{}: ...}}"
    wrong = [key for key in entry if key not in Rule.model_fields]
    return [document.problem((*at, key), message.format(dotted((key,)))) for key in wrong]


def apply_rules(
    document: Document, rules: Sequence[Placed], points: Sequence[Point]
) -> tuple[list[Point], list[Problem], list[Problem]]:
    """Return the points with their skip and xfail reasons, problems with the rules, and notes on unused rules."""
    points = list(points)
    problems: list[Problem] = []
    notes: list[Problem] = []
    finder = PointSelector(document, points)
    for kind, at, rule in rules:
        if not rule.reason.isprintable():
            problems.append(
                document.problem((*at, "reason"), f"must be one line of text (got {shown(rule.reason)})")
            )
        fitting, wrong = finder.find((*at, "where"), rule.where)
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
