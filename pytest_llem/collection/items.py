"""A study file as a test module, its experiments as parametrized test items."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llem.collection.experiment import run_experiment_item
from pytest_llem.collection.selection import keywords
from pytest_llem.options import STUDIES
from pytest_llem.study.loading import Experiment, StudyConfig, is_study, load_study
from pytest_llem.study.problems import StudyError

if TYPE_CHECKING:
    from pytest_llem.study.problems import Problem

#: Name of the test function, and of the argument that carries its experiment.
FUNCTION, ARGUMENT = "experiment", "planned"

_PASSED_OVER = (
    "{} is not collected: it has neither a sweep nor experiments "
    "(name it on the command line to run it as a single experiment)"
)


class StudyFile(pytest.Module):
    """Collects one YAML file. pytest never imports it: a module made from the study stands in.

    ``named`` says that the user named the file, so that it has to be a study; one that was found in a
    directory and is none is passed over.
    """

    named = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.obj = ModuleType(self.path.stem)  # or whoever looks at it first has pytest import the YAML

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            if not self.named and not is_study(self.path):
                message = pytest.PytestCollectionWarning(_PASSED_OVER.format(self.path.name))
                warnings.warn_explicit(message, category=None, filename=str(self.path), lineno=1)
                return []
            study = load_study(self.path)
        except StudyError as error:
            shown = _shown(self.path, self.config.invocation_params.dir)
            raise self.CollectError("\n".join(_lines(error.problems, shown))) from None
        self.config.stash.setdefault(STUDIES, {})[self.nodeid] = study
        self.obj = _study_module(study)
        # The hook that turns functions into items: markers, fixtures and -k then work as in any module.
        made: Any = self.ihook.pytest_pycollect_makeitem(
            collector=self, name=FUNCTION, obj=getattr(self.obj, FUNCTION)
        )
        items: list[pytest.Item | pytest.Collector] = list(made or ())
        for item in items:
            item.extra_keyword_matches.update(keywords(study, experiment_of(item)))
        return items

    def istestfunction(self, obj: object, name: str) -> bool:
        return name == FUNCTION  # whatever python_functions says


def experiment_of(item: pytest.Item | pytest.Collector) -> Experiment:
    """Return the experiment that an item of a StudyFile runs."""
    assert isinstance(item, pytest.Function)
    experiment = item.callspec.params[ARGUMENT]
    assert isinstance(experiment, Experiment)
    return experiment


def restore_run_order(items: list[pytest.Item]) -> None:
    """Put study items back in run order, in the places that study items hold: others stay where they are."""
    slots = [index for index, item in enumerate(items) if isinstance(item.parent, StudyFile)]
    ours = [items[index] for index in slots]
    files = {file: rank for rank, file in enumerate(dict.fromkeys(item.parent for item in ours))}
    ours.sort(key=lambda item: (files[item.parent], experiment_of(item).index))
    for index, item in zip(slots, ours, strict=True):
        items[index] = item


def _study_module(study: StudyConfig) -> ModuleType:
    """Return a module whose test function stands, as far as anyone can tell, at the study's sweep."""
    module = ModuleType(study.path.stem)
    module.__file__ = str(study.path)
    code = run_experiment_item.__code__.replace(
        co_filename=str(study.path), co_firstlineno=study.line, co_name=FUNCTION, co_qualname=FUNCTION
    )

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        experiments = study.experiments
        metafunc.parametrize(ARGUMENT, experiments, ids=[experiment.id for experiment in experiments])

    function = FunctionType(code, run_experiment_item.__globals__, FUNCTION)
    function.__module__ = module.__name__
    vars(module).update({FUNCTION: function, "pytest_generate_tests": pytest_generate_tests})
    return module


def _lines(problems: Iterable[Problem], shown: Path) -> Iterable[str]:
    return (str(replace(problem, path=shown)) for problem in problems)


def _shown(path: Path, directory: Path) -> Path:
    """Return *path* as the user would type it."""
    return Path(os.path.relpath(path, directory)) if path.is_relative_to(directory) else path
