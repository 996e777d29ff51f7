"""How the controller of xdist groups items, and which of them need devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem._plugin.node_ids import REFERENCE, run_key
from pytest_llem._plugin.shared_state import BOUND, DECIDED, REPLAYED, STOPPED, SharedState, topic_of
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.placement import assign, take_placed
from pytest_llem.execution.work_queue import Unit
from pytest_llem.execution.work_units import units_of
from pytest_llem.hardware import gpus as hardware
from pytest_llem.machine import device_request
from pytest_llem.study.loading import load_study
from tests.support.boards import SECTION, STUDY

UUIDS = ("GPU-a", "GPU-b", "GPU-c")

#: Writes a study and returns its units, the configuration, and the experiments' ids.
Made = tuple[Sequence[Unit], pytest.Config, list[str]]


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
