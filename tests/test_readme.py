"""Test that README.md is short, and that what it, the tutorials and docs/how-to/sweeps.md claim is correct."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llem import StudyResult, load_study
from tests.conftest import ROOT, Results

README = (ROOT / "README.md").read_text()
FIRST_STUDY = (ROOT / "docs" / "tutorials" / "first-study.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("[!_]*/*.md")))]


def test_readme_is_one_screen() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 900


@pytest.mark.parametrize("name", ["main-job", "tests"])
def test_command_for_ci_is_one_line(name: str) -> None:
    """``.ci/run`` takes the command after the line ``<!-- name -->``."""
    found = re.search(rf"^<!-- {name} -->\n```bash\n(.*?)\n```$", README, re.M | re.S)
    assert found
    assert found[1].startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt")
    assert "\n" not in found[1]


@pytest.mark.parametrize("failing", ["sphinx-build", "ruff", "mypy", "lint-imports", "pre-commit", None])
def test_ci_run_fails_if_one_linter_does(tmp_path: Path, failing: str | None) -> None:
    found = re.search(r"^stage 'lint.*?' '(.*?)'$", (ROOT / ".ci" / "run").read_text(), re.M | re.S)
    assert found
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in {*re.findall(r"\.venv/bin/([\w-]+)", found[1])}:
        (folder / name).symlink_to("/bin/false" if name == failing else "/bin/true")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", found[1]], cwd=tmp_path, check=False)
    assert (done.returncode != 0) == (failing is not None)


def test_example_study_has_twelve_lines_and_gates(tmp_path: Path) -> None:
    found = re.search(r"^```yaml\n(.*?)^```", README, re.M | re.S)
    assert found
    assert len(found[1].splitlines()) == 12
    (tmp_path / "study.yaml").write_text(found[1])
    study = load_study(tmp_path / "study.yaml")
    assert (len(study.points), len(study.experiments), len(study.budgets)) == (4, 20, 4)


def test_pictures_are_small() -> None:
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert shown == ["docs/_static/terminal.svg", "docs/_static/report.png"]
    assert all((ROOT / one).stat().st_size < 300_000 for one in shown)


def test_example_plan_line_is_correct() -> None:
    study = load_study(ROOT / "studies" / "quickstart.yaml")
    size = "4 points × 3 cycles = 12 experiments"
    assert f"llem: {study.name} [{study.design_hash}]: {size}, shuffled, about " in FIRST_STUDY


def test_example_error_message_is_correct(pytester: pytest.Pytester) -> None:
    text = (ROOT / "studies" / "quickstart.yaml").read_text()
    (pytester.mkdir("studies") / "quickstart.yaml").write_text(text.replace("  precision: [", "  precison: ["))
    run = pytester.runpytest_inprocess("studies/quickstart.yaml", "-p", "llem")
    (line,) = re.findall(r"^studies/quickstart\.yaml:.*$", FIRST_STUDY, re.M)
    run.stdout.fnmatch_lines([line])


def test_named_options_exist(pytester: pytest.Pytester) -> None:
    named = {one for page in PAGES for one in re.findall(r"(?<![\w-])--llem-[a-z-]*[a-z]", page)}
    listed = set(re.findall(r"[\w-]+", pytester.runpytest_inprocess("--help", "-p", "llem").stdout.str()))
    assert len(named) > 10
    assert named <= listed


@pytest.mark.slow
def test_help_in_the_checkout_needs_no_extra() -> None:
    """pytest imports ``tests/conftest.py`` for it, where users have installed the extra ``pytorch`` alone."""
    code = "import sys; sys.modules['pandas'] = None; import pytest; sys.exit(pytest.main(['--help']))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--llem-save=NAME" in run.stdout


def test_sweep_examples_have_the_stated_points(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "sweeps.md").read_text()
    simple, common, grammar = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    for name, text in (("simple", simple), ("common", common), ("grammar", grammar)):
        (tmp_path / f"{name}.yaml").write_text(text)
    study = load_study(tmp_path / "simple.yaml")
    assert f"llem: {study.name} [{study.design_hash}]: 4 points × 3 cycles = 12 experiments, shuffled" in page
    study = load_study(tmp_path / "grammar.yaml")
    backends = [point.config.backend for point in study.points]
    assert (backends.count("pytorch"), backends.count("vllm")) == (9, 8)
    assert [point.id for point in study.points if point.skip] == [study.points[-1].id]
    assert len([point for point in study.points if point.xfail]) == 4


def test_no_two_tutorials_have_a_module_of_one_name() -> None:
    """Their projects are installed into one environment, where the first one of that name would be imported."""
    found: list[str] = []
    for tutorial in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        names = re.findall(r"^```python\n# ([\w./]+)\n", tutorial.read_text(), re.M)
        found += {name.removesuffix(".py").split("/")[0] for name in names}
    assert {"answers", "my_script"} <= {*found}
    assert len(found) == len({*found}), found


@pytest.mark.slow
def test_project_of_the_gate_tutorial_runs_and_can_fail(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed engine of the page runs, and fails a budget that it cannot meet."""
    page = (ROOT / "docs" / "tutorials" / "gate-in-ci.md").read_text()
    for name, text in re.findall(r"^```(?:python|yaml)\n# ([\w./]+)\n(.*?)^```", page, re.M | re.S):
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert "rank(batch)" in (pytester.path / "answers" / "engine.py").read_text()
    study = pytester.path / "studies" / "answers.yaml"
    budget = "{metric: output_tokens_per_second, min: 700, where: {batch_size: 8}}"
    assert budget in page
    study.write_text(f"{study.read_text()}budgets: [{budget.replace('700', '1000000')}]\n")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    run = pytester.runpytest_subprocess("studies/answers.yaml", "-p", "llem", "--llem-cycles=1", "-k=batch_size=8")
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["* is below 1,000,000 1/s*"])


def test_every_shipped_study_collects(pytester: pytest.Pytester) -> None:
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        assert load_study(path).name == path.stem
        run = pytester.runpytest_inprocess(f"studies/{path.name}", "-p", "llem", "--collect-only", "-qq")
        assert run.ret == 0


@pytest.mark.slow
def test_the_quickstart_study_passes_without_loading_torch(pytester: pytest.Pytester, results: Results) -> None:
    shutil.copy(ROOT / "studies" / "quickstart.yaml", pytester.path / "quickstart.yaml")
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    # .ci/run runs all cycles, and imports torch for each experiment.
    options = ("-p", "llem", "--llem-cycles=1", "--llem-start-method=forkserver")
    run = pytester.runpytest_subprocess("quickstart.yaml", *options)
    run.assert_outcomes(passed=4)
    loaded = {name.partition(".")[0] for name in json.loads((pytester.path / "modules.json").read_text())}
    assert loaded.isdisjoint({"torch", "transformers"})

    result = StudyResult.load(results.directory)
    assert (result.status, result.summary.completed, len(result.points)) == ("completed", 4, 4)
    for point in result.points:
        assert point.metrics["output_tokens_per_second"].n == 1
        assert (point.metrics["output_tokens_per_second"].mean or 0) > 0
        assert point.metrics["energy_j"].boundary == "cpu_package"
    run.stdout.fnmatch_lines(
        [
            "*= llem: quickstart =*",
            "*TTFT p50*J/out token*",
            "*bf16 * 1 * 1 *",
            "*bf16 * 8 * 1 *",
            "*fp32 * 1 * 1 *",
            "*fp32 * 8 * 1 *",
            "4 of 4 experiments completed",
            "results: results/quickstart_*",
        ]
    )
