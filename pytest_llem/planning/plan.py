"""What is about to run: which experiments, for how long, with how much memory, and what will not work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_llem.engines.tiny_llama import BUILTIN_NAME, cache_note
from pytest_llem.machine import idle_power as bare_machine
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.estimate import server_seconds
from pytest_llem.planning.forecast import expected
from pytest_llem.planning.preflight import Preflight
from pytest_llem.planning.resume import Replay
from pytest_llem.study.design import Experiment, Point, StudyConfig


@dataclass(frozen=True)
class Plan:
    """The part of a study that was selected.

    Attributes:
        study: All of it.
        experiments: Those that were selected, in run order.
        preflight: Knows which of them cannot run here.
        replay: The results of earlier runs that stand for some of them; None where those were not asked for.
        reference: What is measured in turns with them, to compare with; None where nothing is.
        sight: What the comparison will be able to tell, in words.
        load: That the machine is busy, in words; None where it is not.
    """

    study: StudyConfig
    experiments: Sequence[Experiment]
    preflight: Preflight
    replay: Replay | None = None
    reference: Plan | None = None
    sight: Sequence[str] = ()
    load: str | None = None

    @property
    def python(self) -> str:
        """The interpreters that it runs in, other than this one."""
        return ", ".join(dict.fromkeys(self.study.runners.values()))

    @cached_property
    def to_run(self) -> list[Experiment]:
        """The selected experiments that have no result yet, in run order."""
        return [one for one in self.experiments if not self.is_replayed(one)]

    @cached_property
    def notes(self) -> list[str]:
        """What else the user should know of where it runs, and is no mistake."""
        uses_builtin = any(one.point.config.model == BUILTIN_NAME for one in self.to_run)
        note = cache_note() if uses_builtin else None
        return [] if note is None else [note]

    def is_replayed(self, experiment: Experiment) -> bool:
        """Whether a result of an earlier run stands for *experiment*."""
        return self.replay is not None and experiment.id in self.replay.results

    @cached_property
    def points(self) -> list[Point]:
        """The points of the experiments that are to run and not skipped."""
        found = {experiment.point.id: experiment.point for experiment in self.to_run}
        return [point for point in found.values() if point.skip is None]

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why a point cannot run here, by the point's id; the others can, as far as is known."""
        reasons = ((point.id, self.preflight.reason(point)) for point in self.points)
        return {name: reason for name, reason in reasons if reason is not None}

    @cached_property
    def seconds(self) -> float | None:
        """A rough estimate of how long all of it takes, in seconds; None where a model's size is unknown.

        The idle machine is measured once for each point, and once with nothing loaded; a forkserver starts once.
        """
        each: dict[str, float] = {}
        baselines = 0.0
        for point in self.points:
            known = expected(point, self.study, self.preflight)
            if known is None:
                return None
            each[point.id] = known.each
            baselines += known.once
        bare = bare_machine.SECONDS if baselines else 0.0
        experiments = sum(each.get(experiment.point.id, 0.0) for experiment in self.to_run)
        server = server_seconds(self.study.execution) if experiments else 0.0
        return server + experiments + baselines + bare

    @cached_property
    def deadlines(self) -> dict[str, float]:
        """After how many seconds an experiment is ended, by the id of its point; of those alone that can run."""
        configs = {point.id: point.config for point in self.points if point.id not in self.refused}
        execution, preflight = self.study.execution, self.preflight
        return {
            name: deadline_seconds(config, execution, preflight.footprint(config), preflight.host_of(config))
            for name, config in configs.items()
        }

    @cached_property
    def memory_bytes(self) -> float | None:
        """A rough estimate of the memory that the largest of them needs, in bytes; None where it is unknown."""
        sizes = [
            self.preflight.memory_bytes(point.config) for point in self.points if point.id not in self.refused
        ]
        known = [size for size in sizes if size is not None]
        return max(known) if known and len(known) == len(sizes) else None

    def to_json(self) -> str:
        """Return the plan as JSON text; experiments in run order, estimates null where they are unknown.

        ``deadline_seconds`` is null for an experiment that is not started.
        """
        content: dict[str, Any] = {
            "study": self.study.name,
            "study_design_hash": self.study.design_hash,
            "n_cycles": self.study.n_cycles,
            "cycle_order": self.study.execution.cycle_order,
            "start_method": self.study.execution.start_method,
            "estimated_seconds": self.seconds,
            "estimated_memory_bytes": self.memory_bytes,
            "excluded": [{"config": one.config, "reason": one.reason} for one in self.study.excluded],
            "preflight": [{"point": name, "reason": reason} for name, reason in self.refused.items()],
            "reference": {
                "python": self.reference.python,
                "experiments": [experiment.id for experiment in self.reference.experiments],
                "estimated_seconds": self.reference.seconds,
                "preflight": [
                    {"point": name, "reason": reason} for name, reason in self.reference.refused.items()
                ],
            }
            if self.reference
            else None,
            "sight": list(self.sight),
            "load": self.load,
            "notes": [f"{note.where}: {note.message}" for note in self.study.notes],
            "experiments": [
                {
                    "id": experiment.id,
                    "index": experiment.index,
                    "cycle": experiment.cycle,
                    "config_hash": experiment.point.config_hash,
                    "deadline_seconds": self.deadlines.get(experiment.point.id),
                    "replayed_from": self.replay.results[experiment.id].directory.name
                    if self.replay and self.is_replayed(experiment)
                    else None,
                    "skip": experiment.point.skip,
                    "xfail": experiment.point.xfail,
                    "config": experiment.point.config.model_dump(mode="json"),
                }
                for experiment in self.experiments
            ],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
