"""Group the items of a session into units that one worker runs, for the controller of xdist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from pytest_llem._plugin.node_ids import EXPERIMENTS, GATES, file_of, match_id, parse
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import REPLAYED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.jobs import preflight_of
from pytest_llem.execution.placement import binding_key, bindings_of, keeps_devices, narrowed
from pytest_llem.execution.stopping import not_needed_reason
from pytest_llem.execution.work_queue import Unit
from pytest_llem.gates.sequential import Schedule
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.server import SERVER

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
