"""Collect a study file as a test module, with its experiments and gates as parametrized items."""

from __future__ import annotations

import gc
import os
import shlex
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from pytest_llem._plugin.baseline import baseline_of
from pytest_llem._plugin.node_ids import BUDGET, EXPERIMENT, EXPERIMENTS, REFERENCE, REGRESSION, run_key
from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem._plugin.stash import RUN_EXPERIMENT, SELECTED_AXES, STUDIES
from pytest_llem.collection.selection import keywords
from pytest_llem.gates.baselines import BaselineError
from pytest_llem.gates.gate import Gate, budget_gates, regression_gates
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.loading import TooManyExperimentsError, is_study, load_study
from pytest_llem.study.problems import StudyError

#: Arguments of the test functions: an item's experiment or gate.
EXPERIMENT_ARGUMENT, GATE_ARGUMENT = "experiment", "gate"

_NOT_COLLECTED = (
    "{} is not collected: it has neither a sweep nor experiments "
    "(name it on the command line to run it as a single experiment)"
)


class StudyFile(pytest.Module):
    """Collect one YAML file. A module built from the study takes the place of the one that pytest would import.

    Attributes:
        named: Whether the file is named on the command line and so must be a study. A file found in a directory
            that is not a study is skipped with a warning.
    """

    named = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.obj = ModuleType(self.path.stem)  # without it, the first access would make pytest import the YAML

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        with _gc_paused():
            return self._items()

    def _items(self) -> list[pytest.Item | pytest.Collector]:
        try:
            if not self.named and not is_study(self.path):
                message = pytest.PytestCollectionWarning(_NOT_COLLECTED.format(self.path.name))
                warnings.warn_explicit(message, category=None, filename=str(self.path), lineno=1)
                return []
            study = load_study(self.path, Settings.from_config(self.config).overrides)
        except StudyError as error:
            directory = self.config.invocation_params.dir
            lines = [str(problem.shown_from(directory)) for problem in error.problems]
            if isinstance(error, TooManyExperimentsError):
                lines[-1] += f"; {_time_text(error, self.config)}"
            raise self.CollectError("\n".join(lines)) from None
        studies = self.config.stash.setdefault(STUDIES, {})
        studies[self.nodeid] = study
        #: Experiments or gates of each test function, by its name.
        self._functions: dict[str, Any] = {EXPERIMENT: study.experiments}
        settings = Settings.from_config(self.config)
        if settings.against:
            if study.runners and WORKTREE in self.config.stash:
                raise self.CollectError(
                    "--llem-against=git:…: the study has runners, whose environments have their own copies of the "
                    "project: give an interpreter"
                )
            studies[run_key(self.nodeid, REFERENCE)] = study.of_reference(
                settings.against, str(settings.against_name)
            )
            self._functions[REFERENCE] = self._functions[EXPERIMENT]
        gates = self._gates(study)
        self._functions |= {kind: found for kind, found in gates.items() if found}
        self.obj = _study_module(study, self._functions)
        # Items are made by pytest's own hook, so that markers, fixtures and -k work as in any module.
        items: list[pytest.Item | pytest.Collector] = []
        for name in self._functions:
            made: Any = self.ihook.pytest_pycollect_makeitem(
                collector=self, name=name, obj=getattr(self.obj, name)
            )
            items += made or ()
        if named_axes := self.config.stash.get(SELECTED_AXES, None):
            for item in items:
                axes, cycle = _axes_and_cycle(item)
                item.extra_keyword_matches.update(keywords(study, axes, cycle, named_axes))
        return items

    def _gates(self, study: StudyConfig) -> dict[str, list[Gate]]:
        settings = Settings.from_config(self.config)
        gates = {BUDGET: budget_gates(study)}
        if settings.baseline:
            try:
                reference = baseline_of(self.config, study)
            except BaselineError as error:
                raise self.CollectError(f"--llem-baseline: {error}") from None
            gates[REGRESSION] = regression_gates(study, reference)
        elif settings.against:
            gates[REGRESSION] = regression_gates(study, None)
        return gates

    def istestfunction(self, obj: object, name: str) -> bool:
        return name in self._functions  # independent of the ini option python_functions


