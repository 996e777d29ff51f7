"""Servers over the items of a session: which ones share a server, and what each of pytest's options means then."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Results, RunPytest
from tests.support.load_studies import processes_in, result_of, write_load_study
from tests.support.serving import entries, mock_server

SWEEP = {"load.concurrency": [1, 2, 3]}


@pytest.fixture(autouse=True)
def folder(pytester: pytest.Pytester) -> Path:
    """The folder of the study."""
    return pytester.path


@pytest.fixture
def newest(pytester: pytest.Pytester) -> Callable[[], Results]:
    """Return a function that returns the results of the newest run."""

    class Newest(Results):
        @property
        def directory(self) -> Path:
            return max((one for one in self.root.iterdir() if one.is_dir()), key=lambda one: one.stat().st_ctime_ns)

    return lambda: Newest(pytester.path / "results")


def servers(results: Results) -> list[tuple[str, int]]:
    """Return the server's id and the position of each completed experiment, in order of measurement."""
    found = [result_of(results, one) for one in results.manifest["experiments"] if one["status"] == "completed"]
    found.sort(key=lambda one: str(one["started_at"]))
    return [(one["server"]["id"], one["server"]["position"]) for one in found]


def groups(results: Results) -> list[list[int]]:
    """Return the positions on each server."""
    positions: dict[str, list[int]] = {}
    for server, position in servers(results):
        positions.setdefault(server, []).append(position)
    return list(positions.values())


@pytest.mark.parametrize(
    ("execution", "expected"),
    [({"n_cycles": 2}, [[1, 2, 3], [1, 2, 3]]), ({"server_reuse": "never"}, [[1], [1], [1]])],
    ids=["load", "never"],
)
def test_load_points_of_a_cycle_share_a_server(
    run_pytest: RunPytest, results: Results, folder: Path, execution: Any, expected: Any
) -> None:
    write_load_study(folder, sweep=SWEEP, execution=execution)
    run_pytest().assert_outcomes(passed=sum(map(len, expected)))
    assert groups(results) == expected
    assert not processes_in(folder)


def test_points_that_differ_in_more_than_load_have_own_servers(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    write_load_study(folder, sweep={"max_output_tokens": [4, 8], "load.concurrency": [1, 2]})
    run_pytest().assert_outcomes(passed=4)
    assert groups(results) == [[1, 2], [1, 2]]


def test_selected_point_starts_its_own_server(run_pytest: RunPytest, results: Results, folder: Path) -> None:
    write_load_study(folder, sweep=SWEEP)
    run_pytest("-k", "concurrency=2").assert_outcomes(passed=1, deselected=2)
    assert groups(results) == [[1]]


def test_last_failed_measures_the_failed_point_on_a_server_of_its_own(
    run_pytest: RunPytest, newest: Callable[[], Results], folder: Path
) -> None:
    write_load_study(folder, "--once", "once", "--exit-starting=5", sweep=SWEEP)
    run_pytest().assert_outcomes(passed=2, failed=1)
    assert groups(newest()) == [[1, 2]]
    run_pytest("--lf").assert_outcomes(passed=1)
    assert groups(newest()) == [[1]]


def test_exitfirst_stops_the_server(run_pytest: RunPytest, results: Results, folder: Path) -> None:
    write_load_study(folder, "--error-every=3", sweep={"load.concurrency": [1, 2]})
    run_pytest("-x").assert_outcomes(failed=1)
    assert [*results.statuses().values()] == ["failed", "pending"]
    assert not processes_in(folder)


def test_resume_measures_what_is_missing_on_one_server(
    run_pytest: RunPytest, newest: Callable[[], Results], folder: Path
) -> None:
    write_load_study(folder, "--once", "once", "--die-in-answer=6", sweep=SWEEP)
    run_pytest().assert_outcomes(passed=2, failed=1)
    resumed = run_pytest("--llem-resume")
    resumed.assert_outcomes(passed=3)
    resumed.stdout.fnmatch_lines(["*replayed*"])
