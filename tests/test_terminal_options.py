"""Test pytest's options for output and debugging with experiments."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import Results, WriteStudy
from tests.support.marks import slow

ONCE = {"n_cycles": 1, "cycle_order": "sequential"}


@pytest.fixture
def printing_study(write_study: WriteStudy) -> None:
    """Write a study of one experiment that prints a line and one that fails."""
    write_study(sweep={"noop.fault": ["say", "raise"]}, execution=ONCE)


@pytest.mark.usefixtures("printing_study")
class TestOutput:
    def test_output_is_shown_live_with_s(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-s")
        run.assert_outcomes(passed=1, failed=1)
        assert run.stdout.str().count("a word from the engine") == 2, "once for each batch"
        assert "experiment output" not in run.stdout.str()

    @pytest.mark.parametrize("option", ["--capture=sys", slow("--capture=fd"), slow("--capture=tee-sys")])
    def test_output_is_captured_without_s(self, pytester: pytest.Pytester, option: str) -> None:
        in_process = option != "--capture=fd"  # pytest has captured this process's file descriptors already
        run = (pytester.runpytest_inprocess if in_process else pytester.runpytest_subprocess)(
            "study.yaml", "-p", "llem", option
        )
        run.assert_outcomes(passed=1, failed=1)
        assert "a word from the engine" not in run.stdout.str()

    def test_output_of_passed_experiment_is_shown_on_request(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-rP")
        run.stdout.fnmatch_lines(["*experiment output*", "a word from the engine ☃"])

    @pytest.mark.slow
    def test_output_is_shown_in_terminal_that_cannot_encode_it(
        self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        monkeypatch.setenv("PYTHONUTF8", "0")
        pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-s").assert_outcomes(passed=1, failed=1)

    @pytest.mark.slow
    def test_s_changes_nothing_under_xdist(self, pytester: pytest.Pytester) -> None:
        run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-s", "-n", "1")
        run.assert_outcomes(passed=1, failed=1)


def test_output_of_failed_experiment_is_shown_and_kept(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.fault": ["say and raise"]}, execution=ONCE)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    run.stdout.fnmatch_lines(["*ValueError: the engine says no*", "*experiment output*", "a word from the engine"])
    [kept] = results.directory.glob("experiments/*.output.txt")
    assert "a word from the engine" in kept.read_text()


@pytest.mark.slow
def test_pdb_opens_at_failure_and_study_continues(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.fault": ["raise", "none"]}, execution=ONCE)
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--pdb"]
    done = subprocess.run(command, input="p 6 * 7\nc\n", capture_output=True, text=True, timeout=120)
    assert "(Pdb) 42" in done.stdout
    assert "INTERNALERROR" not in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert results.statuses() == {"fault=raise": "failed", "fault=none": "completed"}