# Body of every experiment item; _study_module gives copies of it the item's function name and the study's line.
def _experiment_body(experiment: Experiment, request: pytest.FixtureRequest) -> None:
    if (reason := request.config.stash[RUN_EXPERIMENT](experiment, request.node)) is not None:
        pytest.fail(reason, pytrace=False)


# Body of every gate item. It never runs: the controller judges gates after all experiments.
def _gate_body(gate: Gate) -> None:
    pass


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Disable the garbage collector: collected items live to the end of the session, and scanning them repeatedly
    would double the time of collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def name_hint(files: Iterable[Path], directory: Path) -> str | None:
    """Return how to run the first study among YAML *files* that were not collected; None if there is none.

    Args:
        files: The files.
        directory: The directory that the file is shown relative to.
    """
    for file in files:
        try:
            found = is_study(file)
        except StudyError:
            continue
        if found:
            shown = Path(os.path.relpath(file, directory))
            return (
                f"{shown} looks like a study, and its name does not match llem_files: rename it to "
                f"{shown.stem}.study.yaml, or name it: pytest {shlex.quote(str(shown))}"
            )
    return None


def is_experiment(item: pytest.Item) -> bool:
    """Return whether *item* is an experiment of a study."""
    return _function(item) in EXPERIMENTS


def is_gate(item: pytest.Item) -> bool:
    """Return whether *item* is a gate of a study."""
    return isinstance(item.parent, StudyFile) and not is_experiment(item)


def is_skipped(item: pytest.Item) -> bool:
    """Return whether *item* is marked to be skipped. Conditions given as text are left to pytest."""
    return item.get_closest_marker("skip") is not None or any(map(_is_met, item.iter_markers("skipif")))


def _is_met(skipif: pytest.Mark) -> bool:
    conditions = (skipif.kwargs["condition"],) if "condition" in skipif.kwargs else skipif.args
    return not conditions or any(one and not isinstance(one, str) for one in conditions)


def experiment_of(item: pytest.Item | pytest.Collector) -> Experiment:
    """Return the experiment of a study item."""
    assert isinstance(item, pytest.Function)
    experiment = item.callspec.params[EXPERIMENT_ARGUMENT]
    assert isinstance(experiment, Experiment)
    return experiment


def gate_of(item: pytest.Item | pytest.Collector) -> Gate:
    """Return the gate of a study item."""
    assert isinstance(item, pytest.Function)
    gate = item.callspec.params[GATE_ARGUMENT]
    assert isinstance(gate, Gate)
    return gate


def run_of(item: pytest.Item) -> str:
    """Return the key of an experiment's run: the node id of its file, with a suffix for the reference.

    ``STUDIES`` has its study under the same key.
    """
    function = _function(item)
    assert function is not None
    assert item.parent is not None
    return run_key(item.parent.nodeid, function)


def study_of_item(item: pytest.Item) -> StudyConfig:
    """Return the study of an experiment."""
    return item.config.stash[STUDIES][run_of(item)]


def _function(item: pytest.Item) -> str | None:
    """Return the name of a study item's function, or None for other items."""
    return item.originalname if isinstance(item, pytest.Function) and isinstance(item.parent, StudyFile) else None


def _axes_and_cycle(item: pytest.Item | pytest.Collector) -> tuple[Mapping[str, Any], int | None]:
    """Return the axes of an item's point and its cycle; None for the cycle of a gate."""
    assert isinstance(item, pytest.Function)
    if EXPERIMENT_ARGUMENT in item.callspec.params:
        experiment = experiment_of(item)
        return experiment.point.axes, experiment.cycle
    return gate_of(item).axes, None


