"""The table of points: readable at 80 columns with 50 points, and with ``llem table`` as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult, cli
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.results.verdicts import GateVerdict
from tests.conftest import ROOT
from tests.support.loads import SLO, load_point
from tests.support.study_results import point, study_result, summary

COST, SPEED = "energy_per_output_token_j", "output_tokens_per_second"

GOLDEN = ROOT / "tests" / "golden" / "1.0"

Table = Callable[..., str]


def _point(axes: Any, speed: Any, cost: Any, ttft: float = 20.0, method: str = "measured", **more: Any) -> Any:
    values = [speed * 0.99, speed, speed * 1.01]
    cost = summary(COST, [cost * 0.98, cost, cost * 1.02], method=method, boundary="gpu_board")
    hashed = f"{abs(hash(tuple(axes.items()))):016x}"[:16]
    metrics = {"seconds": [1.0, 1.1, 1.2], "ttft_p50_ms": [ttft] * 3, SPEED: values, COST: cost}
    return point(axes, config_hash=hashed, **metrics, **more)


def _lines(points: Any, width: Any, planned: int = 3, **options: Any) -> Any:
    made = points_table(points, Counter({one.config_hash: planned for one in points}), width, **options)
    lines = render(made.table, made.width)
    assert max(map(len, lines)) <= made.width
    return lines, made


@pytest.fixture
def fifty() -> list[Any]:
    grid = itertools.product(["bf16", "fp16"], [1, 8, 16, 32, 64], [64, 128, 256, 512, 1024])
    axes = ("precision", "pytorch.batch_size", "max_output_tokens")
    return [
        _point(dict(zip(axes, (precision, size, length), strict=True)), 100.0 * size, 5.0 / size + index / 100)
        for index, (precision, size, length) in enumerate(grid)
    ]


def test_50_points_take_one_line_each_at_80_columns(fifty: list[Any]) -> None:
    lines, _ = _lines(fifty, 80)
    rule = next(at for at, line in enumerate(lines) if set(line) <= {"─", " "})
    rows = lines[rule + 1 :]
    assert len(rows) == 50
    heading = " ".join(" ".join(lines[:rule]).split())
    for word in ("precision", "batch_size", "output_", "tokens", "n", "out tok/s", "J/out token", "measured"):
        assert word in heading
    assert re.match(r"[P~ ]  bf16 +1 +64 +3 +100 ±\S+ ", rows[0])


def test_wide_terminal_shows_more_columns(fifty: list[Any]) -> None:
    for one in fifty:
        one.metrics["itl_p50_ms"] = summary("itl_p50_ms", [5.0, 5.1])
        one.metrics["energy_j"] = summary("energy_j", [500.0, 510.0])
    narrow, _ = _lines(fifty, 80)
    wide, _ = _lines(fifty, 200)
    assert "J/pass" not in "".join(narrow)
    heading = " ".join(wide[:4])
    assert "ITL p50" in heading
    assert "J/pass" in heading
    assert heading.count("measured") == 2, "each energy says how it was obtained"
    assert len(wide) - len(narrow) in (-1, 0, 1)


def test_dumb_terminal_does_not_change_table_width(fifty: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for one in fifty:
        one.metrics["itl_p50_ms"] = summary("itl_p50_ms", [5.0, 5.1])
        one.metrics["energy_j"] = summary("energy_j", [500.0, 510.0])
    expected = {width: _lines(fifty, width)[0] for width in (60, 80, 200)}
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat every file as a terminal
    for width, lines in expected.items():
        assert _lines(fifty, width)[0] == lines
        assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [1, 20, 40, 50])
def test_figures_keep_all_digits_in_narrow_terminal(fifty: list[Any], width: int) -> None:
    lines, made = _lines(fifty, width)
    assert made.width <= 64
    text = "\n".join(lines)
    assert "…" not in text
    assert all(f" {speed} ±2.5%" in text for speed in ("100", "800", "1,600"))
    assert "precision=" in text


def test_long_axis_value_is_shortened() -> None:
    lines, _ = _lines([_point({"a": value * 3000}, 100.0, 1.0) for value in "xy"], 80)
    assert len(lines) < 20
    assert "…" in "".join(lines)


def test_table_fits_80_columns(fifty: list[Any]) -> None:
    assert _lines(fifty, 80)[1].width == 80


def test_ids_are_shown_whole_on_request(fifty: list[Any]) -> None:
    lines, _ = _lines(fifty, 200, ids=True)
    for one in fifty:
        assert any(f" {one.id} " in line for line in lines)


def test_ids_replace_axes_that_are_too_wide() -> None:
    points = [
        _point({f"engine.a_rather_long_option_{at}": f"a rather long value {at}{n}" for at in range(6)}, n, 1.0)
        for n in (1, 2)
    ]
    lines, _ = _lines(points, 80)
    assert " point" in "".join(lines[:4])
    folded = "".join(line[:40].strip() for line in lines)
    assert "engine.a_rather_long_option_5=a" in re.sub(r"\s", "", folded) or "option_5" in folded


def test_ids_are_broken_between_words_only() -> None:
    names = [f"engine.a_rather_long_option_{at}" for at in range(6)]
    lines, _ = _lines([_point(dict.fromkeys(names, f"value-{n}"), n, 1.0) for n in (1, 2)], 70)
    column = [line[3:40].partition("  ")[0].strip() for line in lines[3:]]
    assert len(column) > 10
    assert all(line[-1] in "_.=-" or line.endswith(("value-1", "value-2")) for line in column), column


def test_long_values_are_shortened_before_axes_are_left_out() -> None:
    folder = "/mnt/models/an-organisation/"
    points = [_point({"model": f"{folder}{name}", "n": 1}, 100.0, 1.0) for name in ("llama-8b", "qwen-7b")]
    lines, _ = _lines(points, 80)
    assert [line.split()[1] for line in lines[-2:]] == ["…/llama-8b", "…/qwen-7b"]


def test_axes_of_one_value_are_left_out() -> None:
    points = [_point({"precision": "bf16", "n": n}, 100.0 * n, 1.0) for n in (1, 2)]
    lines, _ = _lines(points, 80)
    assert "precision" not in "".join(lines)
    assert [line.split()[1] for line in lines[-2:]] == ["1", "2"]


def test_best_and_pareto_optimal_are_marked() -> None:
    points = [
        _point({"n": 1}, 100, 1.0, ttft=10.0),
        _point({"n": 2}, 200, 0.5, ttft=20.0),
        _point({"n": 3}, 300, 0.7, ttft=20.0),
        _point({"n": 4}, 250, 0.9, ttft=20.0),
    ]
    lines, made = _lines(points, 80)
    assert [line[0] for line in made.legend] == ["m", "*", "P", "~"]
    one, two, three, four = lines[-4:]
    assert [line[:1] for line in (one, two, three, four)] == [" ", "P", "P", " "]
    assert [line.count("*") for line in (one, two, three, four)] == [1, 1, 1, 0]
    assert re.search(r"10\.0 ±\S+\*", one)
    assert re.search(r"0\.500 ±\S+\*", two)
    assert re.search(r"300 ±\S+\*", three)


def test_energies_of_different_methods_are_not_compared() -> None:
    points = [
        _point({"n": 1}, 100, 1.0),
        _point({"n": 2}, 200, 1.5),
        _point({"n": 3}, 900, 1e-6, method="estimated"),
    ]
    lines, _ = _lines(points, 80)
    assert "energy" in lines[-6]
    assert "method" in lines[-5]
    assert [line.split()[-1] for line in lines[-3:]] == ["measured", "measured", "estimated"]
    assert [line[:1] for line in lines[-3:]] == ["P", "P", " "]


def test_worst_verdict_of_each_point_is_shown() -> None:
    points = [_point({"n": n}, 100 * n, 1.0) for n in (1, 2, 3)]
    verdict = {"gate": "regression", "id": "x", "metric": SPEED, "unit": "1/s"}
    for outcome, found in (("passed", "SAME"), ("failed", "REGRESSION"), ("passed", "INCONCLUSIVE")):
        points[0].verdicts.append(GateVerdict(**verdict, point="n=1", outcome=outcome, verdict=found))
    points[1].verdicts.append(GateVerdict(**verdict, point="n=2", outcome="passed", verdict="SAME"))
    lines, _ = _lines(points, 80)
    assert [line.split()[-1] for line in lines[-3:]] == ["REGRESSION", "SAME", "-"]


def test_single_point_has_no_marks() -> None:
    lines, made = _lines([_point({"n": 1}, 100, 1.0)], 80, planned=4)
    assert [line[0] for line in made.legend] == ["m"]
    assert "3 of 4" in lines[-1]
    assert "*" not in "".join(lines)


def test_missing_values_are_not_shown_as_numbers() -> None:
    points = [_point({"n": 1}, 100, 1.0), point({"n": 2}, config_hash="f" * 16)]
    lines, made = _lines(points, 80)
    assert not any(line.startswith("P ") for line in made.legend)
    assert lines[-1].split() == ["2", "0", "of", "3", *("-" * 4)]


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
    assert head.startswith("| size | n | out tok/s | J/out token measured |"), "no point has a TTFT"
    assert rule.startswith("| --: | --: | --: |")
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| 1", "1", "100", "0.500"],
        ["| 2", "1", "200", "0.250"],
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


def test_result_without_points_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study_result.json"
    file.write_text(study_result().model_dump_json())
    assert cli.main(["table", str(file), "--format", "csv"]) == 2
    assert capsys.readouterr() == ("", f"llem: {file}: holds no points\n")


def test_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {
        tmp_path: "holds no manifest.json, so no results of a study",
        tmp_path / "no": "no such file or folder",
    }
    for folder, fault in faults.items():
        assert cli.main(["table", str(folder)]) == 2
        assert capsys.readouterr() == ("", f"llem: {folder}: {fault}\n")
