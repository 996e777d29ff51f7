"""``--llem-against``: two interpreters are measured interleaved, cycle by cycle, and compared in pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support import figures
from tests.support.environments import NOOP_ENGINE, ROOT, SITE_PACKAGES, Environment
from tests.support.marks import slow

AGAINST = f"--llem-against={sys.executable}"

#: Whole cycles alternate, as figures are made up for single experiments.
CYCLES = (AGAINST, "--llem-interleave=cycle")

#: A user's own engine, whose model memory is set by the checkout.
ENGINE = """
    from noop_engine import NoopEngine

    class Engine(NoopEngine):
        def model_memory_bytes(self):
            return {size}
"""


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment of another checkout, whose engine uses twice the memory."""
    environment = Environment(tmp_path_factory.mktemp("main") / "env", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    environment.add("mine", "1.0", own_engine=ENGINE.format(size=2_000_000))
    return environment


def test_other_plugins_see_both_sides_interleaved(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, main: Environment
) -> None:
    """The items are in the order in which they run, as --sw continues from a place in that order."""
    pytester.makepyfile(own_engine=ENGINE.format(size=1_000_000))
    write_study(backend="own_engine:Engine", sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    with (pytester.path / "conftest.py").open("a") as file:
        file.write(
            "\ndef pytest_collection_modifyitems(items):\n"
            "    print('seen:', *(item.name.partition('[')[0] for item in items))\n"
        )
    run = run_pytest(f"--llem-against={main.python}", "--collect-only", "-s")
    run.stdout.fnmatch_lines(["seen: experiment reference experiment reference *"])


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_both_sides_are_measured_and_compared_in_pairs(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write_study: WriteStudy,
    results: Results,
    main: Environment,
    workers: tuple[str, ...],
) -> None:
    pytester.makepyfile(own_engine=ENGINE.format(size=1_000_000))
    write_study(
        backend="own_engine:Engine",
        sweep={"n": [1, 2]},
        execution={"n_cycles": 2},
        gates={"metrics": ["model_memory_mb"]},
    )
    run = run_pytest(f"--llem-against={main.python}", *workers, "-rA")
    run.assert_outcomes(passed=4 + 4 + 2)
    run.stdout.fnmatch_lines(
        [
            "llem: noop *: 2 points × 2 cycles = 4 experiments, *",
            f"  against {main.python}: 4 experiments interleaved pass by pass, *",
            "*PASSED study.yaml::reference[[]n=1-cycle=1[]]*",
        ]
    )
    own, other = StudyResult.load(results.directory), StudyResult.load(results.directory / "reference")
    assert (own.summary.completed, other.summary.completed) == (4, 4)
    assert own.comparison is not None
    assert own.comparison.paired
    assert own.comparison.reference == str(main.python)
    for point in own.points:
        (verdict,) = point.verdicts
        assert (verdict.verdict, verdict.paired) == ("IMPROVEMENT", True)
        assert verdict.ratio == pytest.approx(0.5)
        assert (verdict.n, verdict.reference_n) == (2, 2)


def test_order_of_the_sides_alternates_by_cycle(run_pytest: RunPytest, write_study: WriteStudy) -> None:
    write_study(sweep={"noop.size": [1, 2]}, execution={"n_cycles": 2, "cycle_order": "interleaved"})
    run = run_pytest(AGAINST, "--co", "-q")
    order = [line.partition("::")[2].partition("-c")[::2] for line in run.outlines if "cycle=" in line]
    assert order == [
        (f"{side}[size={size}", f"ycle={cycle}]")
        for cycle, sides in ((1, ("experiment", "reference")), (2, ("reference", "experiment")))
        for size in (1, 2)
        for side in sides
    ]


def test_pairs_separate_drift_from_change(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    """Both sides drift by 20 % over the cycles. One takes 6 % more in every cycle."""
    pytester.makeconftest(figures.conftest())
    drifting = "(1 + 0.05 * cycle) * (1 + 0.001 * (-1) ** (cycle // 2))"
    wanted = {"energy_per_output_token_j": f"(1 if reference else 1.06) * {drifting}"}
    (pytester.path / "figures.json").write_text(json.dumps(wanted))
    write_study(
        sweep={"noop.size": [1]},
        execution={"n_cycles": 4, "skip_preflight": True},
        gates={"metrics": [*wanted]},
    )
    run = run_pytest(*CYCLES)
    run.assert_outcomes(passed=8, failed=1)
    run.stdout.fnmatch_lines(["*: 1.060 × the reference: REGRESSION (*"])


@pytest.fixture
def drift(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> Callable[..., pytest.RunResult]:
    """Run a study whose sessions differ by a factor, which must not be taken for a change."""
    pytester.makeconftest(figures.conftest())
    write_study(
        sweep={"noop.size": [1]},
        execution={"n_cycles": 4, "skip_preflight": True},
        gates={"metrics": ["energy_per_output_token_j"]},
    )

    def run(factor: int, *options: str) -> pytest.RunResult:
        wanted = {"energy_per_output_token_j": f"{factor} * (1 + 0.05 * cycle)"}
        (pytester.path / "figures.json").write_text(json.dumps(wanted))
        return run_pytest(*options)

    return run


def test_gate_alone_judges_newest_interleaved_session(drift: Callable[..., pytest.RunResult]) -> None:
    drift(1, *CYCLES, "--llem-run-id=turns").assert_outcomes(passed=8 + 1)
    drift(3, "--llem-run-id=later").assert_outcomes(passed=4)
    run = drift(3, *CYCLES, "-k", "regression", "-rP")
    run.assert_outcomes(passed=1, deselected=8)
    run.stdout.fnmatch_lines(
        [
            "*1.000 × the reference: SAME*paired*",
            "llem: 1 gate judged results of an earlier run: results/noop_turns",
        ]
    )


@pytest.mark.parametrize("selected", ["regression or experiment or reference", "not regression"])
def test_session_with_another_interpreter_is_not_judged(
    drift: Callable[..., pytest.RunResult], tmp_path: Path, selected: str
) -> None:
    other = Environment(tmp_path / "other", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    drift(1, f"--llem-against={other.python}", "--llem-interleave=cycle", "-k", selected)
    run = drift(1, *CYCLES, "-k", "regression")
    run.assert_outcomes(failed=1, deselected=8)
    run.stdout.fnmatch_lines(["*: energy_per_output_token_j: cannot be judged: the reference has no results"])


def test_reference_of_another_session_is_not_compared(drift: Callable[..., pytest.RunResult]) -> None:
    drift(1, *CYCLES).assert_outcomes(passed=8 + 1)
    run = drift(3, *CYCLES, "-k", "experiment or regression")
    run.assert_outcomes(passed=4, failed=1, deselected=4)
    run.stdout.fnmatch_lines(["*cannot be judged: no value in the reference; its reference was not selected, *"])


@pytest.mark.slow
def test_resume_is_not_offered_after_interrupted_comparison(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    text = figures.conftest() + (
        "def run(job, **options):\n"
        "    if job.python is not None:\n"
        "        raise KeyboardInterrupt\n"
        "    return _done(job, **options)\n"
    )
    pytester.makeconftest(text)
    (pytester.path / "figures.json").write_text("{}")
    write_study(sweep={"noop.size": [1]}, execution={"n_cycles": 2, "skip_preflight": True})
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *CYCLES)
    assert run.ret == pytest.ExitCode.INTERRUPTED
    assert (results.manifest["status"], results.manifest["completed"]) == ("interrupted", 1)
    run.stdout.no_fnmatch_line("*--llem-resume*")


def test_reference_that_cannot_run_is_reported_in_the_plan(
    run_pytest: RunPytest, write_study: WriteStudy, tmp_path: Path
) -> None:
    empty = Environment(tmp_path / "empty")
    write_study(sweep={"noop.size": [1]}, execution={"n_cycles": 2})
    run = run_pytest(f"--llem-against={empty.python}", "--co")
    run.stdout.fnmatch_lines(["  preflight of the reference, will fail: *"])


def test_plan_lists_experiments_of_both_sides(
    pytester: pytest.Pytester, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"noop.size": [1]}, execution={"n_cycles": 2, "skip_preflight": True})
    run = run_pytest(AGAINST, "--co", "--llem-plan", "plan.json")
    assert run.ret == 0
    plan = json.loads((pytester.path / "plan.json").read_text())
    assert plan["reference"]["experiments"] == [one["id"] for one in plan["experiments"]]
    assert plan["reference"]["python"] == sys.executable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--llem-baseline", "main"), "*--llem-against: cannot be used with --llem-baseline: *"),
        (("--llem-resume",), "*--llem-resume and --llem-resume-from: cannot be used with --llem-against, *"),
    ],
)
def test_conflicting_options_are_refused(
    run_pytest: RunPytest, write_study: WriteStudy, options: tuple[str, ...], message: str
) -> None:
    write_study()
    run = run_pytest(AGAINST, *options)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([message])