def deselect_other_shards(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the experiments that are not in the shard of ``--llem-shard``, and all gates.

    A gate needs the results of all shards, which ``llem merge`` has. Items of other files stay.
    """
    shard = Settings.from_config(config).shard
    if shard is None:
        return
    points = {run: shard.points(study) for run, study in config.stash.get(STUDIES, {}).items()}
    selected: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    for item in items:
        (selected if _is_in_shard(item, points) else deselected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = selected


def _is_in_shard(item: pytest.Item, points: Mapping[str, Collection[str]]) -> bool:
    if not isinstance(item.parent, StudyFile):
        return True
    return is_experiment(item) and experiment_of(item).point.id in points[run_of(item)]


def restore_run_order(items: list[pytest.Item]) -> None:
    """Sort study items into run order without moving other items.

    pytest makes items function by function, and plugins such as pytest-randomly shuffle them.

    In a comparison, each experiment is next to that of the reference; which of the two runs first alternates from
    cycle to cycle.
    """
    slots = []
    by_file: dict[str, list[pytest.Item]] = {}
    for index, item in enumerate(items):
        if isinstance(item.parent, StudyFile):
            slots.append(index)
            by_file.setdefault(item.parent.nodeid, []).append(item)
    ordered = (item for file in by_file.values() for item in sorted(file, key=_run_order_key))
    for index, item in zip(slots, ordered, strict=True):
        items[index] = item


def _run_order_key(item: pytest.Item) -> tuple[bool, int, int]:
    if not is_experiment(item):  # gates come last, in their own order
        return True, _function(item) == REGRESSION, gate_of(item).index
    experiment = experiment_of(item)
    reference_is_second = experiment.cycle % 2 == 1
    is_second = (_function(item) == REFERENCE) == reference_is_second
    return False, experiment.index, is_second


def _time_text(error: TooManyExperimentsError, config: pytest.Config) -> str:
    from pytest_llem.planning.estimate import duration_text, rough_seconds

    each = None
    if error.first is not None and error.total < 10**12:  # the time of more may not fit a float
        each = rough_seconds(error.first, error.execution, Settings.from_config(config).model_path)
    return "they take an unknown time" if each is None else f"they take about {duration_text(each * error.total)}"


def _marked(one: Any, skip: str | None, xfail: str | None) -> Any:
    """Return an experiment or gate with skip and xfail marks as the study's rules say."""
    if not skip and not xfail:
        return one
    marks = [pytest.mark.skip(reason=skip)] if skip else []
    if xfail:
        marks.append(pytest.mark.xfail(reason=xfail))
    return pytest.param(one, marks=marks)


def _study_module(study: StudyConfig, contents: Mapping[str, Sequence[Experiment] | Sequence[Gate]]) -> ModuleType:
    """Return a module whose test functions have the study's file and lines as their source.

    Args:
        study: The study.
        contents: Parameters of each function, by its name.
    """
    module = ModuleType(study.path.stem)
    module.__file__ = str(study.path)

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        name = metafunc.function.__name__
        argument = EXPERIMENT_ARGUMENT if name in EXPERIMENTS else GATE_ARGUMENT
        values = [_marked(one, *_skip_and_xfail(one)) for one in contents[name]]
        metafunc.parametrize(argument, values, ids=[one.id for one in contents[name]])

    for name, values in contents.items():
        body: Any = _experiment_body if name in EXPERIMENTS else _gate_body
        line = study.line if name in EXPERIMENTS else min(one.line for one in values if isinstance(one, Gate))
        code = body.__code__.replace(
            co_filename=str(study.path), co_firstlineno=line, co_name=name, co_qualname=name
        )
        function = FunctionType(code, body.__globals__, name)
        function.__module__ = module.__name__
        setattr(module, name, function)
    module.pytest_generate_tests = pytest_generate_tests  # type: ignore[attr-defined]
    return module


def _skip_and_xfail(one: Experiment | Gate) -> tuple[str | None, str | None]:
    """Return the reasons for which the study skips an experiment or gate, or expects it to fail; None for none."""
    source = one.point if isinstance(one, Experiment) else one
    return source.skip, source.xfail
