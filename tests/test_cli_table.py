"""``llem table``: the points of a study as a table, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem import StudyResult, cli
from tests.conftest import ROOT
from tests.support.loads import SLO, load_point
from tests.support.study_results import point, study_result

GOLDEN = ROOT / "tests" / "golden" / "1.0"

Table = Callable[..., str]


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Table:
    """Print a result in a format and return the output."""

    def run(result: StudyResult, form: str) -> str:
        file = tmp_path / "study_result.json"
        file.write_text(result.model_dump_json())
        assert cli.main(["table", str(file), "--format", form]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def result() -> StudyResult:
    return study_result(
        *(
            point(
                {"precision": "bf16", "noop.size": size},
                config_hash=f"{size:016}",
                output_tokens_per_second=[100.0 * size],
                energy_per_output_token_j=[0.5 / size],
                seconds=[1.0],
            )
            for size in (1, 2)
        )
    )


def test_markdown_has_axes_that_vary_as_columns(table: Table, result: StudyResult) -> None:
    head, rule, *rows = table(result, "markdown").splitlines()
    assert head.startswith("| size | n | out tok/s | TTFT p50 ms | J/out token measured |")
    assert rule.startswith("| --: | --: | --: |")
    assert [row.split(" | ")[:5] for row in rows] == [
        ["| 1", "1", "100", "-", "0.500"],
        ["| 2", "1", "200", "-", "0.250"],
    ]


def test_csv_has_main_metrics(table: Table, result: StudyResult) -> None:
    rows = list(csv.DictReader(io.StringIO(table(result, "csv"))))
    assert [row["noop.size"] for row in rows] == ["1", "2"]
    assert [row["energy_per_output_token_j"] for row in rows] == ["0.5", "0.25"]
    assert rows[0]["ttft_p50_ms"] == "", "absent is empty"


def test_table_and_markdown_name_best_load(table: Table) -> None:
    result = study_result(load_point({"concurrency": 4, "slo": SLO}, 1.0, 0.5))
    for form in ("table", "markdown"):
        assert "best within the SLO: concurrency 4: 0.500 J/good token" in table(result, form)


def test_results_directory_has_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", str(GOLDEN)]) == 0
    assert "0 of 2" in capsys.readouterr().out


def test_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {
        tmp_path: "holds no manifest.json, so no results of a study",
        tmp_path / "no": "no such file or folder",
    }
    for folder, fault in faults.items():
        assert cli.main(["table", str(folder)]) == 2
        assert capsys.readouterr() == ("", f"llem: {folder}: {fault}\n")
