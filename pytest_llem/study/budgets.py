"""Read ``budgets``, the limits on metrics in a study file, and combine them into one for each metric and point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath
from pytest_llem.study.gates import Budget, MetricName, metric_problem
from pytest_llem.study.problems import Problem
from pytest_llem.study.rules import PointSelector
from pytest_llem.study.section import NullableSection
from pytest_llem.study.section_errors import section_problems
from pytest_llem.study.unreachable_gates import describe_points, unreachable_gates

Bound = Literal["max", "min"]

#: Metrics that are judged even if they are below 0. ``decode_energy_j`` and ``decode_seconds``, which are
#: differences too, are not: below 0 they are noise.
SIGNED = ("active_energy_j", "peak_temperature_c")


class LimitConfig(NullableSection):
    """The limits of one metric, at least one of the two."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["max"]}, {"required": ["min"]}]})

    max: float | None = None
    """Maximum of the mean, in the metric's unit. Default null: no maximum."""
    min: float | None = None
    """Minimum of the mean, in the metric's unit. Default null: no minimum."""


class BudgetConfig(LimitConfig):
    """One entry of a list of ``budgets``."""

    metric: MetricName
    """Name of the metric. Required."""
    where: dict[str, Any] | None = Field(None, min_length=1)
    """Points that the entry applies to: value by axis or field, as in ``skip``. Default null: all."""


@dataclass(frozen=True)
class BudgetEntry:
    """A budget as written in a study file.

    Attributes:
        metric: Name of the metric in the catalogue.
        at: Position of the metric's name.
        entry: Position of the whole budget.
        bounds: Its limits, at least one.
        where: Points that it applies to; None for all.
    """

    metric: str
    at: KeyPath
    entry: KeyPath
    bounds: Mapping[Bound, float]
    where: Mapping[str, Any] | None = None


#: Budgets by scope: () for the study's, or the position of an experiment with budgets of its own, which replace
#: the study's.
Scoped = dict[KeyPath, list[BudgetEntry]]


_NOUNS: dict[Bound, str] = {"max": "maximum", "min": "minimum"}

#: A point's budgets as written, by metric.
_Pieces = dict[str, list[BudgetEntry]]

#: A conflict: the later budget, its limit that conflicts, and the earlier budget.
_Conflict = tuple[BudgetEntry, Bound, BudgetEntry]


def read_budgets(document: Document) -> tuple[Scoped, list[Problem]]:
    """Return the budgets of a study file and of its experiments, and the problems with their structure."""
    scopes: list[tuple[KeyPath, Any]] = [((), document.data)]
    if isinstance(listed := document.data.get("experiments"), list):
        scopes += [(("experiments", index), entry) for index, entry in enumerate(listed)]
    found: Scoped = {}
    problems: list[Problem] = []
    for scope, data in scopes:
        if not isinstance(data, dict) or "budgets" not in data:
            continue
        found[scope] = []
        for one in _read(document, (*scope, "budgets"), data["budgets"]):
            if isinstance(one, Problem):
                problems.append(one)
            else:
                found[scope].append(one)
    return found, problems


def _read(document: Document, at: KeyPath, given: Any) -> Iterator[BudgetEntry | Problem]:
    if isinstance(given, dict):
        for name, value in given.items():
            yield from _read_in_mapping(document, (*at, name), name, value)
    elif isinstance(given, list):
        for index, entry in enumerate(given):
            yield from _read_in_list(document, (*at, index), entry)
    elif given is not None:
        message = "must be a mapping of metrics to limits, or a list of {metric, max, min, where}"
        yield document.problem(at, f"{message} {document.given(at, given)}")


def _read_in_mapping(document: Document, at: KeyPath, name: str, value: Any) -> Iterator[BudgetEntry | Problem]:
    if message := metric_problem(name):
        is_entry = name in BudgetConfig.model_fields
        in_list = f"write a budget with {name} as an entry of a list: [{{metric: ..., max: ...}}]"
        yield document.problem(at, in_list if is_entry else message)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield _checked(document, BudgetEntry(name, at, at, {"max": float(value)}))
    elif not isinstance(value, dict):
        yield document.problem(at, f"must be a number or a mapping {{max, min}} {document.given(at, value)}")
    else:
        if "where" in value:
            form = f"[{{metric: {name}, max: ..., where: ...}}]"
            message = f"unknown key: write a budget for some points as an entry of a list: {form}"
            yield document.problem((*at, "where"), message)
            value = {key: one for key, one in value.items() if key != "where"}
        try:
            limit = LimitConfig.model_validate(value)
        except ValidationError as error:
            yield from section_problems(document, at, LimitConfig, error)
        else:
            yield _checked(document, BudgetEntry(name, at, at, _bounds(limit)))


def _read_in_list(document: Document, at: KeyPath, entry: Any) -> Iterator[BudgetEntry | Problem]:
    if isinstance(entry, dict) and "metric" not in entry and (names := [key for key in entry if key in CATALOGUE]):
        message = "unknown key: an entry of a list has the key metric: {{metric: {}, max: ...}}"
        yield from (document.problem((*at, name), message.format(name)) for name in names)
        return
    try:
        budget = BudgetConfig.model_validate(entry)
    except ValidationError as error:
        yield from section_problems(document, at, BudgetConfig, error)
        return
    if why := metric_problem(budget.metric):
        yield document.problem((*at, "metric"), why)
    else:
        yield _checked(document, BudgetEntry(budget.metric, (*at, "metric"), at, _bounds(budget), budget.where))


