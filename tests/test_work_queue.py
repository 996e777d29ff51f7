"""The controller hands out experiments in order, without sharing a GPU and without starving a large one."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import pytest

from pytest_llem.execution.work_queue import RunningUnit, Unit, WorkQueue
from pytest_llem.machine.device_request import DeviceRequest

GPUS = tuple(f"GPU-{number}" for number in range(8))


def unit(number: int, gpus: int = 1, pool: Sequence[str] = GPUS, **fields: object) -> Unit:
    request = DeviceRequest(tuple(pool), gpus)
    return Unit([number], request=lambda: request, **fields)  # type: ignore[arg-type]


def started(queue: WorkQueue) -> list[RunningUnit]:
    """Start all units that may start."""
    found = []
    while (one := queue.start_next()) is not None:
        found.append(one)
    return found


def numbers(running: Sequence[RunningUnit]) -> list[int]:
    return [one.unit.items[0] for one in running]


def simulate(units: Sequence[Unit], length: Callable[[int], float], crash: Callable[[], bool]) -> Counter[int]:
    """Run units to their ends, and return how often each has ended. Checks that no GPU has two at a time."""
    queue, ended, now, ties = WorkQueue.of(units), Counter[int](), 0.0, count()
    ends: list[tuple[float, int, RunningUnit]] = []
    while True:
        for one in started(queue):
            heapq.heappush(ends, (now + length(one.unit.items[0]), next(ties), one))
        in_use = Counter(device for one in queue.running for device in one.devices)
        assert not in_use or max(in_use.values()) == 1
        if not ends:
            break
        now, _, one = heapq.heappop(ends)
        crashed, left = one.unit.items[0], one.unit.items[1:] if crash() else []
        ended.update([crashed] if left else one.unit.items)
        queue.end(one, left=left)
    assert queue.is_empty
    return ended


@pytest.mark.parametrize("seed", range(5))
def test_each_of_400_experiments_ends_once(seed: int) -> None:
    rng = random.Random(seed)
    units = [unit(10 * number, rng.choice([1, 1, 2, 4])) for number in range(398)]
    units += [Unit([10 * number, 10 * number + 1, 10 * number + 2]) for number in (398, 399)]
    ended = simulate(units, lambda number: rng.uniform(0.1, 5.0), lambda: rng.random() < 0.05)
    assert set(ended.values()) == {1}
    assert len(ended) == 398 + 6


def test_large_experiment_is_not_starved_by_small_ones() -> None:
    queue = WorkQueue.of([*(unit(number) for number in range(6)), unit(6, 4), *(unit(7 + at) for at in range(50))])
    running = started(queue)
    assert numbers(running) == [0, 1, 2, 3, 4, 5], "the seventh needs four, and its GPUs are kept for it"
    queue.end(running[0])
    assert started(queue) == []
    queue.end(running[1])
    (large,) = started(queue)
    assert large.unit.items == [6]
    assert len(set(large.devices)) == 4


def test_experiment_for_other_gpus_overtakes() -> None:
    queue = WorkQueue.of([unit(0, 2, GPUS[:2]), unit(1, 2, GPUS[:2]), unit(2, 1, GPUS[1:2]), unit(3, 1, GPUS[2:])])
    running = started(queue)
    assert numbers(running) == [0, 3]
    queue.end(running[0])
    assert numbers(started(queue)) == [1], "before the later one that needs one of its GPUs"


def test_units_without_devices_start_at_once() -> None:
    queue = WorkQueue.of([unit(0, 8), unit(1, 8), Unit([2])])
    assert numbers(started(queue)) == [0, 2]


def test_first_cycle_of_a_point_runs_alone() -> None:
    bound: list[str] = []
    cycles = [unit(number, binding="point", is_bound=lambda: bool(bound)) for number in range(3)]
    queue = WorkQueue.of([*cycles, unit(9)])
    running = started(queue)
    assert numbers(running) == [0, 9]
    bound.append(running[0].devices[0])
    assert numbers(started(queue)) == [1, 2], "their GPUs are known now"


def test_next_look_waits_for_all_cycles_before_it() -> None:
    cycles = [
        unit(cycle, cycle=("study", cycle), stage=("study", 2) if cycle > 2 else None) for cycle in (1, 2, 3)
    ]
    queue = WorkQueue.of(cycles)
    running = started(queue)
    assert numbers(running) == [1, 2]
    queue.end(running[1])
    assert started(queue) == []
    queue.end(running[0])
    assert numbers(started(queue)) == [3]


def test_unit_waits_for_a_worker_that_suits() -> None:
    queue = WorkQueue.of([unit(0), unit(1)])
    one = queue.start_next(counts_devices=False, suits=lambda unit: unit.items != [0])
    assert one is not None
    assert numbers([one]) == [1]
    queue.end(one)
    assert queue.start_next(counts_devices=False, suits=lambda unit: unit.items != [0]) is None
    assert numbers(started(queue)) == [0]


def test_left_items_of_a_crashed_worker_start_next() -> None:
    queue = WorkQueue.of([Unit([0, 1, 2]), unit(3, 8), unit(4, 8)])
    first, _ = started(queue)
    queue.end(first, left=[1, 2])
    (next_one,) = started(queue)
    assert next_one.unit.items == [1, 2]


def test_queue_never_waits_for_nothing() -> None:
    """A unit that can never start is given to a worker, which reports why."""
    impossible = unit(0, 4, GPUS[:2])
    waits_for_itself = unit(1, cycle=("study", 1), stage=("study", 1))
    queue = WorkQueue.of([impossible, waits_for_itself])
    (one,) = started(queue)
    queue.end(one)
    (other,) = started(queue)
    assert {one.unit.items[0], other.unit.items[0]} == {0, 1}
    assert (one.devices, other.devices) == ((), ())
