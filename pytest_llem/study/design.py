"""Hold a validated study: its points, experiments, run order and measurement protocol."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.execution import CycleOrder, ExecutionConfig
from pytest_llem.study.gates import Budget, GatesConfig
from pytest_llem.study.identity import experiment_id, short_names
from pytest_llem.study.problems import Problem
from pytest_llem.study.runners import interpreter_path
from pytest_llem.study.server import SERVER, is_attached
from pytest_llem.study.server_command import server_hash


@dataclass(frozen=True, slots=True)
class Point:
    """One resolved configuration of a study.

    Attributes:
        id: Such as ``precision=bf16-batch_size=8``.
        axes: Value by dotted axis, for the axes in which the study's points differ.
        config: The whole configuration.
        config_hash: 16 hex digits that identify ``config``.
        skip: Reason to skip the point, or None.
        xfail: Reason to expect a failure, or None.
    """

    id: str
    axes: dict[str, Any]
    config: ExperimentConfig
    config_hash: str
    skip: str | None = None
    xfail: str | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """One cycle of one point: one pytest item, run in one process.

    Attributes:
        id: The point's id, with the cycle if there is more than one.
        index: Position in run order, from 0.
        cycle: Number of the repetition, from 1.
        point: The point.
    """

    id: str
    index: int
    cycle: int
    point: Point


@dataclass(frozen=True)
class Excluded:
    """A combination of the grid that is not a valid experiment or repeats another, and the reason."""

    axes: dict[str, Any]
    config: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class StudyConfig:
    """A study file, read and validated.

    Example:
        study = load_study("studies/llama.yaml")
        print(study.name, len(study.points), study.n_cycles)

    Attributes:
        path: The file.
        line: Line of the sweep, or else of ``experiments``, from 1.
        name: The study's name.
        text: Content of the file.
        base_text: Content of its base, or None.
        points: Its points, in file order.
        excluded: Combinations that are left out, invalid or repeated.
        execution: Execution settings.
        runners: Runner of each engine, as in the file; engines without a runner run in this environment.
        design_hash: 16 hex digits over the points; the same for the same study on every machine.
        notes: Notes for its author that are not errors.
        budgets: Limits on the results, one per metric and point.
        gates: Settings of comparisons.
        gates_line: Line of the section ``gates``, or else ``line``.
        reference: Name of the reference of a comparison, if the experiments are its own; else None.
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
    reference: str | None = None

    @property
    def n_cycles(self) -> int:
        """Repetitions of every point; the maximum if their number is determined during the run."""
        return self.execution.cycle_limit

    @property
    def min_cycles(self) -> int:
        """Repetitions that every point has at least."""
        return self.execution.min_cycles if self.execution.until_decided else self.n_cycles

    @property
    def output_dir(self) -> str | None:
        """Parent of the results directory, relative to rootdir; None if the options determine it."""
        return self.points[0].config.output_dir

    def of_reference(self, python: Path, name: str) -> StudyConfig:
        """Return a copy of the study for a reference: every experiment runs in the interpreter *python*.

        Args:
            python: The interpreter.
            name: Name of the reference.
        """
        backends = {point.config.backend for point in self.points}
        return replace(self, runners=dict.fromkeys(backends, str(python)), reference=name)

    def interpreter(self, backend: str) -> Path | None:
        """Return the Python interpreter of an engine's experiments; None for this one."""
        # A server's experiments run in this interpreter: they only send requests.
        runner = None if backend == SERVER else self.runners.get(backend)
        return None if runner is None else interpreter_path(runner, self.path.parent)

    @property
    def server_interpreter(self) -> Path | None:
        """The Python interpreter of servers; None for this one."""
        runner = self.runners.get(SERVER)
        return None if runner is None else interpreter_path(runner, self.path.parent)

    def compared_metrics(self, point: Point) -> tuple[str, ...]:
        """Return the metrics of *point* that are compared with a reference."""
        load = point.config.load
        return self.gates.family_of(None if load is None else load.model_dump())

    @cached_property
    def family(self) -> tuple[str, ...]:
        """The metrics of all gates of a comparison, one for each gate."""
        return tuple(metric for point in self.points for metric in self.compared_metrics(point))

    @cached_property
    def axis_names(self) -> dict[str, str]:
        """Short name of each dotted axis of the study."""
        return short_names(dict.fromkeys(axis for point in self.points for axis in point.axes))

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """Every point in every cycle, in run order."""
        execution = self.execution
        seed = self.design_hash if execution.shuffle_seed is None else execution.shuffle_seed
        order = run_order(self.server_groups, self.n_cycles, execution.cycle_order, seed)
        return tuple(
            Experiment(experiment_id(self.points[p].id, cycle, self.n_cycles), index, cycle, self.points[p])
            for index, (p, cycle) in enumerate(order)
        )

    def server_group(self, experiment: Experiment) -> str:
        """Return a text that is equal for experiments that share a server in one cycle."""
        config = experiment.point.config
        if self.execution.server_reuse == "never" and not is_attached(config):
            return experiment.id
        return f"{experiment.cycle} {server_hash(config)}"

    @property
    def server_groups(self) -> list[object]:
        """A value for each point, equal for points that share a server, and therefore follow each other."""
        if self.execution.server_reuse == "never":
            return [*range(len(self.points))]
        return [
            server_hash(point.config) if point.config.backend == SERVER else index
            for index, point in enumerate(self.points)
        ]


