"""Distribute experiments to xdist's workers, each once its devices are free.

xdist's own schedulers send several items to a worker in advance. An item that waits there for its devices would
keep the items behind it from idle workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler.load import LoadScheduling

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.placement import assign, take_placed
from pytest_llem.execution.work_queue import RunningUnit, Unit, WorkQueue, units_of

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from pytest_llem._plugin.shared_state import SharedState
    from pytest_llem.study.design import StudyConfig

#: Returns the studies, by the keys of their runs. Called after the workers have collected.
GetStudies = Callable[[], Mapping[str, "StudyConfig"]]


def distributes_one_at_a_time(config: pytest.Config) -> bool:
    """Return whether experiments go to workers one at a time: ``--dist load``, and every argument is a study."""
    return config.option.dist == "load" and are_all_studies(config)


def are_all_studies(config: pytest.Config) -> bool:
    """Return whether every argument is a study file."""
    files = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    return bool(files) and all(file.suffix in YAML_SUFFIXES for file in files)


def make_scheduler(config: pytest.Config, log: Producer, get_studies: GetStudies) -> StudyScheduling | None:
    """Return the scheduler of a session whose arguments are studies; None to use one of xdist's.

    Args:
        config: The controller's configuration.
        log: xdist's log.
        get_studies: Returns the studies, by the keys of their runs. Called after the workers have collected.
    """
    return StudyScheduling(config, log, get_studies) if distributes_one_at_a_time(config) else None


def _host(node: WorkerController) -> str | None:
    """Return the host of a worker; None for this machine."""
    spec = node.gateway.spec
    return None if spec.popen else str(spec.ssh or spec)


class StudyScheduling(LoadScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands a unit of items to an idle worker once the unit may start.

    A worker runs an item only when it knows the next one. So each unit is followed by the worker's
    :class:`~pytest_llem.execution.item_hooks.Pause`, whose index is one more than that of the last collected item.
    The worker waits in it for the next unit.
    """

    def __init__(self, config: pytest.Config, log: Producer, get_studies: GetStudies) -> None:
        super().__init__(config, log)
        self._get_studies = get_studies
        self._queue = WorkQueue()
        self._running: dict[WorkerController, RunningUnit] = {}
        #: Host on which the last unit of each binding started; None is this machine.
        self._hosts: dict[Hashable, str | None] = {}

    @property
    def tests_finished(self) -> bool:
        """Whether all items have run. xdist ends the workers then."""
        return self.collection_is_completed and self._queue.is_empty and not self._running

    def schedule(self) -> None:
        """Hand units to all idle workers. xdist calls it when the workers have collected."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return
            self.collection: list[str] | None = next(iter(self.node2collection.values()))
            self._queue = WorkQueue.of(units_of(self.config, self.collection, self._get_studies()))
        self._hand_out()

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Record that *node* has run an item. The index of its pause is ignored."""
        pending = self.node2pending[node]
        if item_index not in pending:
            return
        pending.remove(item_index)
        if not pending:
            self._queue.end(self._running.pop(node))
            self._hand_out()

    def mark_test_pending(self, item: str) -> None:
        """Run an item again that a crashed worker was running. Plugins call it in ``pytest_handlecrashitem``."""
        assert self.collection is not None
        index = self.collection.index(item)
        unit = next(
            one for one in units_of(self.config, self.collection, self._get_studies()) if index in one.items
        )
        unit.items, unit.cycle = [index], None  # the rest of its unit, which waits already, counts in the cycle
        self._queue.return_first(unit)
        self._hand_out()

    def remove_node(self, node: WorkerController) -> str | None:
        """Remove a worker that has ended, and return the node id of the item that it was running, if any.

        The unit's remaining items are run next, by another worker.
        """
        pending = self.node2pending.pop(node)
        running = self._running.pop(node, None)
        if running is None:
            return None
        assert self.collection is not None
        self._queue.end(running, left=pending[1:])
        self._hand_out()
        crashed: str = self.collection[pending[0]]
        return crashed

    def _hand_out(self) -> None:
        """Give each idle worker a unit that may start."""
        if (shared_state := self.config.stash.get(SHARED_STATE, None)) is None:  # nothing is measured
            self._give_units()
            return
        with shared_state.listed():
            self._correct_placements(shared_state)
            self._give_units()

    def _give_units(self) -> None:
        hosts = {_host(node) for node in self.nodes}
        for host, nodes in groupby(self._idle(), key=_host):
            for node in nodes:
                started = self._queue.start_next(
                    counts_devices=host is None, suits=partial(self._suits, host, hosts)
                )
                if started is None:
                    break
                if started.unit.binding is not None:
                    self._hosts[started.unit.binding] = host
                self._running[node] = started
                self._send(node, started)

    def _suits(self, host: str | None, hosts: Collection[str | None], unit: Unit) -> bool:
        """Return whether *unit* may run on *host*: cycles of a point stay on one host while it has workers."""
        chosen = self._hosts.get(unit.binding, host)
        return chosen == host or chosen not in hosts

    def _idle(self) -> Sequence[WorkerController]:
        collected = [node for node in self.nodes if node in self.node2collection]
        return [node for node in collected if node not in self._running and not node.shutting_down]

    def _send(self, node: WorkerController, started: RunningUnit) -> None:
        assert self.collection is not None
        items = started.unit.items
        if started.devices:
            for run, experiment in started.unit.names:
                assign(self.config.stash[SHARED_STATE], run, experiment, started.devices)
        self.node2pending[node] = list(items)
        node.send_runtest_some([*items, len(self.collection)])

    def _correct_placements(self, shared_state: SharedState) -> None:
        """Correct the devices of units that got others than the chosen ones, because another run had those."""
        for running in self._queue.running:
            for name in running.unit.names if running.devices else ():
                if (devices := take_placed(shared_state, *name)) is not None:
                    running.devices = tuple(devices)
