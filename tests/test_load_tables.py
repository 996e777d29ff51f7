"""The terminal's table of servers under load, the best load within the SLO, and what a search found."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pytest_llem.reporting.terminal.loads import load_lines, probe_lines
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from tests.conftest import WriteStudy
from tests.support import made_up
from tests.support.loads import SLO, load_point, load_record


def _table(points: Sequence[PointResult], width: int = 80) -> list[str]:
    made = points_table(points, Counter({one.config_hash: 3 for one in points}), width)
    lines = render(made.table, made.width)
    assert max(map(len, lines)) <= width
    return lines


def _closed(concurrency: int, attainment: float | None, cost: float, **more: Any) -> PointResult:
    load = {"concurrency": concurrency, "slo": SLO}
    return load_point(load, attainment, cost, speed=70.0 * concurrency, **more)


def test_table_of_loads_fits_80_columns() -> None:
    lines = _table([_closed(1, 1.0, 0.2), _closed(16, 0.995, 0.09), _closed(32, 0.4, 0.08)])
    heading = " ".join(" ".join(lines[:3]).split())
    for word in (
        "concurrency",
        "out",
        "tok/s",
        "J/good",
        "token",
        "TTFT",
        "p50",
        "p99",
        "TPOT",
        "SLO",
        "measured",
    ):
        assert word in heading
    assert lines[-2].split() == ["16", "3", "1,120", "±2.5%", "0.0900", "±2.5%", "112", "140", "5.00", "99.5", "%"]


def test_wide_table_of_loads_has_energy_per_output_token() -> None:
    points = [_closed(1, 1.0, 0.2), _closed(2, 1.0, 0.1)]
    assert "J/out" not in " ".join(_table(points)[:3])
    assert "J/out" in " ".join(_table(points, 140)[:3])


def test_table_without_slo_has_energy_per_output_token() -> None:
    points = [load_point({"rate": rate}, cost=1 / rate) for rate in (2.0, 4.0)]
    heading = " ".join(" ".join(_table(points)[:3]).split())
    assert "J/out" in heading
    assert "SLO" not in heading
    assert list(load_lines(points)) == []


def test_inter_token_latency_is_shown_if_slo_limits_it() -> None:
    slo = {"itl_ms": 20}
    points = [load_point({"concurrency": n, "slo": slo}, 1.0, 1 / n, itl_p99_ms=[9.0] * 3) for n in (1, 2)]
    heading = " ".join(" ".join(_table(points)[:3]).split())
    assert "ITL" in heading
    assert "TPOT" not in heading


def test_other_studies_keep_their_columns() -> None:
    plain = load_point({"concurrency": 1}, cost=1.0)
    plain.config = {"precision": "bf16"}
    heading = " ".join(" ".join(_table([plain])[:3]).split())
    assert "J/out token" in heading
    assert "p99" not in heading


def test_best_load_within_slo_is_named() -> None:
    points = [_closed(1, 1.0, 0.2), _closed(16, 0.995, 0.09), _closed(32, 0.4, 0.08)]
    (line,) = load_lines(points)
    assert line == "best within the SLO: concurrency 16: 0.0900 J/good token, 99.5 % within the SLO"
    assert len(line) <= 80


def test_each_server_configuration_has_its_best_load() -> None:
    points = [
        _closed(load, 1.0, cost / load, axes={"server.args.max_num_seqs": size, "precision": "bf16"})
        for size, cost in ((8, 1.0), (64, 2.0))
        for load in (2, 4)
    ]
    one, other = load_lines(points)
    assert one.startswith("max_num_seqs=8: best within the SLO: concurrency 4: 0.250 J/good token")
    assert other.startswith("max_num_seqs=64: best within the SLO: concurrency 4: 0.500 J/good token")


def test_tied_loads_are_named_with_the_best() -> None:
    (line,) = load_lines([_closed(16, 1.0, 0.1), _closed(32, 1.0, 0.101), _closed(64, 1.0, 0.5)])
    assert ": concurrency 16: 0.100 J/good token" in line
    assert line.endswith(" (tied with 32: the intervals overlap)")


def test_no_load_within_slo_is_said() -> None:
    (line,) = load_lines([_closed(1, 0.9, 0.2), _closed(2, 0.985, 0.1)])
    assert line == "no load is within the SLO; closest: concurrency 2: 98.5 % within the SLO"


def test_almost_all_requests_are_not_shown_as_all() -> None:
    (line,) = load_lines([_closed(1, 0.99996, 0.2)])
    assert line.endswith("99.996 % within the SLO")


def test_estimated_energy_of_best_load_is_labelled() -> None:
    one = _closed(1, 1.0, 0.2)
    one.metrics["energy_per_good_token_j"].method = "estimated"
    (line,) = load_lines([one])
    assert "0.200 J/good token (estimated)," in line


def test_largest_load_is_named_if_energy_is_unknown() -> None:
    points = [_closed(1, 1.0, 0.2), _closed(2, 1.0, 0.1)]
    for one in points:
        one.metrics["energy_per_good_token_j"] = Summary(mean=None, n=0, unit="J", reason="no meter")
    (line,) = load_lines(points)
    assert line == "largest load within the SLO: concurrency 2: 100 % within the SLO"


def test_largest_load_is_named_if_loads_ran_on_different_hosts() -> None:
    points = [_closed(1, 1.0, 0.1, testbed={"cpu": "X"}), _closed(2, 1.0, 0.2, testbed={"cpu": "Y"})]
    assert list(load_lines(points)) == ["largest load within the SLO: concurrency 2: 100 % within the SLO"]


def test_energy_that_no_gate_may_judge_is_not_the_best() -> None:
    one, other = _closed(1, 1.0, 0.2), _closed(2, 1.0, 0.1)
    other.metrics["energy_per_good_token_j"].not_judged = "2 requests failed"
    (line,) = load_lines([one, other])
    assert line.startswith("best within the SLO: concurrency 1: 0.200 J/good token")


@pytest.mark.parametrize(("found", "text"), [((10, 10), "10"), ((12, 10), "10 to 12")])
def test_search_shows_load_that_it_found(found: tuple[int, ...], text: str) -> None:
    point = load_point({"concurrency": "auto", "slo": SLO}, 1.0, 0.25, loads=[load_record(one) for one in found])
    (line,) = load_lines([point])
    assert line == f"largest load within the SLO: concurrency {text}: 0.250 J/good token"
    row = _table([point])[-1].split()
    assert row[:3] == ["auto", f"{sum(found) / 2:g}", "3"]


def test_probes_of_search_are_listed() -> None:
    record = load_record(8, [(1, 1.0), (16, 0.25), (8, 0.995)])
    point = load_point({"concurrency": "auto", "slo": SLO}, 1.0, 0.25, loads=[record])
    lines = list(probe_lines([point], 80))
    assert lines[1] == "search of load.concurrency=auto, cycle 1:"
    assert [line.split()[:2] for line in lines[-3:]] == [["1", "100"], ["16", "25"], ["8", "99.5"]]
    assert [" not within" in line for line in lines[-3:]] == [False, True, False]


def test_junit_has_figures_of_load(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"energy_per_good_token_j": 0.25, "goodput_rps": 12.5, "slo_attainment": None}
    made_up.experiments(monkeypatch, lambda job: figures)
    write_study(sweep={"noop.size": [1]}, execution={"n_cycles": 1})
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--junitxml=junit.xml")
    properties = {one.get("name"): one.get("value") for one in ET.parse("junit.xml").iter("property")}
    assert properties["llem_energy_per_good_token_j"] == "0.25"
    assert properties["llem_goodput_rps"] == "12.5"
    assert "llem_slo_attainment" not in properties, "it is not known"