def _bounds(limit: LimitConfig) -> dict[Bound, float]:
    given: list[tuple[Bound, float | None]] = [("max", limit.max), ("min", limit.min)]
    return {bound: value for bound, value in given if value is not None}


def _checked(document: Document, budget: BudgetEntry) -> BudgetEntry | Problem:
    """Return *budget*, or the problem with its limits."""
    bounds = budget.bounds
    if not bounds:
        return document.problem(budget.entry, "needs a max or a min")
    if len(bounds) == 2 and bounds["min"] > bounds["max"]:
        return document.problem(budget.entry, f"min {bounds['min']:.15g} is above max {bounds['max']:.15g}")
    negative = next((bound for bound, value in bounds.items() if value < 0), None)
    if negative and budget.metric not in SIGNED:
        key = (*budget.entry, negative)
        at = key if key in document.marks else budget.entry
        return document.problem(at, f"must be at least 0, as {budget.metric} is (got {bounds[negative]:.15g})")
    return budget


def apply_budgets(
    document: Document, given: Scoped, places: Sequence[KeyPath], points: Sequence[Point]
) -> tuple[list[Budget], list[Problem], list[Problem]]:
    """Return the budgets of all points, the problems that depend on the points, and notes.

    Args:
        document: The study file.
        given: Budgets as written in the file.
        places: Position of each point in the file.
        points: All points, in file order.
    """
    selector = PointSelector(document, points)
    pieces: list[_Pieces] = [{} for _ in points]
    problems: list[Problem] = []
    notes: list[Problem] = []
    for scope, written in given.items():
        within = dict.fromkeys(index for index, at in enumerate(places) if (at if at in given else ()) == scope)
        for one in written:
            found = list(within)
            if one.where is not None:
                found, wrong = selector.find((*one.entry, "where"), one.where)
                problems += wrong
                if wrong:
                    continue
            fitting = [index for index in found if index in within]
            for index in fitting:
                pieces[index].setdefault(one.metric, []).append(one)
            if fitting:
                notes += unreachable_gates(document, one.at, one.metric, [points[index] for index in fitting])
            elif within or not scope:  # the budgets of an excluded experiment have no points and need no message
                message = _unused_budget(document, one, fits_others=bool(found), is_entry=bool(scope))
                # An error, because a budget that matches no point due to a misspelt value would never fail.
                (notes if one.where is None or found else problems).append(message)
    budgets, conflicts = _merged(document, points, pieces)
    return budgets, [*problems, *conflicts], notes


def _unused_budget(document: Document, one: BudgetEntry, *, fits_others: bool, is_entry: bool) -> Problem:
    if one.where is None:
        return document.problem(one.at, "has no effect: all entries of experiments have their own budgets")
    message = "matches no point of this study"
    if fits_others:
        elsewhere = "matches only entries of experiments with their own budgets"
        message = "does not match this entry of experiments" if is_entry else elsewhere
    return document.problem((*one.entry, "where"), message)


def _merged(
    document: Document, points: Sequence[Point], pieces: Sequence[_Pieces]
) -> tuple[list[Budget], list[Problem]]:
    """Return the budgets of all points, combined from their *pieces*, and a problem for each conflict."""
    budgets: list[Budget] = []
    conflicts: dict[tuple[KeyPath, Bound, KeyPath], tuple[_Conflict, list[Point]]] = {}
    for point, by_metric in zip(points, pieces, strict=True):
        for metric, written in by_metric.items():
            holders: dict[Bound, BudgetEntry] = {}
            for later, bound, earlier in _conflicts(written, holders):
                key = (later.at, bound, earlier.at)
                conflicts.setdefault(key, ((later, bound, earlier), []))[1].append(point)
            limits = {bound: holder.bounds[bound] for bound, holder in holders.items()}
            line = _line(document, written[0])
            budgets.append(
                Budget(f"{metric}-{point.id}", metric, point.id, limits.get("max"), limits.get("min"), line)
            )
    return budgets, [
        _conflict_problem(document, conflict, concerned) for conflict, concerned in conflicts.values()
    ]


def _conflicts(written: Sequence[BudgetEntry], holders: dict[Bound, BudgetEntry]) -> Iterator[_Conflict]:
    """Record in *holders* which of a point's budgets on one metric gives each limit, and yield conflicts."""
    for one in written:
        for bound, value in one.bounds.items():
            holder = holders.setdefault(bound, one)
            if holder is not one:
                yield one, bound, holder
                continue
            opposite: Bound = "min" if bound == "max" else "max"
            other = holders.get(opposite)
            if other and (value < other.bounds[opposite] if bound == "max" else value > other.bounds[opposite]):
                yield one, bound, other


def _conflict_problem(document: Document, conflict: _Conflict, concerned: Sequence[Point]) -> Problem:
    later, bound, earlier = conflict
    key = (*later.entry, bound)
    at = key if key in document.marks else later.at
    line = _line(document, earlier)
    if bound in earlier.bounds:
        message = f"{later.metric} has a {_NOUNS[bound]} for {describe_points(concerned)} already (line {line})"
        return document.problem(at, f"{message}; restrict one of them with where")
    opposite: Bound = "min" if bound == "max" else "max"
    figures = f"{bound} {later.bounds[bound]:.15g}", f"{opposite} {earlier.bounds[opposite]:.15g} (line {line})"
    return document.problem(at, f"{figures[0]} conflicts with {figures[1]} for {describe_points(concerned)}")


def _line(document: Document, written: BudgetEntry) -> int:
    """Return the line on which a budget names its metric."""
    return document.problem(written.at, "").line
