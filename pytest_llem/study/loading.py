"""From a study file to its experiments: the one way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pytest_llem.registry import BACKENDS, installed
from pytest_llem.study.config import ExecutionConfig, ExperimentConfig
from pytest_llem.study.document import Document, KeyPath, load_document
from pytest_llem.study.grid import STUDY_KEYS, Draft, expand_grid
from pytest_llem.study.identity import config_hash, experiment_id, point_id, short_names, study_design_hash
from pytest_llem.study.order import run_order
from pytest_llem.study.problems import Problem, StudyError
from pytest_llem.study.validation import key_problems, located, section_problems

#: A study of more experiments than this stops before it starts.
MAX_EXPERIMENTS = 10_000


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
        raise StudyError([document.problem((), f"a study must be a mapping (got a {type(data).__name__})")])

    problems: list[Problem] = []
    name = data.get("name", path.name.removesuffix(path.suffix).removesuffix(".study"))
    if not isinstance(name, str) or not name or name in {".", ".."} or set(name) & set("/\\\0"):
        problems.append(document.problem(("name",), f"must be a name without path separators (got {name!r})"))
    execution = ExecutionConfig()
    try:
        execution = ExecutionConfig.model_validate(data.get("execution") or {})
    except ValidationError as error:
        problems += section_problems(document, ("execution",), ExecutionConfig, error)
    if execution.n_cycles is None:
        is_single = {"sweep", "experiments"}.isdisjoint(data)
        execution = execution.model_copy(update={"n_cycles": 1 if is_single else 3})

    shared = {key: value for key, value in data.items() if key not in STUDY_KEYS}
    backends = installed(BACKENDS)
    problems += _backend_problems(document, shared, backends)
    try:
        drafts = list(islice(expand_grid(document, shared, backends), MAX_EXPERIMENTS + 1))
    except StudyError as error:
        raise StudyError([*problems, *error.problems]) from None
    if len(drafts) * (execution.n_cycles or 1) > MAX_EXPERIMENTS:
        problems.append(document.problem(("sweep",), f"makes more than {MAX_EXPERIMENTS:,} experiments"))
        raise StudyError(problems)

    points, excluded, found = _validate(document, drafts, backends)
    problems += found
    if not problems:
        problems += _clashes(document, points)
    if not problems and not points:
        problems.append(document.problem(("sweep",), f"no valid combination: {excluded[0].reason}"))
    if problems:
        raise StudyError(problems)
    return StudyConfig(
        path=path,
        line=document.marks.get(("sweep",), document.marks.get(("experiments",), (1, 1)))[0],
        name=name,
        text=path.read_text(encoding="utf-8"),
        points=tuple(points),
        excluded=tuple(excluded),
        execution=execution,
        design_hash=study_design_hash(point.config_hash for point in points),
    )


def _backend_problems(document: Document, shared: Mapping[str, Any], backends: Sequence[str]) -> list[Problem]:
    """A lone backend beside another one's axes: one of the two is a slip, and guessing would hide it."""
    backend = shared.get("backend")
    sweep = document.data.get("sweep")
    if not isinstance(backend, str) or not isinstance(sweep, dict):
        return []
    return [
        document.problem(("sweep", axis), f"is an axis of {scope!r}, but the study's backend is {backend!r}")
        for axis in sweep
        if (scope := axis.partition(".")[0]) in backends and scope != backend
    ]


def _validate(
    document: Document, drafts: Iterable[Draft], backends: Sequence[str]
) -> tuple[list[Point], list[Excluded], list[Problem]]:
    valid: list[tuple[Draft, ExperimentConfig]] = []
    excluded: list[Excluded] = []
    problems: list[Problem] = []
    for draft in drafts:
        wrong_keys = key_problems(document, draft, backends)
        problems += wrong_keys.values()
        config = {key: value for key, value in draft.config.items() if key not in wrong_keys}
        try:
            valid.append((draft, ExperimentConfig.model_validate(config)))
        except ValidationError as error:
            found, reasons = located(document, draft, error)
            problems += found
            excluded += [Excluded(draft.axes, reason) for reason in reasons]
    names = short_names(dict.fromkeys(axis for draft, _ in valid for axis in draft.axes))
    points = [
        Point(point_id(axes, {"model": "model"} | names), axes, config, config_hash(config))
        for draft, config in valid
        for axes in [draft.axes or {"model": config.model}]
    ]
    return points, excluded, problems


def _clashes(document: Document, points: Sequence[Point]) -> list[Problem]:
    at: KeyPath = ("sweep",) if "sweep" in document.data else ("experiments",)
    same = Counter(point.config_hash for point in points)
    twice = {point.config_hash: point.id for point in points if same[point.config_hash] > 1}
    if twice:
        return [document.problem(at, f"the same experiment is there twice: {point}") for point in twice.values()]
    ids = Counter(point.id for point in points)
    return [document.problem(at, f"two experiments share the id {name}") for name, n in ids.items() if n > 1]
