"""The gates of a study, each of which is a test item, and the settings of gates in a saved result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from pytest_llem.gates.matching import missing_points
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.document import dotted
from pytest_llem.study.gates import GatesConfig, metric_problem
from pytest_llem.study.problems import error_sentence
from pytest_llem.study.section_errors import error_details


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate of one point.

    Attributes:
        kind: Kind of the gate and name of its test function.
        id: Id inside the brackets of the item's id.
        axes: Axes of the point.
        point: Id of the point.
        line: Line in the study file, from 1.
        index: Position among the study's gates of this kind, from 0.
        skip: Why the point is skipped; None if it is not.
        xfail: Why the point is expected to fail; None if it is not.
        metric: Name of the metric in the catalogue; empty for a point that only the reference has.
    """

    kind: Literal["budget", "regression"]
    id: str
    axes: Mapping[str, Any]
    point: str
    line: int
    index: int
    skip: str | None = None
    xfail: str | None = None
    metric: str = ""


def budget_gates(study: StudyConfig) -> list[Gate]:
    """Return a gate for each budget of *study*."""
    points = {point.id: point for point in study.points}
    gates = []
    for index, budget in enumerate(study.budgets):
        point = points[budget.point]
        about = point.axes, point.id, budget.line, index, point.skip, point.xfail, budget.metric
        gates.append(Gate("budget", budget.id, *about))
    return gates


def regression_gates(study: StudyConfig, reference: StudyResult | None) -> list[Gate]:
    """Return a gate for each metric of each point, and one for each point that only the reference has.

    Args:
        study: The candidate's study.
        reference: The saved result; None if the reference is measured in this run and has the same points.
    """
    line = study.gates_line
    gates = [
        Gate("regression", f"{metric}-{point.id}", point.axes, point.id, line, 0, point.skip, point.xfail, metric)
        for point in study.points
        for metric in study.compared_metrics(point)
    ]
    for one in missing_points([point.axes for point in study.points], reference) if reference else ():
        gates.append(Gate("regression", f"missing-{one.id}", one.axes, one.id, line, 0))
    return [replace(gate, index=index) for index, gate in enumerate(gates)]


def gates_of(result: StudyResult, name: object, given: Mapping[str, Any] | None = None) -> GatesConfig:
    """Return the settings of gates of a result's study.

    Args:
        result: The result.
        name: Name of the result in messages.
        given: Settings by options of a command, in place of those of the study; None if the command has no such
            options.

    Raises:
        ValueError: A setting is out of range, or another version wrote one that this version does not have.
    """
    found = {**(result.measurement_protocol.get("gates") or {}), **(given or {})}
    try:
        settings = GatesConfig.model_validate(found)
    except ValidationError as error:
        location, detail = next(error_details(error))
        where = f"--{location[0]}" if location[0] in (given or {}) else f"{name}: gates.{dotted(location)}"
        raise ValueError(f"{where}: {error_sentence(detail)} (got {detail['input']!r})") from error
    for metric in settings.metrics or ():
        if message := metric_problem(metric):
            hint = "" if given is None else ": give --metric"
            raise ValueError(f"{name}: gates.metrics: {message} (got {metric!r}){hint}")
    return settings
