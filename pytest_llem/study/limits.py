"""Combine the written budgets into one budget for each metric and point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_llem.study.budgets import Bound, BudgetEntry, Scoped
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath
from pytest_llem.study.gates import Budget
from pytest_llem.study.point_selector import PointSelector
from pytest_llem.study.problems import Problem
from pytest_llem.study.unreachable_gates import describe_points, unreachable_gates

_NOUNS: dict[Bound, str] = {"max": "maximum", "min": "minimum"}

#: A point's budgets as written, by metric.
_Pieces = dict[str, list[BudgetEntry]]

#: A conflict: the later budget, its limit that conflicts, and the earlier budget.
_Clash = tuple[BudgetEntry, Bound, BudgetEntry]


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
    finder = PointSelector(document, points)
    pieces: list[_Pieces] = [{} for _ in points]
    problems: list[Problem] = []
    notes: list[Problem] = []
    for scope, written in given.items():
        within = dict.fromkeys(index for index, at in enumerate(places) if (at if at in given else ()) == scope)
        for one in written:
            found = list(within)
            if one.where is not None:
                found, wrong = finder.find((*one.entry, "where"), one.where)
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
    budgets, clashes = _merged(document, points, pieces)
    return budgets, [*problems, *clashes], notes


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
    clashes: dict[tuple[KeyPath, Bound, KeyPath], tuple[_Clash, list[Point]]] = {}
    for point, by_metric in zip(points, pieces, strict=True):
        for metric, written in by_metric.items():
            holders: dict[Bound, BudgetEntry] = {}
            for later, bound, earlier in _clashing(written, holders):
                key = (later.at, bound, earlier.at)
                clashes.setdefault(key, ((later, bound, earlier), []))[1].append(point)
            limits = {bound: holder.bounds[bound] for bound, holder in holders.items()}
            line = _line(document, written[0])
            budgets.append(
                Budget(f"{metric}-{point.id}", metric, point.id, limits.get("max"), limits.get("min"), line)
            )
    return budgets, [_problem(document, clash, concerned) for clash, concerned in clashes.values()]


def _clashing(written: Sequence[BudgetEntry], holders: dict[Bound, BudgetEntry]) -> Iterator[_Clash]:
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


def _problem(document: Document, clash: _Clash, concerned: Sequence[Point]) -> Problem:
    later, bound, earlier = clash
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
