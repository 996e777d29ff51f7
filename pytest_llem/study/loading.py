"""From a study file to its experiments: the one way in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pytest_llem.registry import BACKENDS, METERS, installed
from pytest_llem.study.config import ExecutionConfig, ExperimentConfig
from pytest_llem.study.document import Document, KeyPath, load_document
from pytest_llem.study.grid import STUDY_KEYS, Draft, expand_grid
from pytest_llem.study.identity import config_hash, experiment_id, point_id, short_names, study_design_hash
from pytest_llem.study.order import run_order
from pytest_llem.study.problems import Problem, StudyError, shown
from pytest_llem.study.validation import REQUIRED, key_problems, located, meter_problem, section_problems

#: A study of more experiments than this stops before it starts.
MAX_EXPERIMENTS = 10_000

#: What most file systems take as a name, less room for the time that is added.
MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class Point:
    """One resolved configuration of a study.

    Attributes:
        id: As in ``precision=bf16-batch_size=8``.
        axes: What distinguishes it from the study's other points: value by dotted key.
        config: The whole configuration.
        config_hash: 16 hex digits that identify ``config``.
    """

    id: str
    axes: dict[str, Any]
    config: ExperimentConfig
    config_hash: str


@dataclass(frozen=True)
class Experiment:
    """One point in one cycle: one pytest item, one process.

    Attributes:
        id: The point's id, with the cycle where there is more than one.
        index: Place in run order, from 0.
        cycle: Which repetition, from 1.
        point: What is run.
    """

    id: str
    index: int
    cycle: int
    point: Point


@dataclass(frozen=True)
class Excluded:
    """A combination of the grid that makes no valid experiment, and why."""

    axes: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class StudyConfig:
    """A study file, read and validated.

    Attributes:
        path: The file.
        line: Line of the sweep, from 1.
        name: The study's name.
        text: The file as it was read.
        points: Its points, in file order.
        excluded: Combinations left out.
        execution: How it is run.
        design_hash: 16 hex digits over the points; the same for the same study on any machine.
    """

    path: Path
    line: int
    name: str
    text: str
    points: tuple[Point, ...]
    excluded: tuple[Excluded, ...]
    execution: ExecutionConfig
    design_hash: str

    @property
    def n_cycles(self) -> int:
        """Repetitions of every point."""
        return self.execution.n_cycles or 1

    @cached_property
    def axis_names(self) -> dict[str, str]:
        """Short name by dotted axis, over all points."""
        return short_names(dict.fromkeys(axis for point in self.points for axis in point.axes))

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """Every point in every cycle, in run order."""
        execution = self.execution
        seed = self.design_hash if execution.shuffle_seed is None else execution.shuffle_seed
        order = run_order(len(self.points), self.n_cycles, execution.cycle_order, seed)
        return tuple(
            Experiment(experiment_id(self.points[p].id, cycle, self.n_cycles), index, cycle, self.points[p])
            for index, (p, cycle) in enumerate(order)
        )


def is_study(path: Path) -> bool:
    """Whether *path* has a ``sweep`` or an ``experiments`` key.

    Raises:
        StudyError: It is no readable YAML.
    """
    data = load_document(path).data
    return isinstance(data, dict) and not {"sweep", "experiments"}.isdisjoint(data)


def load_study(path: Path) -> StudyConfig:
    """Read a study file, or a file with a single experiment.

    Raises:
        StudyError: With every problem that could be found at once, each with its line and column.
    """
    document = load_document(path)
    data = document.data
    if not isinstance(data, dict):
        raise StudyError([document.problem((), f"a study must be a mapping {document.given((), data)}")])

    name, problems = _read_name(document)
    execution, wrong = _read_execution(document)
    problems += wrong
    shared = {key: value for key, value in data.items() if key not in STUDY_KEYS}
    backends = installed(BACKENDS)
    grid, misshapen = expand_grid(document, shared, backends)
    problems += misshapen
    drafts = list(islice(grid, MAX_EXPERIMENTS + 1))
    if too_many := _too_many(document, drafts, execution):
        raise StudyError([*problems, too_many])

    valid, excluded, found = _validate(document, drafts, backends)
    # What is missing may stand in the part of the file that could not be made out.
    problems += [problem for problem in found if not (misshapen and problem.message == REQUIRED)]
    if not problems and not valid:
        problems = [document.problem(draft.at, f"no valid combination: {reason}") for draft, reason in excluded]
    if problems:
        raise StudyError(problems)
    points = _points(valid)
    if clashes := _clashes(document, [draft for draft, _ in valid], points):
        raise StudyError(clashes)
    return StudyConfig(
        path=path,
        line=document.marks.get(("sweep",), document.marks.get(("experiments",), (1, 1)))[0],
        name=name,
        text=document.text,
        points=tuple(points),
        excluded=tuple(Excluded(draft.axes, reason) for draft, reason in excluded),
        execution=execution,
        design_hash=study_design_hash(point.config_hash for point in points),
    )


def _read_name(document: Document) -> tuple[str, list[Problem]]:
    """Return the study's name, which also names its results folder."""
    path = document.path
    name = document.data.get("name", path.name.removesuffix(path.suffix).removesuffix(".study") or path.stem)
    if not isinstance(name, str):
        message = f"must be a string {document.given(('name',), name)}"
    elif not name or name in {".", ".."} or set(name) & set("/\\") or not name.isprintable():
        message = f"must be a name without path separators or control characters (got {shown(name)})"
    elif len(name.encode()) > MAX_NAME_BYTES:
        message = f"must be at most {MAX_NAME_BYTES} bytes long (got {shown(name)})"
    else:
        return name, []
    return "", [document.problem(("name",), message)]


