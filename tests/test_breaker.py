"""A study stops after consecutive failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Results, RunPytest, WriteStudy

REASON = "3 experiments in a row failed (execution.max_consecutive_failures)"


@pytest.fixture
def write(write_study: WriteStudy) -> Callable[..., None]:
    """Write a study with these faults in this order."""

    def write(*faults: str, limit: int | None = 3, **changes: Any) -> None:
        execution = {"n_cycles": 1, "cycle_order": "sequential", "max_consecutive_failures": limit}
        named = [f"{fault}{' ' * number}" for number, fault in enumerate(faults)]  # every point is another
        write_study(sweep={"noop.fault": named}, execution=execution, **changes)

    return write


def _statuses(results: Results) -> list[str]:
    return list(results.statuses().values())


def test_rest_is_skipped_after_consecutive_failures(
    run_pytest: RunPytest, write: Callable[..., None], results: Results
) -> None:
    write("raise", "none", "raise", "kill", "memory", "none", "none")
    run = run_pytest("-rs")
    run.assert_outcomes(failed=4, passed=1, skipped=2)
    assert _statuses(results) == ["failed", "completed", "failed", "failed", "failed", "skipped", "skipped"]
    assert results.manifest["experiments"][-1]["reason"] == REASON
    assert results.manifest["status"] == "aborted"
    run.stdout.fnmatch_lines(
        [
            f"1 of 7 experiments completed, 4 failed, 2 skipped; stopped: {REASON}",
            "run again with --llem-resume to continue",
            f"SKIPPED *study.yaml:*: {REASON}",
        ]
    )


@pytest.mark.slow
def test_workers_stop_after_consecutive_failures(
    run_pytest: RunPytest, write: Callable[..., None], results: Results
) -> None:
    write(*["raise"] * 12)
    run = run_pytest("-n", "2")
    statuses = _statuses(results)
    assert 3 <= statuses.count("failed") <= 5, "one that has begun is finished"
    assert statuses.count("skipped") == 12 - statuses.count("failed")
    assert run.ret == pytest.ExitCode.TESTS_FAILED


def test_default_limit_is_five_failures(run_pytest: RunPytest, write_study: WriteStudy, results: Results) -> None:
    faults = [f"raise{' ' * number}" for number in range(8)]
    write_study(sweep={"noop.fault": faults}, execution={"n_cycles": 1})
    run_pytest().assert_outcomes(failed=5, skipped=3)


def test_limit_of_null_never_stops(run_pytest: RunPytest, write: Callable[..., None], results: Results) -> None:
    write(*["raise"] * 7, limit=None)
    run_pytest().assert_outcomes(failed=7)
    assert results.manifest["status"] == "completed"


def test_preflight_refusals_do_not_count_as_failures(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(
        sweep={"backend": ["noop", "none.of:That", "none.of:This"]},
        execution={"n_cycles": 1, "cycle_order": "sequential", "max_consecutive_failures": 2},
        noop=None,
    )
    run_pytest().assert_outcomes(failed=2, passed=1)
    assert results.manifest["status"] == "completed"


def test_expected_failures_do_not_count(
    run_pytest: RunPytest, write: Callable[..., None], results: Results
) -> None:
    xfail = [{"where": {"fault": ["raise", "raise "]}, "reason": "as ever"}]
    write("raise", "raise", "raise", limit=2, xfail=xfail)
    run_pytest().assert_outcomes(xfailed=2, failed=1)


def test_other_study_of_the_run_continues(
    run_pytest: RunPytest, write: Callable[..., None], write_study: WriteStudy, results: Results
) -> None:
    write("raise", "raise", "none", limit=2)
    write_study("other.yaml", name="other", sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    run = run_pytest(files=["study.yaml", "other.yaml"])
    run.assert_outcomes(failed=2, skipped=1, passed=2)
