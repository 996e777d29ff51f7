"""Studies on several GPUs of one host: who gets which, what ran beside, and how far GPUs differ."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.execution.placement import narrowed
from pytest_llem.hardware import gpus as hardware
from pytest_llem.hardware.gpus import best_connected, nvlinks
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine import device_request
from pytest_llem.machine.device_locks import owned
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.machine.neighbours import SHARED, with_neighbours
from pytest_llem.machine.owner import Owner
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.results.cycles import gpu_spread
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.study.loading import load_study
from tests.support import boards, nvml
from tests.support.boards import SECTION, STUDY, UUIDS, busiest, shared, stays
from tests.support.instant import RESULTS
from tests.support.processes import wait_until

#: Runs pytest on a study of board_engine in processes that see scripted GPUs.
RunStudy = Callable[..., str]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The folder in which experiments record their GPUs."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def write(tmp_path: Path, notes: Path) -> Callable[..., Path]:
    """Return a function that writes a study: its name, options of the engine, and execution settings."""

    def written(name: str = "study", options: Mapping[str, Any] | None = None, **fields: Any) -> Path:
        execution = {**STUDY["execution"], **fields.pop("execution", {})}
        engine = {"folder": str(notes), "seconds": 0.2, **(options or {})}
        path = tmp_path / f"{name}.yaml"
        study = {**STUDY, "name": name, SECTION: engine, "execution": execution, **fields}
        if "experiments" in fields:
            del study[SECTION]
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return written


@pytest.fixture
def start(tmp_path: Path, nvml_library: Path) -> Start:
    """Return a function that starts pytest, in processes that see so many scripted GPUs."""

    def started(
        *options: str, gpus: int = 2, files: tuple[str, ...] = ("study.yaml",), visible: str | None = None
    ) -> subprocess.Popen[str]:
        env = boards.give_boards(nvml_library, tmp_path, UUIDS[:gpus])
        env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        plugins = ["-p", "pytest_llem.plugin", "-p", "xdist.plugin", "-p", "no:cacheprovider"]
        more = [f"--rootdir={tmp_path}", "--llem-start-method=forkserver", "--llem-run-id=run"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *files, *plugins, *more, *options],
            cwd=tmp_path,
            env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    return started


@pytest.fixture
def run(start: Start) -> RunStudy:
    """Return a function that runs pytest like *start*, and returns its output."""

    def ran(*options: str, status: int = 0, **more: Any) -> str:
        process = start(*options, **more)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    return ran


def result_of(folder: Path, name: str = "study") -> StudyResult:
    return StudyResult.load(folder / "results" / f"{name}_run")


def experiments_of(folder: Path, name: str = "study") -> list[dict[str, Any]]:
    """Return the results of the experiments, as plain data."""
    directory = folder / "results" / f"{name}_run"
    files = sorted((directory / "experiments").glob("*[0-9a-z].json"))
    return [json.loads(file.read_text()) for file in files]


# ---- which GPUs ----


@pytest.mark.slow
def test_workers_of_auto_measure_side_by_side(
    write: Callable[..., Path], run: RunStudy, notes: Path, tmp_path: Path
) -> None:
    write(sweep={f"{SECTION}.number": [1, 2, 3, 4]}, options={"seconds": 1.0})
    output = run("-n", "auto", gpus=2)
    assert "2 workers [4 items]" in output
    assert "  workers: 2 (an experiment takes 1 of 2 GPUs)" in output
    found = stays(notes)
    assert shared(found) == []
    assert {one.gpus for one in found} == {(UUIDS[0],), (UUIDS[1],)}
    assert {one.visible for one in found} == {"0", "1"}, "an engine sees its own GPU only"
    assert busiest(found) == 2
    results = experiments_of(tmp_path)
    assert any(one["concurrent"] for one in results)
    for one in results:
        for neighbour in one["concurrent"]:
            assert neighbour["same_run"]
            assert neighbour["study"] == "study"
            assert neighbour["experiment"] != one["identity"]["experiment_id"]
    concurrent = [point.testbed["concurrent"] for point in result_of(tmp_path).points]
    assert concurrent.count(True) >= 2


@pytest.mark.slow
def test_cycles_stay_on_one_gpu_or_are_spread(write: Callable[..., Path], run: RunStudy, tmp_path: Path) -> None:
    cycles = {"n_cycles": 4, "cycle_order": "interleaved"}
    write("same", sweep={f"{SECTION}.number": [1, 2]}, execution=cycles)
    write("spread", sweep={f"{SECTION}.number": [1, 2]}, execution={**cycles, "devices": "spread"})
    output = run("-n", "2", files=("same.yaml", "spread.yaml"))
    same, spread = result_of(tmp_path, "same"), result_of(tmp_path, "spread")
    assert [len({*map(tuple, point.gpus)}) for point in same.points] == [1, 1]
    for point in spread.points:
        assert Counter(map(tuple, point.gpus)) == {(UUIDS[0],): 2, (UUIDS[1],): 2}
        assert gpu_spread(point, "seconds") is not None
    assert gpu_spread(same.points[0], "seconds") is None
    assert re.search(
        r"^number=1: output_tokens_per_second: standard deviation [\d.]+% between 2 GPUs, ", output, re.M
    )
    first = (tmp_path / "results/spread_run/experiments.csv").read_text().splitlines()
    assert {row.split(",")[first[0].split(",").index("gpus")] for row in first[1:]} == {*UUIDS[:2]}


@pytest.mark.slow
def test_resumed_cycles_run_on_the_gpu_of_the_replayed_ones(
    write: Callable[..., Path], run: RunStudy, notes: Path, tmp_path: Path
) -> None:
    write(sweep={f"{SECTION}.number": [1]}, execution={"n_cycles": 2})
    run("-k", "cycle=1", "--llem-results-dir=first", visible="1")
    run("-n", "1", "--llem-resume-from=first/study_run")
    assert [one.gpus for one in stays(notes)] == [(UUIDS[1],)] * 2


def _fake_gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = tuple(hardware.Gpu(f"GPU-{at}", name, index=at) for at, name in enumerate(names))
    monkeypatch.setattr(device_request, "visible_gpus", lambda: hardware.VisibleGpus(found, found[0]))


def test_spread_takes_each_set_in_turn(tmp_path: Path, noop_engine: None) -> None:
    study = {**STUDY, "sweep": {f"{SECTION}.gpus": [2]}, "execution": {"n_cycles": 4, "devices": "spread"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = load_study(tmp_path / "study.yaml")
    request = DeviceRequest(tuple("abcdefg"), 2)
    assert request.sets == (("a", "b"), ("c", "d"), ("e", "f")), "the odd one is left out"
    pools = [narrowed(request, loaded, one, None).pool for one in loaded.experiments]
    assert {*pools} == {*request.sets}
    assert pools[0] == pools[3]


def test_linked_gpus_are_taken_together(nvml_library: Path, tmp_path: Path) -> None:
    uuids = UUIDS[:4]
    gpus = [
        nvml.ScriptedGpu(uuid, [(0.0, 50.0)], {"nvlink": link})
        for uuid, link in zip(uuids, (1, 2, 1, 2), strict=True)
    ]
    script = nvml.Script(tmp_path / "script", gpus)
    script.write()
    links = nvml.run(nvml.environment(nvml_library, script), nvlinks, uuids)
    assert links == {frozenset((uuids[0], uuids[2])), frozenset((uuids[1], uuids[3]))}
    assert best_connected(uuids, 2, links) == (uuids[0], uuids[2])
    assert best_connected(uuids[1:], 2, links) == (uuids[1], uuids[3])
    assert best_connected(uuids[1:], 1, links) == (uuids[2],), "the other two are a pair"
    assert best_connected(uuids[:2], 2, links) == uuids[:2]
    everything = frozenset(frozenset((a, b)) for a in uuids for b in uuids if a != b)
    assert best_connected(uuids, 2, everything) == uuids[:2]


def test_model_is_compared_with_all_gpus_of_the_experiment() -> None:
    host = Host(64, (GpuCapacity("a", 40, (8, 0)), GpuCapacity("b", 80, (9, 0)), GpuCapacity("a", 40, (8, 0))))
    assert [host.device_memory_bytes(number) for number in (0, 1, 2, None)] == [64, 40, 80, 160]
    two = Host(64, (GpuCapacity("b", 80, (9, 0)),) * 2)
    assert [two.device_memory_bytes(number) for number in (1, 2)] == [80, 160]
    assert Host(64).device_memory_bytes(2) == 64


# ---- what ran beside ----


def test_energy_of_the_cpu_is_shared_with_neighbours(tmp_path: Path) -> None:
    result = ExperimentResult.read(min(RESULTS.glob("*.json")))
    energy = {"value": 5.0, "unit": "J", "method": "measured", "source": "rapl_package", "boundary": "cpu_package"}
    own = {**energy, "boundary": "gpu_board", "devices": ["GPU-0"], "not_judged": None}
    cpu = {**energy, "devices": ["package-0"], "not_judged": None}
    data = json.loads(result.model_dump_json())
    data["metrics"] |= {"cpu_energy_j": cpu, "gpu_energy_j": own, "energy_j": own}
    outcome = Outcome(json.dumps(data))

    alone = with_neighbours(outcome, ["GPU-0"], "run").data
    assert alone["concurrent"] == []
    assert alone["metrics"]["cpu_energy_j"] == cpu

    with owned(["GPU-1"], Owner.of_this_process("other", "there", session="run"), print):
        note = next(tmp_path_locks().glob("GPU-1.*.json"))
        text = json.loads(note.read_text())
        note.write_text(json.dumps(text | {"since": data["started_at"]}))
        beside = with_neighbours(outcome, ["GPU-0"], "run").data
    assert [(one["experiment"], one["same_run"]) for one in beside["concurrent"]] == [("there", True)]
    assert beside["metrics"]["cpu_energy_j"] == cpu | {"shared": True, "not_judged": SHARED}
    assert beside["metrics"]["gpu_energy_j"] == own
    assert beside["metrics"]["seconds"] == data["metrics"]["seconds"]


def tmp_path_locks() -> Path:
    import tempfile

    return Path(tempfile.gettempdir(), "pytest-llem-locks")


def test_shared_energy_has_a_label() -> None:
    summary = Summary(mean=1.0, n=1, unit="J", method="measured", boundary="cpu_package", shared=True)
    assert summary.label == "measured, shared"


# ---- how far GPUs differ ----


def _point(gpus: list[list[str]], values: list[float | None]) -> PointResult:
    seconds = Summary(mean=1.0, n=len(values), unit="s", values=values)
    return PointResult(id="p", axes={}, config={}, config_hash="0", metrics={"seconds": seconds}, gpus=gpus)


def test_spread_between_gpus_is_apart_from_that_between_cycles() -> None:
    gpus = [["a"], ["b"], ["c"]] * 2
    found = gpu_spread(_point(gpus, [9.0, 10.0, 11.0, 9.2, 10.2, 11.2]), "seconds")
    assert found is not None
    assert found.gpus == 3
    assert found.between == pytest.approx(1.0 / 10.1)
    assert found.within == pytest.approx((0.06 / 3) ** 0.5 / 10.1)
    assert found.interval is not None
    # s · √(2 / χ²) with χ² of 2 degrees of freedom: 7.378 and 0.0506
    assert found.interval == pytest.approx((found.between * 0.5207, found.between * 6.2847), rel=1e-3)


def test_spread_needs_two_gpus_and_an_interval_three() -> None:
    assert gpu_spread(_point([["a"], ["a"]], [1.0, 2.0]), "seconds") is None
    assert gpu_spread(_point([["a"], ["b"]], [1.0, None]), "seconds") is None
    assert gpu_spread(_point([], [1.0, 2.0]), "seconds") is None
    found = gpu_spread(_point([["a"], ["b"]], [1.0, 2.0]), "seconds")
    assert found is not None
    assert (found.gpus, found.interval, found.within) == (2, None, None)


# ---- faults ----


@pytest.mark.slow
def test_failure_stops_the_run_with_x(write: Callable[..., Path], run: RunStudy, notes: Path) -> None:
    write(sweep={f"{SECTION}.number": [*range(1, 9)]}, options={"fault": "raise"})
    run("-n", "2", "-x", status=2)
    assert len(stays(notes)) <= 3, "what runs at the failure ends, and nothing else starts"


@pytest.mark.slow
def test_ctrl_c_ends_all_experiments(
    write: Callable[..., Path], start: Start, notes: Path, tmp_path: Path
) -> None:
    write(sweep={f"{SECTION}.number": [1, 2, 3, 4]}, options={"seconds": 60})
    process = start("-n", "2")
    wait_until(lambda: len(stays(notes)) == 2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert result_of(tmp_path).status == "interrupted"
    assert not [one for one in notes.iterdir() if psutil.pid_exists(int(one.name))]


@pytest.mark.slow
def test_two_runs_with_crashing_workers_lose_and_share_nothing(
    write: Callable[..., Path], start: Start, notes: Path, tmp_path: Path
) -> None:
    """``tests/benchmarks/many_gpus.py stress`` does the same with 400 experiments."""
    for name in "ab":
        first = 100 * (name == "b")
        options = [{"gpus": (1, 2, 4)[at % 3], "number": first + at, "seconds": at % 4 / 4} for at in range(8)]
        write(name, experiments=[{SECTION: {"folder": str(notes), **one}} for one in options])
    runs = [start("-n", "3", "--max-worker-restart=9", gpus=4, files=(f"{name}.yaml",)) for name in "ab"]
    for number, process in enumerate(runs):
        wait_until(lambda: len(stays(notes)) >= 3)
        boards.workers_of(process.pid)[number].kill()
    for process in runs:
        process.communicate(timeout=300)
    entries = [entry for name in "ab" for entry in result_of(tmp_path, name).experiments]
    assert {entry.status for entry in entries} <= {"completed", "failed"}
    failed = [entry for entry in entries if entry.status == "failed"]
    assert len(failed) <= 2
    assert {entry.error.type for entry in failed if entry.error} <= {"WorkerCrash"}
    found = stays(notes)
    assert shared(found) == []
    assert set(Counter(one.number for one in found).values()) == {1}
    assert len(found) >= 14
