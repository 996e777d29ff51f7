"""What pytest's own options about output and debugging come to for an experiment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Results
from tests.support.marks import slow

ONCE = {"n_cycles": 1, "cycle_order": "sequential"}


@pytest.fixture
def says(write_study: Callable[..., Path]) -> None:
    """Write a study of one experiment that says something, and another that fails."""
    write_study(sweep={"noop.fault": ["say", "raise"]}, execution=ONCE)


@pytest.mark.usefixtures("says")
class TestOutput:
    def test_is_shown_as_it_comes_with_s(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-s")
        run.assert_outcomes(passed=1, failed=1)
        assert run.stdout.str().count("a word from the engine") == 2, "once for each batch"
        assert "experiment output" not in run.stdout.str()

    @pytest.mark.parametrize("option", ["--capture=sys", slow("--capture=fd"), slow("--capture=tee-sys")])
    def test_is_captured_otherwise(self, pytester: pytest.Pytester, option: str) -> None:
        in_process = option != "--capture=fd"  # those of this process are pytest's own already
        run = (pytester.runpytest_inprocess if in_process else pytester.runpytest_subprocess)(
            "study.yaml", "-p", "llem", option
        )
        run.assert_outcomes(passed=1, failed=1)
        assert "a word from the engine" not in run.stdout.str()

    def test_of_what_passed_is_shown_on_request(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-rP")
        run.stdout.fnmatch_lines(["*experiment output*", "a word from the engine ☃"])

    def test_is_shown_whatever_the_terminal_can(
        self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        monkeypatch.setenv("PYTHONUTF8", "0")
        pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-s").assert_outcomes(passed=1, failed=1)

    @pytest.mark.slow
    def test_under_xdist_s_changes_nothing(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-s", "-n", "1")
        run.assert_outcomes(passed=1, failed=1)


def test_output_of_what_failed_is_shown(pytester: pytest.Pytester, write_study: Callable[..., Path]) -> None:
    write_study(sweep={"noop.fault": ["say and raise"]}, execution=ONCE)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    run.stdout.fnmatch_lines(["*ValueError: the engine says no*", "*experiment output*", "a word from the engine"])


@pytest.mark.slow
def test_the_debugger_opens_at_a_failure_and_the_study_goes_on(
    pytester: pytest.Pytester, write_study: Callable[..., Path], results: Results
) -> None:
    write_study(sweep={"noop.fault": ["raise", "none"]}, execution=ONCE)
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--pdb"]
    done = subprocess.run(command, input="p 6 * 7\nc\n", capture_output=True, text=True, timeout=120)
    assert "(Pdb) 42" in done.stdout
    assert "INTERNALERROR" not in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert results.statuses() == {"fault=raise": "failed", "fault=none": "completed"}
