"""Collect a result file, of another tool or of a study, as a test module whose items are budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_llem._plugin.stash import RESULTS
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.verdict_text import verdict_text
from pytest_llem.importers.formats import read_runs
from pytest_llem.measurement.imported_study import point_results, points_of
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.budgets import Scoped, apply_budgets, read_budgets
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, load_document
from pytest_llem.study.gates import Budget
from pytest_llem.study.identity import short_names
from pytest_llem.study.problems import Problem, StudyError, did_you_mean

#: Budgets select points by their axes: the fields of an experiment that was not run here are not known.
_NO_FIELDS = ExperimentConfig.model_validate({"backend": "command", "command": {"run": ["imported"]}})


class ResultFile(pytest.File):
    """A result file, with an item for each budget of each of its points."""

    def collect(self) -> Iterable[pytest.Item]:
        self.config.stash[RESULTS] = True
        path = self.config.invocation_params.dir / self.config.getoption("llem_budgets")
        try:
            points = {point.id: point for point in read_points(self.path)}
            budgets = budgets_of(path, points.values())
        except StudyError as error:
            lines = (str(one.shown_from(self.config.invocation_params.dir)) for one in error.problems)
            raise self.CollectError("\n".join(lines)) from None
        except (ValueError, OSError) as error:  # ImportFileError is a ValueError
            raise self.CollectError(str(error)) from None
        for budget in budgets:
            item: BudgetItem = BudgetItem.from_parent(self, name=f"budget[{budget.id}]")
            item.gate = BudgetGate(budget, points[budget.point], path)
            yield item


@dataclass(frozen=True)
class BudgetGate:
    """A budget, the point that it limits, and the file of the budgets."""

    budget: Budget
    point: PointResult
    file: Path


class BudgetItem(pytest.Item):
    """A test that fails if a metric of a result is beyond its limits."""

    gate: BudgetGate

    def runtest(self) -> None:
        verdict = judge_budget(self.gate.budget, self.gate.point, file=str(self.gate.file))
        self.user_properties += [("llem_verdict", verdict.verdict), ("llem_mean", verdict.mean)]
        if verdict.outcome == "failed":
            pytest.fail(verdict_text(verdict), pytrace=False)
        self.add_report_section("call", "llem", verdict_text(verdict))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.gate.file, self.gate.budget.line - 1, self.name


def read_points(file: Path) -> list[PointResult]:
    """Return the points in a result file, of another tool or of a study.

    Raises:
        ImportFileError: The file cannot be imported.
        ValueError: It is the result of a study, and invalid.
        OSError: It cannot be read.
    """
    if file.name == "study_result.json":
        return StudyResult.read(file).points
    return point_results(points_of(read_runs([file]), {}))


def budgets_of(file: Path, points: Iterable[PointResult]) -> list[Budget]:
    """Return the budgets in the YAML *file*, one for each metric and point that it limits.

    Raises:
        StudyError: The file is invalid, or selects points by a name that is not an axis.
    """
    document = load_document(file)
    if not isinstance(document.data, dict) or "budgets" not in document.data:
        raise StudyError([document.problem((), "has no key 'budgets', as a study has it")])
    known = [Point(point.id, point.axes, _NO_FIELDS, point.config_hash) for point in points]
    scoped, problems = read_budgets(document)
    given: Scoped = {(): scoped.get((), [])}  # those of the file, not those of experiments
    problems += _unknown_axes(document, given, known)
    if problems:
        raise StudyError(problems)
    budgets, problems, _ = apply_budgets(document, given, [() for _ in known], known)
    if problems:
        raise StudyError(problems)
    return budgets


def _unknown_axes(document: Document, given: Scoped, points: list[Point]) -> Iterator[Problem]:
    short = short_names(dict.fromkeys(axis for point in points for axis in point.axes))
    names = tuple(dict.fromkeys([*short.values(), *short]))
    for budget in given[()]:
        for name in budget.where or ():
            if name not in names:
                hint = did_you_mean(name, names) or f" (there are: {', '.join(names)})"
                yield document.problem((*budget.entry, "where", name), f"is not an axis of the results{hint}")
