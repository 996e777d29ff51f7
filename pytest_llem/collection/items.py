"""A study file as a test module, its experiments as parametrized test items."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import pytest

from pytest_llem.collection.selection import keywords
from pytest_llem.options import SELECTED_AXES, STUDIES, Settings
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.loading import TooManyError, is_study, load_study
from pytest_llem.study.problems import StudyError

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
        with _no_garbage():
            return self._items()

    def _items(self) -> list[pytest.Item | pytest.Collector]:
        try:
            if not self.named and not is_study(self.path):
                message = pytest.PytestCollectionWarning(_PASSED_OVER.format(self.path.name))
                warnings.warn_explicit(message, category=None, filename=str(self.path), lineno=1)
                return []
            study = load_study(self.path, Settings.from_config(self.config).overrides)
        except StudyError as error:
            here = self.config.invocation_params.dir
            lines = [str(problem.shown_from(here)) for problem in error.problems]
            if isinstance(error, TooManyError):
                lines[-1] += f"; {_time(error, self.config)}"
            raise self.CollectError("\n".join(lines)) from None
        self.config.stash.setdefault(STUDIES, {})[self.nodeid] = study
        self.obj = _study_module(study)
        # The hook that turns functions into items: markers, fixtures and -k then work as in any module.
        made: Any = self.ihook.pytest_pycollect_makeitem(
            collector=self, name=FUNCTION, obj=getattr(self.obj, FUNCTION)
        )
        items: list[pytest.Item | pytest.Collector] = list(made or ())
        if named := self.config.stash.get(SELECTED_AXES, None):
            for item in items:
                item.extra_keyword_matches.update(keywords(study, experiment_of(item), named))
        return items

    def istestfunction(self, obj: object, name: str) -> bool:
        return name == FUNCTION  # whatever python_functions says


# The body of every study item. It bears the name ``experiment`` and the study's place, and so fails there.
def _run(planned: Experiment, request: pytest.FixtureRequest) -> None:
    from pytest_llem.collection.experiment import explain, run_item  # not needed to collect

    if (error := run_item(planned, request.node)) is not None:
        pytest.fail(explain(error, request.config.option.tbstyle), pytrace=False)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Leave the garbage collector out of it: what is made here stays to the end of the session, and looking
    through it again and again takes as long as making it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def experiment_of(item: pytest.Item | pytest.Collector) -> Experiment:
    """Return the experiment that an item of a StudyFile runs."""
    assert isinstance(item, pytest.Function)
    experiment = item.callspec.params[ARGUMENT]
    assert isinstance(experiment, Experiment)
    return experiment


def restore_run_order(items: list[pytest.Item]) -> None:
    """Put study items back in run order, in the places that study items hold: others stay where they are."""
    slots = []
    by_file: dict[str, list[pytest.Item]] = {}
    for index, item in enumerate(items):
        if isinstance(item.parent, StudyFile):
            slots.append(index)
            by_file.setdefault(item.parent.nodeid, []).append(item)
    ours = (item for file in by_file.values() for item in sorted(file, key=lambda one: experiment_of(one).index))
    for index, item in zip(slots, ours, strict=True):
        items[index] = item


def _time(error: TooManyError, config: pytest.Config) -> str:
    from pytest_llem.planning.estimate import duration_text
    from pytest_llem.planning.preflight import rough_seconds

    each = None
    if error.first is not None and error.total < 10**12:
        each = rough_seconds(error.first, error.execution, Settings.from_config(config).model_path)
    return "they take an unknown time" if each is None else f"they take about {duration_text(each * error.total)}"


def _marked(experiment: Experiment) -> Any:
    """Return an experiment with the marks that the study's rules come to."""
    point = experiment.point
    if not point.skip and not point.xfail:
        return experiment
    marks = [pytest.mark.skip(reason=point.skip)] if point.skip else []
    if point.xfail:
        marks.append(pytest.mark.xfail(reason=point.xfail))
    return pytest.param(experiment, marks=marks)


def _study_module(study: StudyConfig) -> ModuleType:
    """Return a module whose test function stands, as far as anyone can tell, at the study's sweep."""
    module = ModuleType(study.path.stem)
    module.__file__ = str(study.path)
    code = _run.__code__.replace(
        co_filename=str(study.path), co_firstlineno=study.line, co_name=FUNCTION, co_qualname=FUNCTION
    )

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        experiments = study.experiments
        ids = [experiment.id for experiment in experiments]
        metafunc.parametrize(ARGUMENT, [_marked(experiment) for experiment in experiments], ids=ids)

    function = FunctionType(code, _run.__globals__, FUNCTION)
    function.__module__ = module.__name__
    vars(module).update({FUNCTION: function, "pytest_generate_tests": pytest_generate_tests})
    return module