def _read_execution(document: Document) -> tuple[ExecutionConfig, list[Problem]]:
    given = document.data.get("execution")
    try:
        execution = ExecutionConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        return ExecutionConfig(n_cycles=1), section_problems(document, ("execution",), ExecutionConfig, error)
    if execution.n_cycles is None:
        is_single = {"sweep", "experiments"}.isdisjoint(document.data)
        execution = execution.model_copy(update={"n_cycles": 1 if is_single else 3})
    return execution, []


def _too_many(document: Document, drafts: Sequence[Draft], execution: ExecutionConfig) -> Problem | None:
    cycles = execution.n_cycles or 1
    if len(drafts) * cycles <= MAX_EXPERIMENTS:
        return None
    at: KeyPath = ("execution", "n_cycles")
    if len(drafts) > MAX_EXPERIMENTS or at not in document.marks:
        at = drafts[-1].at[:1]
    return document.problem(at, f"makes more than {MAX_EXPERIMENTS:,} experiments")


def _validate(
    document: Document, drafts: Iterable[Draft], backends: Sequence[str]
) -> tuple[list[tuple[Draft, ExperimentConfig]], list[tuple[Draft, str]], list[Problem]]:
    """Return what is valid, what is left out with the reason, and the mistakes."""
    valid: list[tuple[Draft, ExperimentConfig]] = []
    excluded: list[tuple[Draft, str]] = []
    problems: list[Problem] = []
    meters = installed(METERS)
    for draft in drafts:
        wrong_keys = key_problems(document, draft, backends)
        problems += wrong_keys.values()
        left_out = {*wrong_keys}
        if "backend" in wrong_keys:  # nor does the section of an engine that is not there say anything
            left_out.add(draft.config["backend"])
        try:
            config = ExperimentConfig.model_validate(
                {key: value for key, value in draft.config.items() if key not in left_out}
            )
        except ValidationError as error:
            found, reasons = located(document, draft, error)
            problems += found
            excluded.append((draft, "; ".join(reasons)))
        else:
            valid.append((draft, config))
            if wrong_meter := meter_problem(document, draft, config, meters):
                problems.append(wrong_meter)
    return valid, excluded, problems


def _points(valid: Sequence[tuple[Draft, ExperimentConfig]]) -> list[Point]:
    # What nothing distinguishes is named by its model.
    axes = [draft.axes or {"model": config.model} for draft, config in valid]
    names = short_names(dict.fromkeys(axis for one in axes for axis in one))
    return [
        Point(point_id(one, names), one, config, config_hash(config))
        for one, (_, config) in zip(axes, valid, strict=True)
    ]


def _clashes(document: Document, drafts: Sequence[Draft], points: Sequence[Point]) -> list[Problem]:
    problems: list[Problem] = []
    by_hash: dict[str, str] = {}
    by_id: set[str] = set()
    for draft, point in zip(drafts, points, strict=True):
        same = by_hash.get(point.config_hash)
        if same is not None:
            told = (
                f"{point.id} is there twice"
                if same == point.id
                else f"{point.id} is the same experiment as {same}"
            )
            problems.append(document.problem(draft.at, told))
        elif point.id in by_id:  # null and "null"
            problems.append(document.problem(draft.at, f"two experiments share the id {point.id}"))
        by_hash.setdefault(point.config_hash, point.id)
        by_id.add(point.id)
    return problems
