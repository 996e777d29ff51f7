"""The first load on a server, measured again as the last one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.execution import experiment
from pytest_llem.isolation import launcher
from pytest_llem.isolation.launcher import Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.load_driver import measure_again
from pytest_llem.results.drift import METRICS, first_load, server_drift
from pytest_llem.results.serving import DriftRecord
from pytest_llem.serving.errors import DatasetExhaustedError
from pytest_llem.study.load import LoadConfig
from tests.conftest import Results, RunPytest
from tests.support.load_studies import patient, processes_in, result_of, write_load_study
from tests.support.loads import load_point
from tests.support.marks import slow

SWEEP = {"load.concurrency": [1, 2, 3]}


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """The folder of the study."""
    return pytester.path


@pytest.fixture
def run_pytest(run_pytest: RunPytest, pytester: pytest.Pytester) -> RunPytest:
    """Run pytest as the fixture of all tests does, and again if the machine was too busy."""
    return patient(run_pytest, pytester.path)


def drifts(results: Results) -> dict[str, Any]:
    """Return the drift in each result, by the id of its experiment."""
    entries = results.manifest["experiments"]
    return {one["experiment_id"]: result_of(results, one)["server"]["drift"] for one in entries}


def test_server_that_slows_down_is_reported(
    run_pytest: RunPytest, results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first load has some 10 requests and the two others some 40: then each step takes 5 times as long.

    A pause of the machine changes the measured speeds less than that.
    """
    slower = ("--delay-percent", "400", "--delay-after", "25")
    write_load_study(folder, *slower, sweep=SWEEP, measurement={"min_window_seconds": 0.5})
    timeouts: list[float] = []

    def run_isolated(job: Job, **options: Any) -> Outcome:
        timeouts.append(options["timeout"])
        return launcher.run_isolated(job, **options)

    monkeypatch.setattr(experiment, "run_isolated", run_isolated)
    run = run_pytest("--llem-html=page.html", "--llem-timeout=60")
    run.assert_outcomes(passed=3)
    assert timeouts[-3:] == [60, 60, 120], "the last one has the time of the first one, too"
    text = "by the first load measured again as the last one: *output tokens/s -*, TPOT p50 +*%"
    run.stdout.fnmatch_lines([f"warning: drift of one server, {text}"])
    first, second, third = drifts(results).values()
    assert first is second is None
    assert third["first"] == "concurrency=1"
    assert third["load"]["concurrency"] == 1
    metrics = result_of(results, results.manifest["experiments"][0])["metrics"]
    assert all(third["before"][name] == metrics[name]["value"] for name in third["before"])
    assert third["after"]["output_tokens_per_second"] < third["before"]["output_tokens_per_second"]
    assert third["after"]["tpot_p50_ms"] > third["before"]["tpot_p50_ms"]
    assert "<dt>Drift</dt>" in (folder / "page.html").read_text()
    requests = next(results.directory.rglob(f"{results.manifest['experiments'][2]['config_hash']}*requests.csv"))
    phases = [line.partition(",")[0] for line in requests.read_text().splitlines()]
    assert {"ramp", "window", "drift"} <= {*phases}
    outputs = requests.with_name(requests.name.replace("requests", "outputs")).read_text().splitlines()
    assert len(outputs) == 1 + phases.count("window"), "the outputs are those of the window"


@pytest.mark.parametrize(
    ("options", "execution"),
    [
        slow(("-k", "concurrency=2"), {}),
        ((), {"check_drift": False}),
        slow((), {"server_reuse": "never"}),
    ],
    ids=["one selected", "switched off", "own servers"],
)
def test_drift_needs_a_server_that_several_loads_share(
    run_pytest: RunPytest, results: Results, folder: Path, options: tuple[str, ...], execution: dict[str, Any]
) -> None:
    write_load_study(folder, sweep={"load.concurrency": [1, 2]}, execution=execution)
    run = run_pytest(*options)
    run.stdout.no_fnmatch_line("*for drift*")
    measured = [one for one in results.manifest["experiments"] if one["status"] == "completed"]
    assert measured
    assert all(result_of(results, one)["server"]["drift"] is None for one in measured)


def test_plan_has_the_time_of_drift(pytester: pytest.Pytester, folder: Path) -> None:
    write_load_study(folder, sweep=SWEEP, measurement={"min_window_seconds": 30}, execution={"n_cycles": 2})
    run = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-plan=plan.json")
    run.stdout.fnmatch_lines(["llem: load * time unknown (windows: 3 min, and 60 s for drift) *"])
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["load_window_seconds"], plan["drift_window_seconds"]) == (180, 60)


