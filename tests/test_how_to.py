"""Test that the code and claims of docs/how-to are correct, beyond what Sybil runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import load_study
from pytest_llem.study.dataset import DatasetConfig
from pytest_llem.study.server_command import PRESETS
from tests.conftest import ROOT, Results
from tests.support import made_up
from tests.support.pages import blocks, files, page

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_named_options_and_ini_keys_exist(pytester: pytest.Pytester, path: Path) -> None:
    """``llem_…`` is also the prefix of properties in JUnit XML, and ``pytest_llem_…`` of hooks."""
    named = set(re.findall(r"--llem-[\w-]+|\bllem_[a-z_]+\b", path.read_text()))
    named -= {"llem_energy_j", "llem_energy_boundary", "llem_energy_method", "llem_seconds", "llem_run"}
    listed = set(re.findall(r"[\w-]+", pytester.runpytest_inprocess("--help", "-p", "llem").stdout.str()))
    assert named - listed == set()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["studies/llama.yaml", "-k", "batch_size=8 and not precision=fp32"], 3),
        (["studies/llama.yaml", "-k", "cycle=1"], 4),
        (["studies/llama.yaml::experiment[precision=bf16-batch_size=8-cycle=2]"], 1),
    ],
)
def test_example_selections_select_the_stated_points(
    pytester: pytest.Pytester, arguments: list[str], count: int
) -> None:
    assert f"'{arguments[-1]}'" in page("how-to/select-points.md")
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    run = pytester.runpytest_inprocess(*arguments, "-p", "llem", "--collect-only", "-q")
    assert len([line for line in run.outlines if "::" in line]) == count


def test_selection_by_an_unknown_axis_has_the_stated_error(pytester: pytest.Pytester) -> None:
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    run = pytester.runpytest_inprocess("studies/llama.yaml", "-p", "llem", "-k", "batchsize=8", "--collect-only")
    [error] = [line for line in run.errlines if line.startswith("ERROR: -k")]
    assert error in page("how-to/select-points.md")


def test_example_studies_of_prompt_lengths_load(tmp_path: Path) -> None:
    normal, uniform = [one for one in blocks(page("how-to/prompts-and-models.md"), "yaml") if "input_len" in one]
    (tmp_path / "study.yaml").write_text(normal)
    study = load_study(tmp_path / "study.yaml")
    assert {isinstance(one := point.config.dataset, DatasetConfig) and one.n for point in study.points} == {64}
    (tmp_path / "study.yaml").write_text(uniform)
    assert load_study(tmp_path / "study.yaml").points[0].config.max_input_tokens == 512


def test_presets_have_the_stated_commands() -> None:
    stated = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)`", page("how-to/servers.md"), re.MULTILINE))
    assert {name: " ".join(preset.command) for name, preset in PRESETS.items()}.items() <= stated.items()


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("reference/errors.md", "## Messages of loads"),
        *((f"how-to/{name}.md", "## What can go wrong") for name in ("servers", "attach-server", "loads", "slo")),
        ("how-to/server-prompts.md", "## What can go wrong"),
    ],
)
def test_messages_about_servers_are_those_of_the_code(name: str, heading: str) -> None:
    """Values in messages are ``…`` on a page, and in braces in the code."""
    sources = [file.read_text() for file in (ROOT / "pytest_llem").rglob("*.py")]
    code = re.sub(r"(\{[^{}]*\})+", "…", re.sub(r'"\s*f?"', "", "\n".join(sources)))
    rows = re.findall(r"^\| `([^`]+)`", page(name).partition(heading)[2].partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 2
    parts = [part for row in rows for part in re.split(r"…|\d[\d.]*%?|'.*?'", row) if len(part.strip()) > 3]
    assert [part for part in parts if part.strip() not in code] == []


def test_budget_example_has_the_stated_items(pytester: pytest.Pytester) -> None:
    text = page("how-to/budgets.md")
    (pytester.path / "budget.yaml").write_text(files(text)["studies/budget.yaml"])
    run = pytester.runpytest_inprocess("budget.yaml", "-p", "llem", "--collect-only", "-q")
    budgets = [line.partition("::")[2] for line in run.outlines if "::budget[" in line]
    assert len(budgets) == 5
    assert "budget[output_tokens_per_second-precision=bf16-batch_size=8]" in budgets
    assert "`budget[output_tokens_per_second-precision=bf16-batch_size=8]`" in text


def test_data_frame_examples_run_on_a_results_directory(
    pytester: pytest.Pytester, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.experiments(monkeypatch, lambda job: {"output_tokens_per_second": 100.0 + job.identity["cycle"]})
    shutil.copy(ROOT / "studies" / "quickstart.yaml", pytester.path)
    pytester.runpytest_inprocess("quickstart.yaml", "-p", "llem", "--llem-no-gaps").assert_outcomes(passed=12)
    [named] = set(re.findall(r'"(results/quickstart_[^"]+)"', page("how-to/pandas-and-csv.md")))
    results.directory.rename(pytester.path / named)
    names: dict[str, Any] = {}
    for block in blocks(page("how-to/pandas-and-csv.md"), "python"):
        exec(block, names)
    assert (len(names["points"]), len(names["experiments"])) == (4, 12)
    columns = re.findall(r"`(energy\w+)`", page("how-to/pandas-and-csv.md"))
    assert columns
    assert {*columns} <= {*names["points"]}
    assert names["speed"].shape == (2, 2)
    assert names["speed"].loc["bf16", 8] == pytest.approx(102)


@pytest.mark.slow
def test_example_for_a_debugger_runs_in_one_process(tmp_path: Path) -> None:
    """In a process of its own, because torch can be imported only once."""
    (tmp_path / "debug.py").write_text(files(page("how-to/debugging-failures.md"))["debug.py"])
    run = subprocess.run([sys.executable, "debug.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(run.stdout) > 0


def test_example_hooks_are_called(
    pytester: pytest.Pytester, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RACK", "b12")
    made_up.experiments(monkeypatch, lambda job: {"peak_temperature_c": 80.0 + 6 * (job.identity["cycle"] == 3)})
    shutil.copy(ROOT / "studies" / "quickstart.yaml", pytester.path)
    pytester.makeconftest(files(page("how-to/hooks.md"))["conftest.py"])
    run = pytester.runpytest_inprocess("quickstart.yaml", "-p", "llem", "--llem-no-gaps")
    run.assert_outcomes(passed=8, failed=4)
    run.stdout.fnmatch_lines(["*the GPU was at 86.0 °C*"])
    assert results.manifest["environment"]["rack"] == "b12"
    assert (pytester.path / "artifacts" / "study_result.json").exists()
