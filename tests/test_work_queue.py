"""The controller groups items, and hands them out in order: no GPU is shared, and no large experiment starves."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem._plugin.node_ids import REFERENCE, run_key
from pytest_llem._plugin.shared_state import BOUND, DECIDED, REPLAYED, STOPPED, SharedState, topic_of
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.placement import assign, take_placed
from pytest_llem.execution.work_queue import RunningUnit, Unit, WorkQueue, units_of
from pytest_llem.hardware import gpus as hardware
from pytest_llem.machine import device_request
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.study.loading import load_study
from tests.support.boards import SECTION, STUDY

GPUS = tuple(f"GPU-{number}" for number in range(8))

UUIDS = ("GPU-a", "GPU-b", "GPU-c")

#: Writes a study and returns its units, the configuration, and the experiments' ids.
Made = tuple[Sequence[Unit], pytest.Config, list[str]]


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


@pytest.fixture
def make(pytester: pytest.Pytester, noop_engine: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Return a function that makes the units of a study on three GPUs."""
    found = tuple(hardware.Gpu(uuid, "H100", index=at) for at, uuid in enumerate(UUIDS))
    monkeypatch.setattr(device_request, "visible_gpus", lambda: hardware.VisibleGpus(found, found[0]))

    def made(
        *options: str, gates: Sequence[str] = (), put: Callable[..., None] | None = None, **fields: Any
    ) -> Made:
        path = pytester.path / "study.yaml"
        execution = {**STUDY["execution"], **fields.pop("execution", {})}
        path.write_text(yaml.safe_dump({**STUDY, **fields, "execution": execution}, sort_keys=False))
        config = pytester.parseconfig("-p", "llem", *options)
        config.stash[SHARED_STATE] = SharedState()
        study = load_study(path)
        names = [one.id for one in study.experiments]
        studies = {"study.yaml": study}
        functions = ["experiment"]
        if options:
            studies[run_key("study.yaml", REFERENCE)] = study
            functions.append(REFERENCE)
        ids = [f"study.yaml::{function}[{name}]" for name in names for function in functions]
        if put is not None:
            put(config.stash[SHARED_STATE], study)
        return list(units_of(config, [*ids, *gates], studies)), config, names

    return made


def test_each_experiment_is_a_unit_and_all_gates_are_one(make: Callable[..., Made]) -> None:
    gates = ["study.yaml::budget[a]", "study.yaml::budget[b]"]
    units, *_ = make(gates=gates, sweep={f"{SECTION}.gpus": [1, 2]}, execution={"cycle_order": "sequential"})
    assert [unit.items for unit in units] == [[0], [1], [2, 3]]
    requests = [unit.request() for unit in units]
    assert [request and (request.pool, request.count) for request in requests] == [(UUIDS, 1), (UUIDS, 2), None]


def test_both_sides_of_a_comparison_are_one_unit(make: Callable[..., Made], tmp_path: Path) -> None:
    units, *_ = make("--llem-against=/usr/bin/python3", sweep={f"{SECTION}.number": [1, 2]})
    assert [unit.items for unit in units] == [[0, 1], [2, 3]]


def test_load_points_of_a_server_are_one_unit(make: Callable[..., Made]) -> None:
    units, *_ = make(
        backend="server",
        server={"command": ["serve", "--port", "{port}"], "gpus": 1},
        sweep={"load.concurrency": [1, 2]},
        measurement={},
        execution={"n_cycles": 2, "cycle_order": "interleaved"},
    )
    assert [unit.items for unit in units] == [[0, 1], [2, 3]]
    assert units[0].binding == units[1].binding, "the server is on the same GPU in each cycle"


def test_experiments_that_will_not_start_need_no_devices(make: Callable[..., Made]) -> None:
    def put(shared_state: SharedState, study: Any) -> None:
        first, second, *_ = study.experiments
        shared_state.put("study.yaml", REPLAYED, {first.id: {}})
        shared_state.put("study.yaml", f"{DECIDED}-{second.point.config_hash}", [0, "decided"])

    sweep = {f"{SECTION}.number": [1, 2, 3, 4]}
    skip = [{"where": {f"{SECTION}.number": 4}}]
    units, config, _ = make(put=put, sweep=sweep, skip=skip, execution={"cycle_order": "sequential"})
    assert [unit.request() is None for unit in units] == [True, True, False, True]
    config.stash[SHARED_STATE].put("study.yaml", STOPPED, "too many failures")
    assert [unit.request() is None for unit in units] == [True] * 4


def test_cycles_of_a_point_get_the_devices_of_the_first_one(make: Callable[..., Made]) -> None:
    units, config, _ = make(execution={"n_cycles": 2})
    assert units[0].binding == units[1].binding is not None
    assert [unit.is_bound() for unit in units] == [False, False]
    shared_state = config.stash[SHARED_STATE]
    binding: Any = units[0].binding
    _, key = binding
    assert shared_state.put_first("study.yaml", topic_of(BOUND, key), ["GPU-b"]) == ["GPU-b"]
    assert shared_state.put_first("study.yaml", topic_of(BOUND, key), ["GPU-c"]) == ["GPU-b"], (
        "the first one counts"
    )
    assert [unit.is_bound() for unit in units] == [True, True]
    request = units[1].request()
    assert request is not None
    assert request.pool == ("GPU-b",)


def test_looks_of_auto_wait_for_the_cycles_before(make: Callable[..., Made]) -> None:
    execution = {"n_cycles": "auto", "min_cycles": 2, "max_cycles": 3, "cycle_order": "interleaved"}
    units, *_ = make(sweep={f"{SECTION}.number": [1, 2]}, execution=execution)
    assert [unit.stage and unit.stage[1] for unit in units] == [None, None, None, None, 2, 2]
    assert [unit.cycle and unit.cycle[1] for unit in units] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("session", [None, "a-session"])
def test_values_between_controller_and_worker_arrive_once(session: str | None) -> None:
    controller = SharedState(session)
    worker = controller if session is None else SharedState(session)
    try:
        assign(controller, "run", "n=1", ["GPU-a"])
        assert worker.take("run", topic_of("assigned", "n=1")) == ["GPU-a"]
        assert worker.take("run", topic_of("assigned", "n=1")) is None
        assert take_placed(controller, "run", "n=1") is None
        worker.put("run", topic_of("placed", "n=1"), ["GPU-b"])
        assert take_placed(controller, "run", "n=1") == ["GPU-b"]
        assert take_placed(controller, "run", "n=1") is None
    finally:
        controller.close()
