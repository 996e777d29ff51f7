"""Test the pages of the documentation: links, code blocks, and an entry for every name that users may look up."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from sybil.parsers.myst import CodeBlockParser

import pytest_llem
from pytest_llem import cli, hookspecs
from pytest_llem._plugin.declarations import INI
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.cli.command import DONE, FAILED, INTERRUPTED, NOT_RUN
from pytest_llem.doctor import records
from pytest_llem.engines import protocol
from pytest_llem.measurement import requests, window
from pytest_llem.results.document import Record
from pytest_llem.results.environment import VARIABLES
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorKind, Manifest
from pytest_llem.results.quality_warnings import WARNINGS
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.tabular import experiment_table, point_table
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.schema import study_schema
from tests.conftest import ROOT
from tests.support.examples import SHOWN_ONLY, examples, run_page
from tests.support.pages import DOCS, anchors, pages, text_of
from tests.support.study_results import point, study_result

PAGES = pages()
REFERENCE = DOCS / "reference"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_code_spans_exist(page: Path) -> None:
    named = re.findall(r"`(?:python )?((?:docs|pytest_llem|tests|\.ci)/[\w./-]+)`", page.read_text())
    assert [one for one in named if not (ROOT / one).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_run(page: Path, pytester: pytest.Pytester) -> None:
    run_page(page, pytester)


@pytest.mark.parametrize("page", [page for page in PAGES if DOCS in page.parents], ids=name_of)
def test_every_code_block_is_run_or_skipped_with_a_reason(page: Path) -> None:
    handled = {parser.language for parser in examples.parsers if isinstance(parser, CodeBlockParser)}
    block = re.compile(r"^([^\n]*)\n(`{3,}|:{3,})([^\n]*)\n.*?^\2$", re.MULTILINE | re.DOTALL)
    for before, _, language in block.findall("\n" + page.read_text()):
        if language.startswith("{"):  # a directive of MyST
            continue
        skipped = re.fullmatch(r'<!-- skip: next "(.{5,})" -->', before)
        assert skipped or language in handled - {*SHOWN_ONLY}, (before, language)


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- every name has an entry ----


def test_reference_lists_every_option_and_ini_key(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_inprocess("--help", "-p", "llem").stdout.str()
    options = set(re.findall(r"^  --(llem-[\w-]+)", listed, re.MULTILINE))
    assert len(options) > 20
    assert options <= anchors(REFERENCE / "options.md")
    assert INI.keys() <= anchors(REFERENCE / "configuration.md")


def test_reference_lists_every_metric() -> None:
    text = text_of(REFERENCE / "metrics.md").replace("`", "")
    for name, one in CATALOGUE.items():
        assert f"{{#{name}}}\n## {name}\n\n*{one.unit}, " in text
        assert one.meaning[1:] in text


def test_reference_lists_every_warning_code_with_advice() -> None:
    text = text_of(REFERENCE / "warnings.md").replace("`", "")
    for code, kind in WARNINGS.items():
        assert (
            f"{{#{code}}}\n## {code}\n\n*{kind.severity}*\n\n{kind.meaning}\n\nWhat to do: {kind.advice}\n" in text
        )


def test_reference_lists_every_study_field_with_type_and_meaning() -> None:
    text = text_of(REFERENCE / "study.md")
    listed = anchors(REFERENCE / "study.md")
    assert study_schema()["properties"].keys() <= listed
    fields = list(dotted(ExperimentConfig))
    assert "dataset.input_len.stdev" in fields
    assert {*fields} <= listed
    entries = re.findall(r'^\{id="([\w.]+)"\}\n#{2,4} `[\w.\[\]]+`\n\n\*(.+)\*\n\n(.+)$', text, re.MULTILINE)
    assert {name for name, _, _ in entries} == set(re.findall(r'^\{id="([\w.]+)"\}', text, re.MULTILINE))


def dotted(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Yield the fields of *model* by their dotted names, with those inside sections."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                yield from dotted(kind, f"{prefix}{name}.")


@pytest.mark.parametrize(
    ("page", "documents", "count"),
    [("results", (ExperimentResult, StudyResult, Manifest), 200), ("doctor", (records.Examination,), 90)],
)
def test_reference_describes_every_key_of_json_files(page: str, documents: Iterable[Any], count: int) -> None:
    listed = anchors(REFERENCE / f"{page}.md")
    rows = re.findall(r"^\| \[\].*`(\w+)` \| (.+) \| (.+) \|$", text_of(REFERENCE / f"{page}.md"), re.MULTILINE)
    assert len(rows) > count
    assert [row for row in rows if "–" in row] == []
    for document in documents:
        for name in document.model_fields:
            assert f"{document.__name__.lower()}.{name}" in listed


def test_reference_lists_every_record_of_doctor() -> None:
    kinds = [
        one
        for one in vars(records).values()
        if inspect.isclass(one) and issubclass(one, Record) and one.__module__ == records.__name__
    ]
    assert len(kinds) == 15
    listed = anchors(REFERENCE / "doctor.md")
    assert {f"{kind.__name__.lower()}.{name}" for kind in kinds for name in kind.model_fields} <= listed


def test_reference_lists_every_column_of_csv_files() -> None:
    text = (REFERENCE / "csv.md").read_text()
    parts = dict(re.findall(r"^## ([\w./…]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    result = study_result(point({"precision": "bf16"}, seconds=[1.0, 1.1, 1.2]))
    tables = {"summary.csv": point_table(result), "experiments.csv": experiment_table(result)}
    metrics = tuple(CATALOGUE)
    wanted = {name: [one for one in table.columns if one != "precision"] for name, table in tables.items()}
    wanted |= {
        "experiments/….requests.csv": list(requests.COLUMNS),
        "experiments/….power.csv": list(window.POWER_COLUMNS),
    }
    for name, columns in wanted.items():
        listed = set(re.findall(r"`(…?\w+)`", "".join(re.findall(r"^\| (.*?) \|", parts[name], re.MULTILINE))))
        for one in columns:
            metric = max((metric for metric in metrics if one.startswith(metric)), key=len, default=None)
            if name in tables and metric is not None and (suffix := one.removeprefix(metric)) in ("", *SUFFIXES):
                assert not suffix or f"…{suffix}" in listed, one
            else:
                assert one in listed, one


#: Suffixes of the columns of metrics.
SUFFIXES = ("_sd", "_ci95_low", "_ci95_high", "_n", "_method", "_boundary", "_invalid")


def test_reference_lists_every_kind_of_error() -> None:
    assert {*get_args(ErrorKind)} <= anchors(REFERENCE / "errors.md")


def test_reference_lists_every_environment_variable() -> None:
    sources = [file.read_text() for file in (ROOT / "pytest_llem").rglob("*.py")]
    read = r"environ(?:\.get\(|\.setdefault\(|\.pop\(|\[)\"([A-Z_]+)\"|\"([A-Z_]+)\" in os\.environ|(LLEM_[A-Z_]+)"
    found = {name for source in sources for names in re.findall(read, source) for name in names if name}
    assert {"LLEM_POWERCAP_ROOT", "LLEM_RUN_NOTE", "CUDA_VISIBLE_DEVICES"} <= found
    listed = anchors(REFERENCE / "environment.md")
    assert found - {"RACK"} <= listed  # RACK is that of an example
    assert {f"recorded-{name}" for name in VARIABLES} <= listed


def test_reference_lists_every_exit_status() -> None:
    listed = anchors(REFERENCE / "exit-status.md")
    assert {f"pytest-{int(status)}" for status in pytest.ExitCode} <= listed
    assert {f"llem-{status}" for status in (DONE, FAILED, NOT_RUN, INTERRUPTED)} <= listed
    text = (REFERENCE / "exit-status.md").read_text()
    parser = cli._parser()
    [commands] = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for name, command in commands.items():
        assert name in text
        for status, meaning in re.findall(r"^  (\d+) +(.+)$", command.epilog or "", re.MULTILINE):
            assert meaning.lower() in text.lower(), (name, status)


def test_every_optional_part_of_an_engine_is_listed() -> None:
    text = (REFERENCE / "api.md").read_text()
    for name in (name for name in vars(protocol) if name.startswith("Supports")):
        assert f".{name}\n" in text
        assert name in (protocol.Engine.__doc__ or "")


def test_reference_lists_every_public_name_and_hook() -> None:
    listed = anchors(REFERENCE / "api.md")
    assert {name.lower() for name in pytest_llem.__all__ if name != "__version__"} <= listed
    assert {"engine", "meter"} <= listed
    hooks = {name for name in vars(hookspecs) if name.startswith("pytest_llem_")}
    assert len(hooks) == 3
    assert hooks <= anchors(REFERENCE / "hooks.md")