#: A conftest.py, for pytest in a process of its own, that sends a signal when the first load is measured again.
SIGNAL_AGAIN = """
import os
from pytest_llem.execution import experiment

run = experiment.run_isolated

def run_isolated(job, **options):
    class Watcher:
        refresh_every_s = 1.0

        def see(self, seen):
            if getattr(seen, "phase", "") == "the first load again, measuring":
                {action}

        def refresh(self):
            pass

    return run(job, **options | {{"watcher": Watcher()}})

experiment.run_isolated = run_isolated
"""


@pytest.mark.slow
def test_server_that_dies_while_drift_is_measured_keeps_the_result(
    pytester: pytest.Pytester, results: Results, folder: Path
) -> None:
    (folder / "conftest.py").write_text(SIGNAL_AGAIN.format(action='os.kill(job.server["pid"], 9)'))
    write_load_study(folder, sweep={"load.concurrency": [1, 2]}, measurement={"min_window_seconds": 0.5})
    run = patient(pytester.runpytest_subprocess, folder)("study.yaml", "-p", "llem")
    run.assert_outcomes(passed=2)
    run.stdout.fnmatch_lines(["warning: the first load on the server could not be measured again: *"])
    assert [*drifts(results).values()][1]["after"] == {}
    assert not processes_in(folder)


@pytest.mark.slow
def test_ctrl_c_while_drift_is_measured_leaves_nothing(results: Results, folder: Path) -> None:
    (folder / "conftest.py").write_text(SIGNAL_AGAIN.format(action="os.killpg(0, 2)"))
    write_load_study(folder, sweep={"load.concurrency": [1, 2]}, measurement={"min_window_seconds": 0.5})
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
    run = subprocess.run(command, start_new_session=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert "1 of 2 experiments completed, 1 interrupted" in run.stdout
    assert results.manifest["experiments"][1]["error"]["kind"] == "interrupted"
    assert not processes_in(folder)


def test_error_while_drift_is_measured_is_a_reason() -> None:
    def fail(load: LoadConfig) -> Any:
        raise DatasetExhaustedError(f"the dataset is too short for concurrency {load.concurrency}")

    drift = DriftRecord(first="a", load={"concurrency": 4}, before={"ttft_p50_ms": 1.0})
    found, requests = measure_again(drift, fail)
    assert (found.after, found.reason) == ({}, "the dataset is too short for concurrency 4")
    assert not requests


def test_found_load_of_a_search_is_measured_again() -> None:
    slo = {"ttft_ms": 100}
    searched = LoadConfig.model_validate({"concurrency": "auto", "slo": slo, "search": {"high": 64}})
    known = {"energy_per_output_token_j": 0.5, "output_tokens_per_second": 8.0}
    result = {
        "load": {"concurrency": 12, "rate": None},
        "metrics": {name: {"value": known.get(name), "method": "measured"} for name in METRICS},
    }
    drift = first_load("auto", searched.model_dump(mode="json"), result)
    assert LoadConfig.model_validate(drift.load).concurrency == 12
    assert drift.before == known


def record(energy: float, speed: float, method: Any = "measured") -> DriftRecord:
    """Return a drift to so many times the energy and speed."""
    before = {"energy_per_output_token_j": 2.0, "output_tokens_per_second": 10.0}
    after = {"energy_per_output_token_j": 2.0 * energy, "output_tokens_per_second": 10.0 * speed}
    return DriftRecord(first="a", load={"concurrency": 1}, before=before, after=after, method=method)


@pytest.mark.parametrize(
    ("found", "is_large"),
    [
        ([record(1.04, 0.97)], False),
        ([record(1.06, 0.97)], True),
        ([record(1.0, 0.94)], True),
        ([record(1.1, 1.0), record(0.92, 1.0)], False),
        ([record(1.3, 1.0, "estimated")], False),
    ],
    ids=["small", "energy", "speed", "mean of servers", "estimate"],
)
def test_drift_is_a_warning_from_5_percent_on(found: list[DriftRecord], is_large: bool) -> None:
    drift = server_drift([load_point({"concurrency": 1}, drifts=[one]) for one in found])
    assert drift is not None
    assert drift.is_large is is_large
    assert ("(estimated)" in drift.text) is (found[0].method == "estimated")


def test_study_without_drift_has_none() -> None:
    failed = DriftRecord(first="a", load={"concurrency": 1}, before={"ttft_p50_ms": 1.0}, reason="not steady")
    assert server_drift([load_point({"concurrency": 1}), load_point({"concurrency": 2}, drifts=[failed])]) is None
