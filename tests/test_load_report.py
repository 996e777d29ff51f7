"""The report's plots of servers under load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.reporting.html import write_report
from pytest_llem.reporting.html.contents import read_latencies
from pytest_llem.reporting.html.loads import load_plots
from pytest_llem.reporting.html.point_plots import pareto_plot
from pytest_llem.results.points import PointResult
from tests.conftest import Results, RunPytest
from tests.support.load_studies import patient, write_load_study
from tests.support.loads import SLO, load_point, load_record
from tests.support.study_results import point, study_result


def _points() -> list[PointResult]:
    return [
        load_point(
            {"concurrency": load, "slo": SLO},
            attainment,
            1 / load,
            speed=60.0 * load,
            requests_per_second=[load] * 3,
        )
        for load, attainment in ((1, 1.0), (8, 0.995), (32, 0.5))
    ]


def test_loads_are_plotted_with_their_slo() -> None:
    energy, latency, goodput = load_plots(_points())
    (line,) = energy.layers["0"]["data"]
    assert list(line["x"]) == [1, 8, 32]
    assert list(line["y"]) == [1, 0.125, 0.03125]
    assert list(line["marker"]["symbol"]) == ["circle", "circle", "circle-open"], "the last is not within the SLO"
    assert energy.layers["0"]["layout"]["yaxis"]["title"]["text"].endswith("(J), measured")
    ttft = latency.layers["0"]
    assert [trace["name"] for trace in ttft["data"]] == ["p50", "p90", "p99"]
    assert [shape["y1"] for shape in ttft["layout"]["shapes"]] == [200, 200], "region and edge"
    within, every = goodput.figure["data"]
    assert list(within["y"])[-1] < list(every["y"])[-1] == 32


def test_limit_of_one_latency_is_not_drawn_for_another() -> None:
    latency = load_plots(_points())[1]
    names = latency.selects[0].options
    assert [names[0], names[1]] == ["Time to first token", "Time per output token (TPOT)"]
    assert latency.layers["1"]["layout"]["shapes"][0]["y1"] == 50


def test_each_server_configuration_has_a_line() -> None:
    points = [
        load_point({"rate": rate}, cost=size / rate, axes={"server.args.max_num_seqs": size})
        for size in (8, 64)
        for rate in (1.0, 2.0)
    ]
    energy, *_ = load_plots(points)
    assert [trace["name"] for trace in energy.layers["0"]["data"]] == ["max_num_seqs=8", "max_num_seqs=64"]
    assert energy.title == "Energy per token against rate"


def test_search_is_plotted_by_its_probes() -> None:
    record = load_record(8, [(1, 1.0), (16, 0.25), (8, 0.995)])
    (plot,) = load_plots([load_point({"concurrency": "auto", "slo": SLO}, 1.0, 0.25, loads=[record])])
    (trace,) = plot.figure["data"]
    assert list(zip(trace["x"], trace["text"], trace["marker"]["symbol"], strict=True)) == [
        (1, "1", "circle"),
        (8, "3", "circle"),
        (16, "2", "circle-open"),
    ]
    assert list(plot.layers["0"]["data"][0]["y"]) == [100, 99.5, 25]


def test_other_studies_have_no_plots_of_loads() -> None:
    assert load_plots([point({"n": n}, energy_per_output_token_j=[1.0]) for n in (1, 2)]) == []


def test_pareto_plot_labels_points_by_their_load() -> None:
    plot = pareto_plot(_points())
    assert plot is not None
    texts = [text for trace in plot.figure["data"] for text in trace.get("text") or ()]
    assert sorted(texts) == ["1", "32", "8"]


def test_pareto_plot_tells_servers_of_the_same_load_apart() -> None:
    points = [load_point({"concurrency": load}, axes={"server": name}) for load in (1, 4) for name in ("a", "b")]
    plot = pareto_plot(points)
    assert plot is not None
    texts = [text for trace in plot.figure["data"] for text in trace.get("text") or ()]
    assert sorted(texts) == ["1 · a", "1 · b", "4 · a", "4 · b"]


def test_report_names_best_load_within_slo(tmp_path: Path) -> None:
    write_report(tmp_path, tmp_path / "page.html", study_result(*_points()))
    page = (tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert "<dt>Best within the SLO</dt><dd><strong>concurrency 8</strong>" in page
    assert "0.125 J/good token, 99.5 % within the SLO" in page
    assert json.dumps("Energy per token within the SLO (J), measured")[1:-1] in page


def test_latencies_after_a_very_long_error_are_read() -> None:
    text = f"pass,output_tokens,ttft_ms,error\nwindow,9,10,\nwindow,9,,{'x' * 140_000}\nwindow,9,20,\n"
    assert read_latencies(text) == {"ttft_ms": [10.0, 20.0]}


def test_latencies_are_of_answered_requests_of_the_window() -> None:
    rows = (
        *("ramp,9,900,", "window,9,10,", "window,,20,", "drain,9,800,", "drift,9,700,"),
        *("window,9,600,status 500", "window,0,500,"),
    )
    text = "\n".join(("pass,output_tokens,ttft_ms,error", *rows))
    assert read_latencies(text) == {"ttft_ms": [10.0, 20.0]}


@pytest.mark.slow
def test_search_on_a_real_server_is_shown_everywhere(
    pytester: pytest.Pytester, run_pytest: RunPytest, results: Results
) -> None:
    slo = {"tpot_ms": 14}
    write_load_study(
        pytester.path,
        "--step-ms=4+2",
        load={"concurrency": "auto", "slo": slo, "search": {"high": 16}},
        execution={"n_cycles": 1},
    )
    run = patient(run_pytest, pytester.path)("-v", "--llem-html=page.html")
    run.assert_outcomes(passed=1)
    loads = StudyResult.load(results.directory).points[0].loads
    (found,) = (one.concurrency for one in loads)
    run.stdout.re_match_lines(
        [rf"largest load within the SLO: concurrency {found}: \S+ J/good token \(estimated\)"]
    )
    run.stdout.fnmatch_lines(["search of *, cycle 1:"])
    page = (pytester.path / "page.html").read_text()
    assert f"<strong>concurrency {found}</strong>" in page
    assert '<figure class="plot" id="figure-probes"' in page
    frame = StudyResult.load(results.directory).to_dataframe("request")
    assert {"ramp", "window"} <= {*frame["pass"]}
