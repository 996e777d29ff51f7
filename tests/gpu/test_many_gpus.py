"""Several GPUs of one host: speed-up, neighbours, leases of two runs, and comparisons on one GPU and on two.

Skipped with fewer than two GPUs. With two of them this takes about ten minutes; each figure is in the report.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.results.experiment import DeviceEnergy
from pytest_llem.times import seconds_between
from tests.gpu.counters import Log, logging, note_parts
from tests.support import boards
from tests.support.boards import NOOP_ENGINE, SECTION, stays
from tests.support.environments import EVERYTHING, Environment

Found = Callable[[str, object], None]
Study = Callable[..., StudyResult]

METRICS = ("energy_per_output_token_j", "output_tokens_per_second")

#: An experiment of some seconds on one GPU.
QUICK: dict[str, Any] = {
    "n": 8,
    "max_input_tokens": 128,
    "max_output_tokens": 32,
    "pytorch": {"batch_size": 8},
    "warmup": {"n_warmup": 1, "convergence_detection": False},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 1.5},
}

FORKED = "--llem-start-method=forkserver"

#: Points of the sweep, which differ in nothing that matters.
POINTS = 32


@pytest.fixture(scope="module", autouse=True)
def uuids() -> list[str]:
    """UUIDs of the visible GPUs."""
    found = [gpu.uuid for gpu in visible_gpus().all]
    if len(found) < 2:
        pytest.skip(f"needs two GPUs, and there are {len(found)}")
    return found


def _results(folder: Path, name: str) -> Iterator[ExperimentResult]:
    """Yield the results of a study's experiments, in the order of their starts."""
    (directory,) = (folder / "results").glob(f"{name}_*")
    files = (file for file in (directory / "experiments").glob("*.json"))
    yield from sorted(map(ExperimentResult.read, files), key=lambda one: one.started_at)


def _gpus(result: ExperimentResult) -> list[DeviceEnergy]:
    """Return the GPUs whose energy is in a result."""
    return [one for one in result.devices if one.device.startswith("GPU-")]


def _span(results: list[ExperimentResult]) -> float:
    return seconds_between(min(one.started_at for one in results), max(one.completed_at for one in results))


def test_sweep_is_faster_and_each_gpus_energy_is_right(
    study: Study, llama_1b: Path, tmp_path: Path, uuids: list[str], found: Found
) -> None:
    alone: dict[str, float] = {}
    once: float | None = None
    for workers in [number for number in (1, 2, 4, 8) if number <= len(uuids)]:
        name, file = f"sweep{workers}", tmp_path / f"counters{workers}"
        with logging(file):
            result = study(
                name,
                *("-n", str(workers), FORKED),
                **QUICK,
                model=str(llama_1b),
                sweep={"random_seed": [*range(POINTS)]},
                execution={"n_cycles": 1, "experiment_gap_seconds": 0, "contended_retries": 0},
            )
        assert result.summary.completed == POINTS
        results, log = [*_results(tmp_path, name)], Log(file)
        seconds = _span(results)
        once = once or seconds
        found(f"-n {workers}: s for {POINTS} experiments", seconds)
        found(f"-n {workers}: speed-up / {workers}", once / seconds / workers)
        for one in results:
            (device,) = _gpus(one)  # a GPU that the engine does not use is not counted
            (gpu,) = one.environment["gpus"]
            assert device.device == gpu["uuid"]
            assert device.energy_j is not None
            assert one.window.began_at is not None
            assert one.window.ended_at is not None
            assert log.has(device.device, device.energy_j, one.window.began_at, one.window.ended_at)
            assert bool(one.concurrent) <= (workers > 1)
        note_parts(found, results, log)
        found(f"-n {workers}: windows whose energy the logger saw exactly", len(results))
        used = Counter(_gpus(one)[0].device for one in results)
        found(f"-n {workers}: experiments of each GPU", sorted(used.values()))
        assert len(used) == workers
        for metric in ("seconds", "energy_j"):
            mean = statistics.fmean(
                one.metrics[metric].value or 0 for one in results if workers == 1 or one.concurrent
            )
            alone.setdefault(metric, mean)
            found(f"-n {workers}: {metric} / that alone", mean / alone[metric])


def test_two_runs_share_no_gpu_and_starve_nobody(tmp_path: Path, uuids: list[str], found: Found) -> None:
    sizes = [number for number in (1, 2, 4) if number <= len(uuids)]
    notes = tmp_path / "notes"
    notes.mkdir()
    runs = []
    for name in "ab":
        options = [
            {"folder": str(notes), "gpus": sizes[at % len(sizes)], "number": at, "seconds": 0.5 + at % 3}
            for at in range(12)
        ]
        content = {**boards.STUDY, "name": name, "experiments": [{SECTION: one} for one in options]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "pytest", f"{name}.yaml", "-p", "llem", "-n", str(len(uuids)), FORKED]
        path = os.pathsep.join(filter(None, [str(NOOP_ENGINE), os.environ.get("PYTHONPATH", "")]))
        runs.append(
            subprocess.Popen(
                [*command, f"--rootdir={tmp_path}", "--llem-run-id=run"],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.DEVNULL,
            )
        )
    assert [run.wait(300) for run in runs] == [0, 0]
    had = stays(notes)
    assert len(had) == 24
    for uuid in uuids:
        on_it = [one for one in had if uuid in one.gpus]
        assert all(after.began >= before.ended for before, after in pairwise(on_it))
    results = [json.loads(file.read_text()) for file in tmp_path.glob("results/*/experiments/*.json")]
    waits = [one["gap"]["waited_seconds"] for one in results]
    found("longest wait for a lease, s", max(waits))
    found("GPUs in use at a time", boards.busiest(had))
    assert max(waits) < sum(one.ended - one.began for one in had)


def test_comparison_on_one_gpu_is_sharper_than_on_two(
    study: Study, llama_1b: Path, uuids: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Found
) -> None:
    """Both compare a configuration with itself: what differs is the GPU."""
    prefill = {"n": 32, "max_input_tokens": 512, "max_output_tokens": 1, "pytorch": {"batch_size": 32}}
    fields = {
        **QUICK,
        **prefill,  # hardly varies from process to process
        "model": str(llama_1b),
        "measurement": {"min_window_seconds": 6},  # turns have edges of their own
        "gates": {"metrics": [*METRICS]},
    }
    cycles = {"n_cycles": 4, "experiment_gap_seconds": 0, "contended_retries": 0}
    same = f"--llem-against={Environment(tmp_path / 'environment', *EVERYTHING).python}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuids[0])
    verdicts = {"one GPU": study("one", same, FORKED, **fields, execution=cycles).points[0].verdicts}
    study("two", FORKED, "--llem-save=first", "--llem-save-force", **fields, execution=cycles)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuids[1])
    compared = study("two", FORKED, "--llem-baseline=first", "--llem-compare-mismatch", **fields, execution=cycles)
    verdicts["two GPUs"] = compared.points[0].verdicts
    for where, judged in verdicts.items():
        for one in judged:
            assert one.ratio is not None
            assert one.interval is not None
            low, high = one.interval
            found(f"{where}: {one.metric}", f"{one.ratio:.4f}, half width {(high - low) / 2:.4f}, {one.verdict}")
