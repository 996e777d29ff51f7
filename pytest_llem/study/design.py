"""A study as it was understood: points, experiments, and how they are run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.execution import CycleOrder, ExecutionConfig
from pytest_llem.study.gates import Budget, GatesConfig
from pytest_llem.study.identity import experiment_id, short_names
from pytest_llem.study.problems import Problem
from pytest_llem.study.runners import interpreter_path


@dataclass(frozen=True, slots=True)
class Point:
    """One resolved configuration of a study.

    Attributes:
        id: As in ``precision=bf16-batch_size=8``.
        axes: What distinguishes it from the study's other points: value by dotted key.
        config: The whole configuration.
        config_hash: 16 hex digits that identify ``config``.
        skip: Why it is not run; null where it is.
        xfail: Why it is expected to fail; null where it is not.
    """

    id: str
    axes: dict[str, Any]
    config: ExperimentConfig
    config_hash: str
    skip: str | None = None
    xfail: str | None = None


@dataclass(frozen=True, slots=True)
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
    config: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class StudyConfig:
    """A study file, read and validated.

    Attributes:
        path: The file.
        line: Line of the sweep, from 1.
        name: The study's name.
        text: The file as it was read.
        base_text: Its base as it was read, or None.
        points: Its points, in file order.
        excluded: Combinations left out.
        execution: How it is run.
        runners: Where each engine's experiments run, by engine and as the file has it; one that is not there runs
            here.
        design_hash: 16 hex digits over the points; the same for the same study on any machine.
        notes: What its author should know and is no mistake.
        budgets: Limits on its results, of every point that they concern.
        gates: How its results are compared with others.
        gates_line: Line of that section, or of the sweep where there is none, from 1.
    """

    path: Path
    line: int
    name: str
    text: str
    base_text: str | None
    points: tuple[Point, ...]
    excluded: tuple[Excluded, ...]
    execution: ExecutionConfig
    runners: Mapping[str, str]
    design_hash: str
    notes: tuple[Problem, ...] = ()
    budgets: tuple[Budget, ...] = ()
    gates: GatesConfig = field(default_factory=GatesConfig)
    gates_line: int = 1

    @property
    def n_cycles(self) -> int:
        """Repetitions of every point."""
        return self.execution.n_cycles or 1

    @property
    def output_dir(self) -> str | None:
        """Where the study wants its results folder, relative to rootdir; None leaves it to the options."""
        return self.points[0].config.output_dir

    def with_interpreter(self, python: Path) -> StudyConfig:
        """Return the same study with every experiment in the interpreter *python*."""
        backends = {point.config.backend for point in self.points}
        return replace(self, runners=dict.fromkeys(backends, str(python)))

    def interpreter(self, backend: str) -> Path | None:
        """Return the Python interpreter that an engine's experiments run in; None where it is this one."""
        runner = self.runners.get(backend)
        return None if runner is None else interpreter_path(runner, self.path.parent)

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


def run_order(n_points: int, n_cycles: int, order: CycleOrder, seed: int | str) -> list[tuple[int, int]]:
    """Return ``(point, cycle)`` pairs in run order; points count from 0, cycles from 1.

    Every order but ``sequential`` holds each point once per cycle, so that a machine that drifts over the
    study drifts under all points alike.
    """
    if order == "sequential":
        return [(point, cycle) for point in range(n_points) for cycle in range(1, n_cycles + 1)]
    pairs = []
    for cycle in range(1, n_cycles + 1):
        points = list(range(n_points))
        if order == "shuffled":
            random.Random(f"{seed}:{cycle}").shuffle(points)
        pairs += [(point, cycle) for point in points]
    return pairs
