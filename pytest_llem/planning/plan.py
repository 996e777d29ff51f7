"""The plan of a run: its experiments, their estimated time and memory, and those that cannot run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_llem.engines.tiny_llama import BUILTIN_NAME, cache_note
from pytest_llem.machine.idle_power_no_context import SECONDS as NO_CONTEXT_SECONDS
from pytest_llem.planning.estimate import gib, server_seconds
from pytest_llem.planning.forecast import expected
from pytest_llem.planning.preflight import Preflight
from pytest_llem.planning.resume import Replay
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Experiment, Point, StudyConfig
from pytest_llem.study.engines import COMMAND

#: Option that sets the share of a GPU's memory, by engine or server preset.
_MEMORY_SHARE_OPTIONS = {
    "vllm": "vllm.engine.gpu_memory_utilization",
    "sglang": "server.args.mem_fraction_static",
}


@dataclass(frozen=True)
class Plan:
    """The selected experiments of a study.

    Attributes:
        study: The whole study.
        experiments: The selected experiments, in run order.
        preflight: Checks whether an experiment can run.
        replay: Results of earlier runs that replace some experiments; None without --llem-resume.
        reference: Plan of the reference that is measured interleaved with these experiments, or None.
        against: Name of the reference, or None.
        minimum_detectable_effect: Lines on what the comparison can detect, or on the cycles that it will need.
        host_load_warning: Warning that the machine's load average is high, or None.
        at_a_time: Maximum number of experiments that run at a time.
        workers: Line about the number of xdist's workers, or None.
    """

    study: StudyConfig
    experiments: Sequence[Experiment]
    preflight: Preflight
    replay: Replay | None = None
    reference: Plan | None = None
    against: str | None = None
    minimum_detectable_effect: Sequence[str] = ()
    host_load_warning: str | None = None
    at_a_time: int = 1
    workers: str | None = None

    @property
    def python(self) -> str:
        """The other interpreters that experiments or their servers run in, separated by commas."""
        return ", ".join(dict.fromkeys(self.study.runners.values()))

    @cached_property
    def to_run(self) -> list[Experiment]:
        """The selected experiments that are not replayed, in run order."""
        return [one for one in self.experiments if not self.is_replayed(one)]

    @cached_property
    def notes(self) -> list[str]:
        """Notes for the user on the environment of the run."""
        uses_builtin = any(one.point.config.model == BUILTIN_NAME for one in self.to_run)
        note = cache_note() if uses_builtin else None
        return [] if note is None else [note]

    def is_replayed(self, experiment: Experiment) -> bool:
        """Return whether *experiment* is replaced by a result of an earlier run."""
        return self.replay is not None and experiment.id in self.replay.results

    @cached_property
    def points(self) -> list[Point]:
        """The points of the experiments to run, without skipped points."""
        found = {experiment.point.id: experiment.point for experiment in self.to_run}
        return [point for point in found.values() if point.skip is None]

    @cached_property
    def refused(self) -> dict[str, str]:
        """The points that preflight refuses: the reason by the point's id."""
        reasons = ((point.id, self.preflight.refusal(point)) for point in self.points)
        return {name: reason for name, reason in reasons if reason is not None}

    @cached_property
    def whole_cycles(self) -> dict[str, str]:
        """Points that alternate by cycle although the study asks for passes: the reason by the point's id."""
        if self.reference is None or self.study.gates.interleave == "cycle":
            return {}
        sides = self.preflight, self.reference.preflight
        points = [point for point in self.points if point.id not in self.refused]
        reasons = ((point.id, whole_cycles_reason(point.config, *sides)) for point in points)
        return {name: reason for name, reason in reasons if reason is not None}

    @cached_property
    def seconds(self) -> float | None:
        """Estimated time of all experiments, one after the other, in s; None if a model's size is unknown.

        Includes the measurement of idle power, once for each point and once without a model, and one start of a
        forkserver.
        """
        return self._seconds(lambda point: 1)

    @cached_property
    def run_seconds(self) -> float | None:
        """Estimated time of the run, in s: as :attr:`seconds`, with several experiments at a time."""
        return self._seconds(self._at_a_time)

    def _at_a_time(self, point: Point) -> int:
        """Return how many experiments of *point* can run at a time. One that takes all GPUs runs alone."""
        request = self.preflight.request(point.config)
        return max(1, min(self.at_a_time, len(request.pool) // max(1, request.count)))

    def _seconds(self, at_a_time: Callable[[Point], int]) -> float | None:
        each: dict[str, float] = {}
        idle_power = 0.0
        for point in self.points:
            known = expected(point, self.study, self.preflight)
            if known is None:
                return None
            number = at_a_time(point)
            each[point.id] = known.each / number
            idle_power += known.once / number
        no_context = NO_CONTEXT_SECONDS if idle_power else 0.0
        experiments = sum(each.get(experiment.point.id, 0.0) for experiment in self.to_run)
        forkserver = server_seconds(self.study.execution) if experiments else 0.0
        return forkserver + experiments + idle_power + no_context

    @cached_property
    def load_seconds(self) -> tuple[float, float]:
        """Minimum time of the windows of loads on servers, and of those in which drift is measured, in s.

        Starts, ramp-ups and drains take further time, which is not known.
        """
        loads = [one for one in self.to_run if one.point.config.load and one.point.id in self.deadlines]
        seconds = {one.id: one.point.config.measurement.min_window_seconds for one in loads}
        windows = math.fsum(seconds.values())
        if not self.study.execution.check_drift or (self.reference and self.study.gates.interleave != "cycle"):
            return windows, 0.0
        servers: dict[str, list[str]] = {}
        for one in loads:
            servers.setdefault(self.study.server_group(one), []).append(one.id)
        return windows, math.fsum(seconds[first] for first, *others in servers.values() if others)

    @cached_property
    def deadlines(self) -> dict[str, float]:
        """Deadline of an experiment, in s, by the id of its point; refused points have none."""
        points = [point for point in self.points if point.id not in self.refused]
        return {point.id: self.preflight.deadline_seconds(point.config) for point in points}

    @cached_property
    def gpus(self) -> dict[str, int | None]:
        """Number of GPUs that an experiment leases, by the id of its point; None for all that are visible."""
        points = [point for point in self.points if point.id not in self.refused]
        return {point.id: self.preflight.needs(point.config).gpus for point in points}

    @cached_property
    def memory_bytes(self) -> float | None:
        """Estimated memory of the largest experiment, in bytes; None if a model's size is unknown."""
        sizes = [
            self.preflight.memory_bytes(point.config) for point in self.points if point.id not in self.refused
        ]
        known = [size for size in sizes if size is not None]
        return max(known) if known and len(known) == len(sizes) else None

    @cached_property
    def available_bytes(self) -> int:
        """Memory of the devices of one experiment, in bytes; the maximum over the experiments."""
        host, numbers = self.preflight.host, self.gpus.values()
        return max((host.device_memory_bytes(number) for number in numbers), default=host.device_memory_bytes())

    def to_json(self) -> str:
        """Return the plan as JSON text: experiments in run order, unknown estimates as null.

        ``deadline_seconds`` is null for an experiment that will not be started. ``gpus`` is null for one that
        leases all visible GPUs.
        """
        content: dict[str, Any] = {
            "study": self.study.name,
            "study_design_hash": self.study.design_hash,
            "n_cycles": self.study.n_cycles,
            "cycle_order": self.study.execution.cycle_order,
            "start_method": self.study.execution.start_method,
            "estimated_seconds": self.seconds,
            "estimated_run_seconds": self.run_seconds,
            "at_a_time": self.at_a_time,
            "load_window_seconds": self.load_seconds[0],
            "drift_window_seconds": self.load_seconds[1],
            "estimated_memory_bytes": self.memory_bytes,
            "excluded": [{"config": one.config, "reason": one.reason} for one in self.study.excluded],
            "preflight": [{"point": name, "reason": reason} for name, reason in self.refused.items()],
            "reference": {
                "name": self.against,
                "python": self.reference.python,
                "interleave": self.study.gates.interleave,
                "whole_cycles": [{"point": name, "reason": why} for name, why in self.whole_cycles.items()],
                "experiments": [experiment.id for experiment in self.reference.experiments],
                "estimated_seconds": self.reference.seconds,
                "preflight": [
                    {"point": name, "reason": reason} for name, reason in self.reference.refused.items()
                ],
            }
            if self.reference
            else None,
            "minimum_detectable_effect": list(self.minimum_detectable_effect),
            "host_load_warning": self.host_load_warning,
            "notes": [f"{note.where}: {note.message}" for note in self.study.notes],
            "experiments": [
                {
                    "id": experiment.id,
                    "index": experiment.index,
                    "cycle": experiment.cycle,
                    "config_hash": experiment.point.config_hash,
                    "deadline_seconds": self.deadlines.get(experiment.point.id),
                    "gpus": self.gpus.get(experiment.point.id),
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


def whole_cycles_reason(config: ExperimentConfig, candidate: Preflight, reference: Preflight) -> str | None:
    """Return why whole cycles have to alternate, in one line; None if passes can.

    Args:
        config: The experiment, the same on both sides.
        candidate: Preflight of the candidate.
        reference: Preflight of the reference.
    """
    if config.backend == COMMAND:
        return "a command runs as a whole"
    sides, host = (candidate, reference), candidate.host_of(config)
    devices = [side.request(config) for side in sides]
    if devices[0].count != devices[1].count or set(devices[0].pool) != set(devices[1].pool):
        return "the two sides need different devices"
    shares = [share for side in sides if (share := side.needs(config).memory_share) is not None]
    if host.gpus and sum(shares) > 1:
        preset = config.server.preset if config.server is not None else config.backend
        option = _MEMORY_SHARE_OPTIONS.get(str(preset), "its share")
        option = option if config.server is None else option.replace("vllm.engine", "server.args")
        return (
            f"each side reserves {max(shares):.0%} of the GPU's memory, so that two do not fit: "
            f"set {option} to at most {1 / len(sides) - 0.05:.2f}"
        )
    sizes = [side.memory_bytes(config) for side in sides]
    gpus = candidate.needs(config).gpus
    memory = host.device_memory_bytes(1 if gpus is None else gpus)
    needed = sum(size for size in sizes if size is not None)
    if needed > memory:
        return f"two of them need about {gib(needed)}, and there are {gib(memory)}"
    return None
