"""The experiments that wait for devices in one session, and which of them may start next.

This is the controller's own count of devices. The locks of :mod:`pytest_llem.machine.device_locks` decide in the
end: other runs may have devices, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from pytest_llem.machine.device_request import DeviceRequest

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