def run_order(
    groups: Sequence[object], n_cycles: int, order: CycleOrder, seed: int | str
) -> list[tuple[int, int]]:
    """Return ``(point, cycle)`` pairs in run order; points count from 0, cycles from 1.

    Every order but ``sequential`` runs each point once per cycle, so that drift of the machine affects all points
    alike.

    Args:
        groups: For each point, its group: the points of a group follow each other within a cycle.
        n_cycles: Number of cycles.
        order: Order of the groups in a cycle, and of the points in a group.
        seed: Seed of the order ``shuffled``.
    """
    members: dict[object, list[int]] = {}
    for point, group in enumerate(groups):
        members.setdefault(group, []).append(point)
    cycles = range(1, n_cycles + 1)
    if order == "sequential":
        return [(point, cycle) for points in members.values() for cycle in cycles for point in points]
    pairs = []
    for cycle in cycles:
        parts = [[*points] for points in members.values()]
        if order == "shuffled":
            rng = random.Random(f"{seed}:{cycle}")
            rng.shuffle(parts)
            for points in parts:
                rng.shuffle(points)
        pairs += [(point, cycle) for points in parts for point in points]
    return pairs


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a study.

    Attributes:
        number: Number of the shard, from 1.
        count: Number of shards.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that *text* names, such as ``2/8``.

        Raises:
            ValueError: *text* is not ``I/N`` with 1 ≤ I ≤ N.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"must be I/N, the shard's number from 1 and the number of shards (got {text!r})")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def points(self, study: StudyConfig) -> set[str]:
        """Return the ids of the shard's points.

        They follow from the study alone, whatever is selected, so they are the same on every machine. All cycles
        of a point are in one shard, so that they run on one machine; so are points that share a server.

        Example:
            >>> Shard(1, 2).points(study)  # the first, third, … point
        """
        groups: dict[object, list[str]] = {}
        for point, group in zip(study.points, study.server_groups, strict=True):
            groups.setdefault(group, []).append(point.id)
        shards: list[set[str]] = [set() for _ in range(self.count)]
        for names in sorted(groups.values(), key=len, reverse=True):  # the largest first, for shards of equal size
            min(shards, key=len).update(names)
        return shards[self.number - 1]

    def experiments(self, study: StudyConfig) -> list[Experiment]:
        """Return the shard's experiments, in run order."""
        points = self.points(study)
        return [experiment for experiment in study.experiments if experiment.point.id in points]


_ISOLATION = {
    "spawn": "a fresh spawned process for every experiment",
    "forkserver": "a process for every experiment, forked from one that has imported and opened no device",
}

_SERVERS = {
    "attached": "a server that ran before serves all cycles",
    "load": "a fresh server for each cycle and configuration, which its loads share",
    "never": "a fresh server for every experiment",
}

_LOAD_WINDOW = "the steady state of the load; totals are per n requests"


def measurement_protocol(study: StudyConfig) -> dict[str, Any]:
    """Return the settings that all points of *study* share, as its result records them."""
    execution = study.execution
    servers = [point.config.server for point in study.points if point.config.server is not None]
    reuse = "attached" if any(server.url for server in servers) else execution.server_reuse
    # ``llem merge`` judges these budgets without pytest, which would apply the marks of skipped and xfail points.
    marked = {point.id for point in study.points if point.skip is not None or point.xfail is not None}
    budgets = [asdict(budget) for budget in study.budgets if budget.point not in marked]
    return {
        "isolation": _ISOLATION[execution.start_method],
        **({"servers": _SERVERS[reuse]} if servers else {}),
        "start_method": execution.start_method,
        "n_cycles": execution.n_cycles,
        **(execution.model_dump(include={"min_cycles", "max_cycles"}) if execution.until_decided else {}),
        "cycle_order": execution.cycle_order,
        "shuffle_seed": study.design_hash if execution.shuffle_seed is None else execution.shuffle_seed,
        "experiment_gap_seconds": execution.experiment_gap_seconds,
        "cycle_gap_seconds": execution.cycle_gap_seconds,
        "window": _LOAD_WINDOW if servers else "whole passes over all prompts; totals are per pass",
        "unit_of_repetition": "cycle",
        "interval": "Student t, 95 %" + (" after stopping, 98 % nominal" if execution.until_decided else ""),
        "gates": study.gates.model_dump(mode="json"),
        **({"budgets": budgets} if budgets else {}),
        **({"reference": study.reference} if study.reference is not None else {}),
    }
