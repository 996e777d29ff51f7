"""The line for each finished experiment if there is no live line, beside pytest's own output."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import Results, WriteStudy
from tests.support.marks import slow

LINE = re.compile(
    r"(?P<dot>[.FsxER]?) ?llem: (?P<number>\d+)/(?P<count>\d+) (?P<name>[^: ]+)"
    r"(?P<found>: | failed: | failed as expected: )(?P<rest>.*)"
)
FIGURES = re.compile(r"[\d,.e+-]+ tok/s, [\d,.e+-]+ J/output token \(estimated\), \d+\.\d s(; about .+ left)?")
SEQUENTIAL = {"n_cycles": 1, "cycle_order": "sequential", "start_method": "forkserver"}
ONE_EXPERIMENT = {"sweep": {"n": [1]}, "execution": {"n_cycles": 1}}

Lines = Callable[..., tuple[pytest.RunResult, list[re.Match[str]]]]


@pytest.fixture
def lines(pytester: pytest.Pytester) -> Lines:
    """Run pytest without a terminal; return its result and the parts of each experiment's line."""

    def call(*arguments: str) -> tuple[pytest.RunResult, list[re.Match[str]]]:
        done = pytester.runpytest_inprocess(*arguments, "-p", "llem")
        return done, [match for line in done.outlines if (match := LINE.fullmatch(line))]

    return call


def test_each_experiment_has_a_line_after_its_dot(
    pytester: pytest.Pytester, write_study: WriteStudy, lines: Lines
) -> None:
    pytester.makepyfile(test_before="def test_a(): pass\ndef test_b(): pass", test_then="def test_c(): pass")
    write_study(sweep={"n": [1, 2, 3]}, execution=SEQUENTIAL)
    done, found = lines("test_before.py", "study.yaml", "test_then.py")
    done.assert_outcomes(passed=6)
    assert [line["name"] for line in found] == ["n=1", "n=2", "n=3"]
    assert [(line["dot"], line["number"], line["count"]) for line in found] == [
        (".", f"{n}", "3") for n in (1, 2, 3)
    ]
    assert all(FIGURES.fullmatch(line["rest"]) for line in found), [line["rest"] for line in found]
    assert not found[-1]["rest"].endswith("left")
    at = done.outlines.index("study.yaml ")
    assert re.fullmatch(r"test_before\.py \.\. +\[ 33%\]", done.outlines[at - 1])
    assert [bool(LINE.match(line)) for line in done.outlines[at + 1 : at + 4]] == [True] * 3
    assert re.fullmatch(r" +\[ 83%\]", done.outlines[at + 4]), "pytest's progress, as after any file"
    assert re.fullmatch(r"test_then\.py \. +\[100%\]", done.outlines[at + 5])
    assert "" not in done.outlines[at : at + 6]


@pytest.mark.slow
def test_controller_writes_the_lines_under_xdist(
    pytester: pytest.Pytester, write_study: WriteStudy, lines: Lines
) -> None:
    pytester.makepyfile(test_before="def test_a(): pass\ndef test_b(): pass")
    write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    done, found = lines("test_before.py", "study.yaml", "-n", "2")
    done.assert_outcomes(passed=4)
    assert sorted(line["name"] for line in found) == ["n=1", "n=2"]
    assert [line["number"] for line in found] == ["1", "2"]
    done.stdout.re_match_lines([r" *\.* +\[100%\]$"])


@pytest.mark.parametrize("workers", [(), slow(("-n", "1"))], ids=["serial", "xdist"])
def test_verbose_shows_each_line_below_its_test(
    write_study: WriteStudy, lines: Lines, workers: tuple[str, ...]
) -> None:
    write_study(sweep={"n": [1, 2]}, execution=SEQUENTIAL)
    done, found = lines("study.yaml", "-v", *workers)
    passed = [at for at, line in enumerate(done.outlines) if "PASSED" in line]
    assert [done.outlines[at + 1].partition(":")[0] for at in passed] == ["llem", "llem"]
    assert [line["dot"] for line in found] == ["", ""]
    percentages = re.findall(r"\[ *(\d+)%\]", done.stdout.str())
    assert percentages == ["50", "100"]
    assert "" not in done.outlines[passed[0] : passed[-1] + 2]


@pytest.mark.parametrize("quiet", ["-q", "-p no:terminal"])
def test_quiet_runs_have_no_lines(write_study: WriteStudy, lines: Lines, results: Results, quiet: str) -> None:
    write_study(**ONE_EXPERIMENT)
    done, found = lines("study.yaml", *quiet.split())
    assert done.ret == 0
    assert found == []
    assert "llem: 1/1" not in done.stdout.str()
    assert results.manifest["completed"] == 1


