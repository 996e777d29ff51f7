"""Test that README.md is short, and that what README.md and the tutorials claim is correct."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pytest_llem import load_study
from tests.conftest import ROOT

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
    (pytester.path / "study.yaml").write_text(text.replace("  precision: [", "  precison: ["))
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    (line,) = re.findall(r"^study\.yaml:.*$", FIRST_STUDY, re.M)
    run.stdout.fnmatch_lines([line])


def test_named_options_exist(pytester: pytest.Pytester) -> None:
    named = {one for page in PAGES for one in re.findall(r"(?<![\w-])--llem-[a-z-]*[a-z]", page)}
    listed = set(re.findall(r"[\w-]+", pytester.runpytest_inprocess("--help", "-p", "llem").stdout.str()))
    assert len(named) > 10
    assert named <= listed


def test_every_shipped_study_collects(pytester: pytest.Pytester) -> None:
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        assert load_study(path).name == path.stem
        run = pytester.runpytest_inprocess(f"studies/{path.name}", "-p", "llem", "--collect-only", "-qq")
        assert run.ret == 0
