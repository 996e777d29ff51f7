"""Test that the examples and claims of the README are correct."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pytest_llem import load_study
from pytest_llem.study.dataset import DatasetConfig
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """Return the code block after the line ``<!-- name -->``."""
    found = re.search(rf"^<!-- {name} -->\n```\w+\n(.*?)^```", README, re.M | re.S)
    assert found, name
    return found[1]


def test_example_study_loads(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(block("study"))
    study = load_study(tmp_path / "study.yaml")
    assert (study.name, len(study.points), len(study.experiments)) == ("precision-vs-batch", 4, 12)


def test_example_study_of_prompt_lengths_loads(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(block("lengths"))
    study = load_study(tmp_path / "study.yaml")
    assert {isinstance(one := point.config.dataset, DatasetConfig) and one.n for point in study.points} == {64}
    other = block("lengths").replace("{mean: 256, stdev: 64, min: 16}", "{min: 16, max: 512}")
    (tmp_path / "study.yaml").write_text(other)
    assert load_study(tmp_path / "study.yaml").points[0].config.max_input_tokens == 512


def test_grammar_example_has_the_stated_points(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text("model: m\n")
    (tmp_path / "study.yaml").write_text(block("grammar"))
    study = load_study(tmp_path / "study.yaml")
    backends = [point.config.backend for point in study.points]
    assert (backends.count("pytorch"), backends.count("vllm")) == (9, 8)
    assert [point.id for point in study.points if point.skip] == [study.points[-1].id]
    assert len([point for point in study.points if point.xfail]) == 4


def test_example_error_message_is_correct(pytester: pytest.Pytester) -> None:
    broken = block("study").replace("  precision: [", "  precison: [")
    (pytester.path / "study.yaml").write_text(broken)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    run.stdout.fnmatch_lines(block("mistake").strip())


def test_example_plan_lines_are_correct(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(block("study"))
    for path, size in (
        (ROOT / "studies" / "quickstart.yaml", "4 points × 3 cycles = 12 experiments"),
        (tmp_path / "study.yaml", "4 points × 3 cycles = 12 experiments"),
    ):
        study = load_study(path)
        assert f"llem: {study.name} [{study.design_hash}]: {size}, shuffled, about " in README


@pytest.mark.parametrize("name", sorted({*re.findall(r"studies/(\w+)\.yaml", README)}))
def test_named_studies_exist(name: str) -> None:
    assert load_study(ROOT / "studies" / f"{name}.yaml").name == name


def test_named_options_exist(pytester: pytest.Pytester) -> None:
    hooks = ("llem_experiment", "llem_study")
    named = {one for one in re.findall(r"--llem-[\w-]+|\bllem_[a-z_]+\b", README) if not one.startswith(hooks)}
    listed = set(re.findall(r"[\w-]+", pytester.runpytest_inprocess("--help", "-p", "llem").stdout.str()))
    assert len(named) > 20
    assert named <= listed


def test_example_selections_select_the_stated_points(pytester: pytest.Pytester) -> None:
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    for arguments, count in (
        (["studies/llama.yaml", "-k", "batch_size=8 and not precision=fp32"], 3),
        (["studies/llama.yaml", "-k", "cycle=1"], 4),
        (["studies/llama.yaml::experiment[precision=bf16-batch_size=8-cycle=2]"], 1),
    ):
        assert f"'{arguments[-1]}'" in README
        run = pytester.runpytest_inprocess(*arguments, "-p", "llem", "--collect-only", "-q")
        assert len([line for line in run.outlines if "::" in line]) == count


@pytest.mark.slow
def test_example_gate_runs(pytester: pytest.Pytester) -> None:
    (pytester.path / "studies").mkdir()
    shutil.copy(ROOT / "studies" / "quickstart.yaml", pytester.path / "studies")
    (pytester.path / "test_cost.py").write_text(block("gate"))
    pytester.runpytest_subprocess("-p", "llem").assert_outcomes(passed=1)


def test_every_shipped_study_collects(pytester: pytest.Pytester) -> None:
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        run = pytester.runpytest_inprocess(f"studies/{path.name}", "-p", "llem", "--collect-only", "-qq")
        assert run.ret == 0
