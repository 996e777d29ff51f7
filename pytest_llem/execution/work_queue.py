"""The experiments that wait for devices in one session, and which of them may start next.

This is the controller's own count of devices. The locks of :mod:`pytest_llem.machine.device_locks` decide in the
end: other runs may have devices, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from pytest_llem._plugin.node_ids import EXPERIMENTS, GATES, file_of, match_id, parse
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import REPLAYED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.jobs import preflight_of
from pytest_llem.execution.placement import binding_key, bindings_of, keeps_devices, narrowed
from pytest_llem.execution.stopping import not_needed_reason
from pytest_llem.gates.sequential import Schedule
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.server import SERVER

#: Maximum number of units without free devices that others overtake: a study may have 20,000 of them.
MAX_BLOCKED = 64


@dataclass(eq=False)
class Unit:
    """Items that one worker runs one after the other.

    Attributes:
        items: Indices of the items, in run order.
        request: Returns the devices that the unit may be given now; None if it needs none.
        binding: What has to be on the same devices in several units, such as a point in all cycles. The first of
            them runs alone, as it determines the devices. None if nothing has to be.
        is_bound: Returns whether the devices of *binding* are determined.
        stage: What has to be complete before the unit starts: a group of units, and the last of its cycles that
            has to have ended; None if nothing has to.
        cycle: The unit's group, and its cycle in that group; None if no stage refers to them.
        names: Run and id of each experiment.
    """

    items: list[int]
    request: Callable[[], DeviceRequest | None] = lambda: None
    binding: Hashable = None
    is_bound: Callable[[], bool] = lambda: True
    stage: tuple[Hashable, int] | None = None
    cycle: tuple[Hashable, int] | None = None
    names: Sequence[tuple[str, str]] = ()


@dataclass(eq=False)
class RunningUnit:
    """A unit that a worker has.

    Attributes:
        unit: The unit.
        devices: Devices that the queue has chosen for it, or that it got instead.
    """

    unit: Unit
    devices: tuple[str, ...] = ()


@dataclass
class WorkQueue:
    """Waiting and running units.

    Units start in the order in which they were given. A unit whose devices are not free is overtaken by later
    ones, but these do not get devices that it may use: so it starts once enough of its devices have become free.

    Example:
        queue = WorkQueue.of(units)
        while (started := queue.start_next()) is not None:
            ...  # hand started.unit to a worker
    """

    #: Waiting units by place, in the order in which they start.
    _waiting: dict[int, Unit] = field(default_factory=dict)
    _running: list[RunningUnit] = field(default_factory=list)
    #: Number of units that have not ended, by group and cycle.
    _unfinished: dict[Hashable, Counter[int]] = field(default_factory=dict)
    _next_place: int = 0

    @classmethod
    def of(cls, units: Iterable[Unit]) -> WorkQueue:
        """Return the queue of *units*, in their order."""
        queue = cls()
        for unit in units:
            queue._waiting[queue._next_place] = unit
            queue._next_place += 1
            if unit.cycle is not None:
                group, cycle = unit.cycle
                queue._unfinished.setdefault(group, Counter())[cycle] += 1
        return queue

    @property
    def is_empty(self) -> bool:
        """Whether no unit waits."""
        return not self._waiting

    @property
    def running(self) -> Sequence[RunningUnit]:
        """The units that workers have."""
        return self._running

    def start_next(
        self, *, counts_devices: bool = True, suits: Callable[[Unit], bool] = lambda unit: True
    ) -> RunningUnit | None:
        """Start the next unit that may start, and return it; None if none may.

        Args:
            counts_devices: Whether the worker is on this machine. Devices of other machines are not known here.
            suits: Returns whether the worker may have a unit.
        """
        taken: set[str] = {device for one in self._running for device in one.devices}
        first_place, blocked = None, 0
        for place, unit in self._waiting.items():
            if not suits(unit) or not self._is_due(unit):
                continue
            if blocked == MAX_BLOCKED:
                break
            first_place = place if first_place is None else first_place
            request = unit.request() if counts_devices else None
            if request is None:
                return self._start(place, ())
            free = [device for device in request.pool if device not in taken]
            if devices := request.choose(free):
                return self._start(place, devices)
            if not request.count:  # it will fail: there are not enough GPUs
                return self._start(place, ())
            taken.update(request.pool)
            blocked += 1
        if self._running:
            return None
        # Nothing runs, so nothing will change: the unit's worker finds out why it cannot start.
        if first_place is None:
            first_place = next((place for place, unit in self._waiting.items() if suits(unit)), None)
        return None if first_place is None else self._start(first_place, ())

    def _is_due(self, unit: Unit) -> bool:
        """Return whether *unit* may start, apart from its devices."""
        if unit.stage is not None:
            group, cycle = unit.stage
            if any(count and number <= cycle for number, count in self._unfinished.get(group, Counter()).items()):
                return False
        if unit.binding is None or unit.is_bound():
            return True
        return all(one.unit.binding != unit.binding for one in self._running)

    def _start(self, place: int, devices: Sequence[str]) -> RunningUnit:
        started = RunningUnit(self._waiting.pop(place), tuple(devices))
        self._running.append(started)
        return started

    def end(self, running: RunningUnit, left: Sequence[int] = ()) -> None:
        """Record that a unit has ended, or that its worker has, with some of its items *left* to run.

        Args:
            running: The unit.
            left: Indices of items that have not run. They start next.
        """
        self._running.remove(running)
        unit = running.unit
        if left:
            unit.items = list(left)
            self.return_first(unit)
        elif unit.cycle is not None:
            group, cycle = unit.cycle
            self._unfinished[group][cycle] -= 1

    def return_first(self, unit: Unit) -> None:
        """Put *unit* before all that wait."""
        self._waiting = {self._next_place: unit, **self._waiting}
        self._next_place += 1


#: Devices that a point may have, by run and the hash of its configuration.
_REQUESTS = pytest.StashKey[dict[tuple[str, str], DeviceRequest | None]]()


@dataclass(frozen=True)
class _Member:
    """An item of a unit.

    Attributes:
        index: Index of the item.
        run: Key of its run.
        experiment: Its experiment; None for other items, such as gates.
    """

    index: int
    run: str = ""
    experiment: Experiment | None = None


def units_of(config: pytest.Config, node_ids: Sequence[str], studies: Mapping[str, StudyConfig]) -> Iterable[Unit]:
    """Return the units of items, in run order.

    A unit is an experiment, the experiments that share a server, or both sides of a comparison in one cycle. All
    gates are one unit: its worker only reports their marks.

    Args:
        config: The controller's configuration.
        node_ids: Node ids of all items, in run order.
        studies: The studies by the key of their run; empty if nothing is measured, as with ``--setup-plan``.
    """
    by_id = {run: {one.id: one for one in study.experiments} for run, study in studies.items()}
    groups: dict[str, list[_Member]] = {}
    for index, node_id in enumerate(node_ids):
        node, group, member = parse(node_id), node_id, _Member(index)
        if node is not None and node.function in GATES:
            group = "gates"
        elif node is not None and node.function in EXPERIMENTS and node.run in studies:
            name = match_id(node.name, by_id[node.run])
            if name is not None:
                member = _Member(index, node.run, by_id[node.run][name])
                group = f"{node.file} {_group(config, studies[node.run], by_id[node.run][name]) or node_id}"
        groups.setdefault(group, []).append(member)
    return [_unit(config, studies, members) for members in groups.values()]


def _group(config: pytest.Config, study: StudyConfig, experiment: Experiment) -> str | None:
    """Return what the experiments of one unit have in common; None for a unit of one experiment."""
    if experiment.point.config.backend == SERVER:
        return study.server_group(experiment)
    return experiment.id if Settings.from_config(config).against is not None else None


def _unit(config: pytest.Config, studies: Mapping[str, StudyConfig], members: Sequence[_Member]) -> Unit:
    items = [one.index for one in members]
    first, run = members[0].experiment, members[0].run
    if first is None:
        return Unit(items)
    study, file = studies[run], file_of(run)
    bindings = bindings_of(config)
    unit = Unit(
        items,
        request=lambda: _request(config, studies, members),
        names=[(one.run, one.experiment.id) for one in members if one.experiment is not None],
    )
    if keeps_devices(study):
        unit.binding = file, binding_key(first.point.config, first.point.config_hash)
        unit.is_bound = lambda: bindings.devices(run, study, first) is not None
    if study.execution.until_decided:
        # A cycle starts only after the last look before it, which may make the cycle unnecessary.
        group = (file, first.point.config_hash) if study.execution.cycle_order == "sequential" else (file,)
        looks = Schedule(study.execution.min_cycles, study.execution.max_cycles).sizes
        earlier = [size for size in looks if size < first.cycle]
        unit.cycle, unit.stage = (group, first.cycle), (group, max(earlier)) if earlier else None
    return unit


def _request(
    config: pytest.Config, studies: Mapping[str, StudyConfig], members: Sequence[_Member]
) -> DeviceRequest | None:
    """Return the devices that a unit may be given now; None if none of its experiments will start a process."""
    for member in members:
        experiment, run = member.experiment, member.run
        if experiment is None or not_needed_reason(config.stash[SHARED_STATE], run, experiment) is not None:
            continue
        request = _point_request(config, run, studies[run], experiment)
        if request is not None:
            bound = bindings_of(config).devices(run, studies[run], experiment)
            return narrowed(request, studies[run], experiment, bound)
    return None


def _point_request(
    config: pytest.Config, run: str, study: StudyConfig, experiment: Experiment
) -> DeviceRequest | None:
    """Return the devices that *experiment*'s point may have; None if the experiment will start no process."""
    if experiment.id in (config.stash[SHARED_STATE].read(run, REPLAYED) or {}):
        return None
    known, point = config.stash.setdefault(_REQUESTS, {}), experiment.point
    key = run, point.config_hash
    if key not in known:  # the queue asks for many units, again and again
        preflight = preflight_of(config, run, study)
        starts_process = point.skip is None and preflight.refusal(point) is None
        known[key] = preflight.request(point.config) if starts_process else None
    return known[key]