@pytest.mark.parametrize(
    "options",
    [
        # Each option changes another part of pytest's output.
        "-s -x --no-header --tb=no -o console_output_style=classic",
        "--capture=tee-sys --no-summary --tb=line -o console_output_style=count -p no:cacheprovider",
        "--color=yes -rA --durations=3 --show-capture=no -o console_output_style=times -p no:logging",
    ],
)
def test_other_output_options_do_not_change_the_lines(write_study: WriteStudy, lines: Lines, options: str) -> None:
    write_study(**ONE_EXPERIMENT)
    done, _ = lines("study.yaml", *options.split())
    assert done.ret == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout.str())
    assert len(re.findall(r"^\. llem: 1/1 n=1: .* J/output token \(estimated\), \d", text, re.MULTILINE)) == 1
    assert "INTERNALERROR" not in text + done.stderr.str()


def test_line_without_tokens_has_the_energy_of_a_pass(
    pytester: pytest.Pytester, write_study: WriteStudy, lines: Lines
) -> None:
    pytester.makepyfile(own="def answer(prompt): return 'a text'")
    (pytester.path / "prompts.txt").write_text("one\ntwo\n")
    removed = dict.fromkeys(("max_input_tokens", "max_output_tokens", "model"))
    write_study(**ONE_EXPERIMENT, **removed, backend="own:answer", dataset="prompts.txt")
    _, found = lines("study.yaml", "-o", "pythonpath=.")
    assert re.fullmatch(r"[\d,.e+-]+ J/pass \(estimated\), \d+\.\d s", found[0]["rest"]), found


@pytest.mark.slow
def test_line_of_a_failure_has_the_reason(write_study: WriteStudy, lines: Lines) -> None:
    faults = ["raise", "kill", "none", "hang", "long message"]
    write_study(
        sweep={"noop.fault": faults},
        execution={**SEQUENTIAL, "experiment_timeout_seconds": 8},
        xfail=[{"where": {"noop.fault": "kill"}, "reason": "known"}],
    )
    _, found = lines("study.yaml", "--tb=no")
    by_name = {line["name"]: f"{line['dot']}{line['found']}{line['rest']}" for line in found}
    assert len(by_name) == 5
    assert re.match(
        r"F failed: exception while measuring: ValueError: the engine says no, \d+\.\d s", by_name["fault=raise"]
    )
    assert re.match(
        r"x failed as expected: crash while measuring: the process was ended by SIGKILL", by_name["fault=kill"]
    )
    assert re.match(r"\.: [\d,]+ tok/s, ", by_name["fault=none"])
    assert re.match(r"F failed: timeout while measuring: not finished after 8 s, \d+\.\d s", by_name["fault=hang"])
    assert max(map(len, by_name.values())) < 170


def test_skipped_experiment_has_no_line_and_is_counted(write_study: WriteStudy, lines: Lines) -> None:
    write_study(sweep={"n": [1, 2, 3]}, execution=SEQUENTIAL, skip=[{"where": {"n": 2}, "reason": "too slow"}])
    done, found = lines("study.yaml")
    done.assert_outcomes(passed=2, skipped=1)
    assert [(line["name"], line["number"]) for line in found] == [("n=1", "1"), ("n=3", "3")]


def test_experiment_that_fails_in_setup_has_a_line(
    pytester: pytest.Pytester, write_study: WriteStudy, lines: Lines
) -> None:
    pytester.makeconftest("def pytest_runtest_setup(item):\n    assert 'n=2' not in item.name, 'not this one'")
    write_study(sweep={"n": [1, 2]}, execution=SEQUENTIAL)
    _, found = lines("study.yaml", "--tb=no")
    assert [(line["dot"], line["name"], line["found"]) for line in found] == [
        (".", "n=1", ": "),
        ("E", "n=2", " failed: "),
    ]


def test_dots_of_gates_are_on_a_separate_line(write_study: WriteStudy, lines: Lines) -> None:
    write_study(sweep={"n": [1, 2]}, execution=SEQUENTIAL, budgets=[{"metric": "output_tokens", "max": 1e9}])
    done, found = lines("study.yaml")
    done.assert_outcomes(passed=4)
    assert len(found) == 2
    assert [line for line in done.outlines if re.fullmatch(r"\.\. +\[100%\]", line)]


def test_replayed_experiments_have_no_lines(write_study: WriteStudy, lines: Lines) -> None:
    write_study(sweep={"n": [1, 2]}, execution=SEQUENTIAL)
    lines("study.yaml")
    done, found = lines("study.yaml", "--llem-resume", "--llem-run-id", "again")
    done.assert_outcomes(passed=2)
    assert found == []


@pytest.mark.slow
def test_results_are_kept_if_the_output_pipe_closes(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    """pytest itself gives up, and what was measured is kept."""
    write_study(sweep={"n": [1, 2, 3]}, execution=SEQUENTIAL)
    command = f"{sys.executable} -m pytest -p llem study.yaml | grep -m 1 'llem: 1/3'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert LINE.fullmatch(done.stdout.rstrip())
    assert results.manifest["status"] == "aborted"
    assert 1 <= results.study_result["summary"]["completed"] < 3
