"""summary.csv, experiments.csv and data frames: their columns, units and missing values."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from pytest_llem import StudyResult
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.csv_files import read_csv, to_csv
from pytest_llem.results.manifest_records import ErrorRecord, ManifestEntry
from pytest_llem.results.tabular import dataframe, experiment_table, point_table
from pytest_llem.results.verdicts import GateVerdict
from tests.conftest import NOOP_STUDY, ROOT, Results, RunPytest, WriteStudy
from tests.support.loads import SLO, load_point
from tests.support.study_results import point, study_result

COST, SPEED = "energy_per_output_token_j", "output_tokens_per_second"

#: Parts of names by the unit that they stand for.
UNIT_NAMES = {
    "J": r"_j$",
    "Wh": r"^wh_",
    "1/J": r"_per_joule$",
    "J·s": r"_js$",
    "W": r"_w$",
    "s": r"seconds$",
    "1/s": r"_per_second$|_rps$|_rate$",
    "requests": r"^(concurrency|batch)_mean$",
    "tokens": r"_tokens$",
    "ms": r"_ms$",
    "MB": r"_mb$",
    "°C": r"_c$",
    "FLOP": r"^flops$",
    "ratio": r"^(mfu|mbu|slo_attainment)$|_slowdown$|_rate$",
    "g": r"_g$",
}


@pytest.mark.parametrize("metric", CATALOGUE)
def test_every_column_has_its_unit(metric: str) -> None:
    unit = CATALOGUE[metric].unit
    assert unit in UNIT_NAMES, f"{unit} is a new unit: see 'How to add a metric' in CONTRIBUTING.md"
    assert re.search(UNIT_NAMES[unit], metric)


def _entry(one: Any, cycle: Any, status: str = "completed", **more: Any) -> Any:
    return ManifestEntry(
        experiment_id=f"{one.id}-cycle={cycle}",
        config_hash=one.config_hash,
        config_summary=one.id,
        cycle=cycle,
        status=status,
        **more,
    )


@pytest.fixture
def result() -> StudyResult:
    """Return the result of two points with two cycles, one with an option of the engine; one experiment failed."""
    first = point(
        {"precision": "bf16", "noop.seconds": 0.5},
        config_hash="a" * 16,
        output_tokens_per_second=[100.0, 110.0],
        energy_per_output_token_j=[0.5, 0.6],
        active_energy_j=[-0.25, 0.0],
    )
    second = point(
        {"precision": None, "order": ["a", "b"], "flag": True},
        config_hash="b" * 16,
        cycles=[2],
        output_tokens_per_second=[200.0],
        energy_per_output_token_j=[0.4],
    )
    verdict = {"id": "x", "metric": SPEED, "point": first.id, "unit": "1/s", "mean": 105.0, "minimum": 100.0}
    for gate, outcome, found in (
        ("budget", "passed", "WITHIN"),
        ("budget", "failed", "BEYOND"),
        ("regression", "passed", "SAME"),
    ):
        first.verdicts.append(GateVerdict(**verdict, gate=gate, outcome=outcome, verdict=found))
    error = ErrorRecord(kind="crash", type="SIGKILL", message='it was "killed", \n=1+1')
    times = {"started_at": "2026-11-25T10:00:00.000Z", "completed_at": "2026-11-25T10:00:09.500Z"}
    entries = [
        _entry(first, 1, **times),
        _entry(second, 1, "failed", error=error),
        _entry(second, 2),
        _entry(first, 2),
        _entry(first, 3, "deselected"),
    ]
    return study_result(first, second, experiments=entries)


def _rows(table: Any) -> Any:
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def test_point_table_has_a_row_for_each_point(result: StudyResult) -> None:
    first, second = _rows(point_table(result))
    assert (first["precision"], first["noop.seconds"], first["order"], first["flag"]) == ("bf16", "0.5", "", "")
    assert (second["precision"], second["noop.seconds"], second["flag"]) == ("null", "", "true")
    assert (first["cycles"], second["cycles"]) == ("2", "1")
    assert float(first[SPEED]) == 105
    assert float(first[f"{SPEED}_sd"]) == pytest.approx(math.sqrt(50))
    assert first[f"{SPEED}_ci95_low"] == first[f"{SPEED}_ci95_high"] == "", "of two values there is none"
    assert (first[f"{SPEED}_n"], second[f"{SPEED}_n"]) == ("2", "1")
    assert second[f"{SPEED}_sd"] == second[f"{SPEED}_ci95_low"] == "", "absent is empty"
    assert float(first["active_energy_j"]) == -0.125
    assert second["active_energy_j"] == second["ttft_p50_ms"] == "", "and not 0"
    assert (first[f"{COST}_method"], first[f"{COST}_boundary"]) == ("measured", "gpu_board")
    assert f"{SPEED}_method" not in first
    assert (first["pareto_optimal"], second["pareto_optimal"]) == ("", ""), "no interval decides"
    assert (first["verdict"], second["verdict"]) == ("BEYOND", "")


def test_experiment_table_has_a_row_for_each_experiment(result: StudyResult) -> None:
    rows = _rows(experiment_table(result))
    assert [(row["status"], row["cycle"]) for row in rows] == [
        *(("completed", "1"), ("failed", "1"), ("completed", "2"), ("completed", "2")),
    ]
    first, failed, other, last = rows
    assert [row[SPEED] for row in rows] == ["100.0", "", "200.0", "110.0"]
    assert [row[COST] for row in rows] == ["0.5", "", "0.4", "0.6"]
    assert first["wall_seconds"] == "9.5"
    assert failed["error"] == 'crash: it was "killed", \n=1+1', "quoted"
    assert (failed[f"{COST}_method"], other[f"{COST}_method"]) == ("", "measured")
    assert last["active_energy_j"] == "0.0", "which is not absent"
    assert {len(row) for row in rows} == {len(rows[0])}


def test_baseline_without_experiments_has_rows(result: StudyResult) -> None:
    rows = _rows(experiment_table(result.model_copy(update={"experiments": []})))
    assert [(row["point"], row["cycle"], row[SPEED]) for row in rows] == [
        (result.points[0].id, "1", "100.0"),
        (result.points[0].id, "2", "110.0"),
        (result.points[1].id, "2", "200.0"),
    ]


def test_axes_named_like_metrics_do_not_collide() -> None:
    one = point({"noop.seconds": 3, "n": 2}, seconds=[1.0])
    table = point_table(study_result(one))
    assert len(set(table.columns)) == len(table.columns)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["noop.seconds"], row["n"], row["seconds"]) == (3, 2, 1.0)


def test_data_frame_has_cells_and_units_of_the_table(result: StudyResult) -> None:
    tables = (
        (point_table(result), result.to_dataframe(per="point", all_columns=True)),
        (experiment_table(result), result.to_dataframe(per="experiment", all_columns=True)),
    )
    for table, frame in tables:
        assert list(frame.columns) == list(table.columns)
        assert len(frame) == len(table.rows)
        for place, row in enumerate(table.rows):
            for name, cell in zip(table.columns, row, strict=True):
                found = frame.iloc[place][name]
                assert pandas.isna(found) if cell is None else found == cell
        assert frame[SPEED].dtype == frame["ttft_p50_ms"].dtype == "float64"
        assert frame.attrs["units"][COST] == "J"
        assert frame.attrs["units"]["ttft_p50_ms"] == "ms"
    every = result.to_dataframe(all_columns=True)
    assert every.attrs["units"][f"{SPEED}_sd"] == "1/s"
    assert every["active_energy_j"].isna().tolist() == [False, True]


def test_data_frame_has_few_columns_by_default(result: StudyResult) -> None:
    points, experiments = result.to_dataframe(), result.to_dataframe("experiment")
    assert points.columns.tolist()[:6] == ["study", "point", "precision", "noop.seconds", "order", "flag"]
    assert {COST, f"{COST}_ci95_low", f"{COST}_ci95_high", f"{COST}_method", "verdict"} <= {*points.columns}
    assert f"{COST}_sd" not in points.columns
    assert len(points.columns) < 45
    assert experiments.columns.tolist()[:3] == ["study", "experiment", "point"]
    assert {"cycle", "status", SPEED} <= {*experiments.columns}
    assert len(experiments.columns) < 30
    assert "goodput_rps" not in points.columns


def test_short_selection_says_how_each_energy_was_obtained(result: StudyResult) -> None:
    for frame in (result.to_dataframe(), result.to_dataframe("experiment")):
        for name in ("energy_j", "mean_power_w", COST):
            assert {f"{name}_method", f"{name}_boundary", f"{name}_invalid"} <= {*frame.columns}


def test_requests_of_different_files_and_axes_with_units(tmp_path: Path) -> None:
    """An axis may be named as a time, and files of two versions may have different columns."""
    contents = {"a": "pass,e2e_ms,error\n1,2.5,\n", "b": "pass,request,e2e_ms\nwindow,1,3.5\n"}
    entries, points = [], []
    (tmp_path / "experiments").mkdir()
    for name, content in contents.items():
        (tmp_path / "experiments" / f"{name}-c1.requests.csv").write_text(content)
        axes = {"load.slo.ttft_ms": None if name == "a" else 500}
        points.append(point(axes, config_hash=name))
        entries.append(
            ManifestEntry(
                experiment_id=name,
                config_hash=name,
                config_summary=name,
                cycle=1,
                status="completed",
                result_file=f"experiments/{name}-c1.json",
            )
        )
    frame = dataframe(study_result(*points, experiments=entries), "request", directory=tmp_path)
    assert frame["load.slo.ttft_ms"].tolist() == ["null", 500]
    assert frame["pass"].tolist() == [1, "window"]
    assert frame["e2e_ms"].tolist() == [2.5, 3.5]
    assert frame["request"].tolist()[1] == 1


def test_data_frame_of_loads_has_metrics_of_loads() -> None:
    frame = study_result(load_point({"rate": 2.0, "slo": SLO}, 1.0, 0.5)).to_dataframe()
    assert frame["slo_attainment"].tolist() == [1.0]
    assert {"energy_per_good_token_j", "goodput_rps", "ttft_p99_ms", "tpot_p99_ms"} <= {*frame.columns}


def test_data_frame_of_requests_needs_a_results_directory(result: StudyResult) -> None:
    with pytest.raises(ValueError, match=r"^per 'request' reads files: use StudyResult.load\(DIRECTORY\)$"):
        result.to_dataframe("request")


def test_data_frame_of_an_empty_result() -> None:
    assert len(study_result().to_dataframe()) == 0
    assert len(study_result().to_dataframe("experiment")) == 0


def test_data_frame_of_an_unknown_kind_is_refused(result: StudyResult) -> None:
    with pytest.raises(ValueError, match=r"^per: 'cycle' is not 'point', 'experiment' or 'request'$"):
        result.to_dataframe("cycle")  # type: ignore[arg-type]


def test_missing_pandas_is_one_line_with_what_to_install(
    result: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'pytest-llem\[dataframe\]'$") as caught:
        result.to_dataframe()
    assert "\n" not in str(caught.value)


def test_result_of_an_older_version_has_rows() -> None:
    result = StudyResult.load(ROOT / "tests" / "golden" / "1.0")
    frame = result.to_dataframe()
    assert frame[SPEED].notna().any()
    assert len(result.to_dataframe("experiment")) == result.summary.total


def test_run_writes_summary_and_experiments_csv(
    run_pytest: RunPytest, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.fault": ["none", "raise"], "precision": ["bf16"]})
    run_pytest("-k", "not (fault=raise and cycle=2)")
    result = StudyResult.load(results.directory)
    for name, frame in (
        ("summary.csv", result.to_dataframe("point")),
        ("experiments.csv", result.to_dataframe("experiment")),
    ):
        with (results.directory / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["noop.fault"] for row in rows] == frame["noop.fault"].tolist()
        for row, found in zip(rows, frame[SPEED].tolist(), strict=True):
            assert (row[SPEED] == "") == math.isnan(found)
            assert not row[SPEED] or float(row[SPEED]) == found, "to the last digit"
    assert len(result.to_dataframe("experiment")) == 3
    requests = result.to_dataframe("request")
    assert {*requests["noop.fault"]} == {"none"}, "the other experiments have failed"
    assert requests.groupby("cycle").size().tolist() == [NOOP_STUDY["n"]] * 2
    assert requests["e2e_ms"].dtype == "float64"
    assert requests.attrs["units"]["e2e_ms"] == "ms"
    summary = result.to_dataframe().set_index("noop.fault")
    assert summary.loc["none", "output_tokens_per_second"] == result.points[0].metrics[SPEED].mean


def test_long_cells_and_line_ends_are_read_back() -> None:
    rows = [("a", "b"), ("one\rtwo\r\nthree", "x" * 140_000)]
    [row] = read_csv(io.StringIO(to_csv(rows), newline=""))
    assert tuple(row.values()) == rows[1]
