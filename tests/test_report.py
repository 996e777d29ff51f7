"""Test the HTML report: when and where it is written, its contents, and the errors if it cannot be written."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem import StudyResult, cli, registry
from pytest_llem.recording.recorder import page_files
from pytest_llem.reporting.html import write_report
from pytest_llem.reporting.html.contents import percentiles, read_latencies, read_power
from pytest_llem.reporting.html.experiment_plots import _deviation, power_plot
from pytest_llem.reporting.html.formatting import details, name_of, neutral, shown, title_of
from pytest_llem.reporting.html.labels import axes_data, labels_of
from pytest_llem.reporting.html.plots import ByAxis, range_of
from pytest_llem.reporting.html.point_plots import pareto_plot, sweep_plot
from pytest_llem.reporting.html.rows import facts, groups
from pytest_llem.reporting.html.template import as_json
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.reporting.text import pieces, short_texts, wrapped
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.verdicts import GateVerdict
from tests.conftest import ROOT, Results, WriteStudy
from tests.support.study_results import point, study_result, summary

GOLDEN = ROOT / "tests" / "golden" / "1.0"
SPEED, COST = "output_tokens_per_second", "energy_per_output_token_j"
QUICK = {"sweep": {"noop.size": [1, 2]}, "execution": {"n_cycles": 1}}
ONE_EXPERIMENT = {"sweep": {"noop.size": [1]}, "execution": {"n_cycles": 1}}


class _Text(HTMLParser):
    """The text, tooltips and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self._silent, self._joins = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent = tag if tag in ("script", "style") else ""
        self._joins = tag == "wbr"
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        self.titles += [value for name, value in attrs if name == "title" and value]

    def handle_endtag(self, tag: str) -> None:
        self._silent = ""

    def handle_data(self, data: str) -> None:
        if self._joins:
            self.parts[-1] += data
        elif not self._silent:
            self.parts.append(data)
        self._joins = False

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def page_of(file: Path) -> _Text:
    return _Text(file.read_text())


def only(pattern: str, text: str) -> str:
    """Return the group of a pattern's only match."""
    (found,) = re.findall(pattern, text, re.S)
    assert isinstance(found, str)
    return found


def plots_of(file: Path) -> dict[str, Any]:
    """Return the data of the plots on the page."""
    plots = json.loads(only(r'<script type="application/json" id="llem-plots">(.*?)</script>', file.read_text()))
    assert isinstance(plots["plots"], dict)
    return plots["plots"]


# ---- when and where the report is written ----


def test_report_path_is_relative_to_the_invocation_directory(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(**QUICK)
    (pytester.path / "below").mkdir()
    monkeypatch.chdir(pytester.path / "below")
    arguments = ("../study.yaml", "-p", "llem", "--llem-html", "out/page.html", "--rootdir", "..")
    run = pytester.runpytest_inprocess(*arguments)
    run.assert_outcomes(passed=2)
    run.stdout.fnmatch_lines(["results: ../results/noop_*", "report: out/page.html"])
    page = page_of(pytester.path / "below" / "out" / "page.html")
    assert "2 of 2" in page.text
    plots = plots_of(pytester.path / "below" / "out" / "page.html")
    assert "J per output token (estimated)" in json.dumps(plots["pareto"])
    assert "Energy is estimated, not measured." in page.text
    assert "No power was sampled" in page.text
    assert all(one.startswith(("#", "data:")) for one in page.addresses)


@pytest.mark.slow
def test_xdist_controller_writes_report_with_failures(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(
        sweep={"precision": ["bf16"]},
        experiments=[{"noop": {"fault": "raise"}}],
        execution={"n_cycles": 1},
        budgets={"seconds": 1e-9},
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-n", "2", "--llem-html", "page.html")
    assert run.ret == 1
    run.stdout.fnmatch_lines(["report: page.html"])
    page = page_of(pytester.path / "page.html")
    for text in ("1 of 2", "1 failed", "ValueError", "the engine says no", "BEYOND", "NOT JUDGED"):
        assert text in page.text


@pytest.mark.slow
def test_interrupted_run_has_a_report(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**QUICK)
    pytester.makeconftest("def pytest_llem_experiment_finished(result): raise KeyboardInterrupt")
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-html", "page.html")
    assert run.ret == pytest.ExitCode.INTERRUPTED
    run.stdout.fnmatch_lines(["report: page.html"])
    assert "This run is interrupted." in page_of(pytester.path / "page.html").text


def test_each_of_several_studies_has_its_own_report(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    for name in ("one", "two"):
        write_study(f"{name}.yaml", name=name, **ONE_EXPERIMENT)
    run = pytester.runpytest_inprocess("one.yaml", "two.yaml", "-p", "llem", "--llem-html", "page.html")
    run.stdout.fnmatch_lines(["report: page-one.html", "report: page-two.html"])
    assert not (pytester.path / "page.html").exists()
    assert "<h1>two</h1>" in (pytester.path / "page-two.html").read_text()


def test_reports_of_studies_with_the_same_name_are_numbered() -> None:
    file = Path("a/page.html")
    assert page_files(file, ["x"]) == [file]
    for names, expected in ((["x", "y", "x"], ["x", "y", "x-2"]), (["x", "x-2", "x"], ["x", "x-2", "x-3"])):
        assert page_files(file, names) == [Path(f"a/page-{name}.html") for name in expected]


def test_collect_only_writes_no_report(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**QUICK)
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", "page.html", "--collect-only")
    assert not (pytester.path / "page.html").exists()


@pytest.mark.slow
def test_plotly_and_jinja_are_not_imported_without_report(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study(**ONE_EXPERIMENT)
    pytester.makeconftest(
        """
        import sys

        def pytest_unconfigure():
            modules = ("plotly", "jinja2", "pytest_llem.reporting.html")
            loaded = [name for name in sys.modules if name.startswith(modules)]
            assert "pytest_llem.recording.recorder" in sys.modules and not loaded, loaded
        """
    )
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    assert run.ret == 0
    assert run.stderr.str() == ""


# ---- when the report cannot be written ----


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "--llem-html: must not be empty"),
        ("folder", "--llem-html: must be a file (got '*/folder')"),
        ("study.yaml/page.html", "--llem-html: '*/study.yaml' is not a directory"),
        ("x" * 300, "--llem-html: *File name too long*"),
        ("pipe", "--llem-html: must be a file (got '*/pipe')"),
        ("study.yaml", "--llem-html: exists with other content and is not overwritten (got '*/study.yaml')"),
    ],
)
def test_impossible_report_file_is_a_usage_error(
    pytester: pytest.Pytester, write_study: WriteStudy, file: str, message: str
) -> None:
    write_study(**QUICK)
    (pytester.path / "folder").mkdir()
    os.mkfifo(pytester.path / "pipe")
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", file)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert not (pytester.path / "results").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_report_folder_is_a_usage_error(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**QUICK)
    (pytester.path / "folder").mkdir(mode=0o555)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", "folder/page.html")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["ERROR: --llem-html: '*/folder' cannot be written to"])


def test_missing_report_extra_is_a_usage_error(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(**QUICK)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", "page.html")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    message = "jinja2 and plotly are not installed: pip install 'pytest-llem[[]report[]]'"
    run.stderr.fnmatch_lines([f"ERROR: --llem-html: {message}"])
    assert not (pytester.path / "results").exists()


def test_results_are_kept_if_report_becomes_unwritable(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(**ONE_EXPERIMENT)
    pytester.makeconftest(
        """
        import pathlib

        def pytest_llem_experiment_finished(result):
            pathlib.Path("page.html").mkdir(exist_ok=True)
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", "page.html")
    assert run.ret == 1
    run.stdout.fnmatch_lines(["1 of 1 experiment completed", "noop: --llem-html: *must be a file (got*"])
    run.stdout.no_fnmatch_line("report: *")
    assert results.study_result["summary"]["completed"] == 1


def test_results_are_kept_if_report_raises_unexpected_error(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    write_study(**ONE_EXPERIMENT)
    monkeypatch.setattr("pytest_llem.reporting.html.write_report", broken)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-html", "page.html")
    assert run.ret == 1
    run.stdout.fnmatch_lines(["noop: --llem-html: */page.html: ZeroDivisionError: a mistake"])
    assert results.study_result["summary"]["completed"] == 1


# ---- llem report ----


def test_llem_report_writes_to_results_directory_or_given_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "golden"
    shutil.copytree(GOLDEN, directory)
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr() == (f"{directory / 'report.html'}\n", "")
    assert cli.main(["report", str(directory), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (directory / "report.html").read_text()


def test_result_of_an_earlier_version_has_a_report(tmp_path: Path) -> None:
    write_report(GOLDEN, tmp_path / "page.html")
    page, result = page_of(tmp_path / "page.html"), StudyResult.load(GOLDEN)
    assert result.name in page.text
    assert all(one.id in page.text for one in result.points)
    assert '<div class="card estimated"><dt>Energy</dt>' in (tmp_path / "page.html").read_text()
    assert page.text.count(" 0 of 2 ") == 1, "only the point that failed has no cycles"


def test_table_of_one_experiment_is_named_in_the_singular(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "docs" / "example", tmp_path / "run")
    result = json.loads((folder / "study_result.json").read_text())
    result["experiments"] = result["experiments"][:1]
    (folder / "study_result.json").write_text(json.dumps(result))
    write_report(folder, tmp_path / "page.html")
    assert "<caption>1 experiment</caption>" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_unfinished_run_has_a_report(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**QUICK)
    pytester.makeconftest(
        """
        import pathlib, subprocess, sys

        def pytest_llem_experiment_finished(result):
            (directory,) = pathlib.Path("results").glob("noop_*")
            command = [sys.executable, "-m", "pytest_llem.cli", "report", str(directory), "-o", "page.html"]
            if not pathlib.Path("page.html").exists():
                subprocess.run(command, check=True)
        """
    )
    pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=2)
    page = page_of(pytester.path / "page.html")
    assert "This run is running. It is still running or was killed" in page.text
    assert "1 of 2" in page.text
    assert "1 not run" in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "given: no such file or folder"),
        (lambda path: path.write_text("x"), "given: is not a folder"),
        (lambda path: path.mkdir(), "holds no manifest.json, so no results of a study"),
        (lambda path: shutil.copytree(GOLDEN, path) and (path / "report.html").mkdir(), "must be a file"),
        (
            lambda path: shutil.copytree(GOLDEN, path) and (path / "report.html").write_text("mine"),
            "exists with other content and is not overwritten",
        ),
    ],
)
def test_llem_report_prints_one_line_on_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "given")
    assert cli.main(["report", str(tmp_path / "given")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llem: ")
    assert message in err
    assert err.count("\n") == 1


def test_llem_report_names_missing_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "plotly" else object())
    assert cli.main(["report", str(GOLDEN)]) == 2
    assert capsys.readouterr().err == "llem: plotly is not installed: pip install 'pytest-llem[report]'\n"


def test_llem_report_imports_neither_pytest_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pytest_llem.cli import main; assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'pytest', 'pandas'} & set(sys.modules)"
    )
    arguments = ["report", str(GOLDEN), "-o", str(tmp_path / "page.html")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


# ---- contents ----


def _written(tmp_path: Path, *points: PointResult, **fields: Any) -> Path:
    """Return the report of a made-up result whose directory has no other files."""
    result = study_result(*points, **fields)
    write_report(tmp_path, tmp_path / "page.html", result)
    return tmp_path / "page.html"


def test_missing_value_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    absent = Summary(mean=None, n=0, unit="J", reason="no meter <here>")
    file = _written(
        tmp_path,
        point({"size": 1}, **{SPEED: [10.0, 11.0, 12.0], COST: absent}),
        point({"size": 2}, **{SPEED: [0.0] * 3, COST: absent}),
    )
    page = page_of(file)
    assert "no value: no meter <here>" in page.titles
    assert "– (no value: no meter <here>)" in page.text
    assert "No point has both tokens per second and energy per output token." in page.text
    assert "1 metric without a value, and why" in page.text
    assert "Energy per output token (J) no meter <here>" in page.text
    assert "pareto" not in plots_of(file)
    assert "0.00 ±" not in page.text
    assert "11.0 ±" in page.text


def test_empty_result_has_a_report(tmp_path: Path) -> None:
    file = _written(tmp_path)
    assert '<div class="card "><dt>Experiments</dt>' in file.read_text()
    page = page_of(file)
    for text in (
        "0 of 0",
        "No experiment has completed.",
        "The results do not contain the study file.",
        "No axis has two values",
    ):
        assert text in page.text


def test_link_to_a_report_is_kept_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("report.html")
    write_report(tmp_path / "run", tmp_path / "link.html", study_result())
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a file"):
        write_report(tmp_path / "run", tmp_path / "pipe", study_result())


def test_invalid_csv_and_study_files_are_ignored(tmp_path: Path) -> None:
    directory = tmp_path / "golden"
    shutil.copytree(GOLDEN, directory)
    result = StudyResult.load(directory)
    file = next(one.result_file for one in result.experiments if one.result_file)
    stem = directory / file.removesuffix(".json")
    stem.with_name(f"{stem.name}.requests.csv").write_bytes(b"\xff\0,x\n1,2\n")
    stem.with_name(f"{stem.name}.power.csv").write_text("seconds,device,power_w\n,,\nnan,a,1\n0.5,a,inf\nx\n")
    (directory / "study.yaml").write_bytes(b"\xff\xfe")
    write_report(directory, tmp_path / "page.html")
    assert "power" not in plots_of(tmp_path / "page.html")


def test_report_counts_points_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_llem.reporting.html import contents

    monkeypatch.setattr(contents, "MAX_POINTS", 2)
    points = [
        point({"size": n}, config_hash=str(n), **{SPEED: values})
        for n, values in ((1, []), (2, [1.0]), (3, [2.0]))
    ]
    points[0].cycles = []
    entries = [
        {"experiment_id": n, "config_hash": n, "config_summary": "", "cycle": 1, "status": status}
        for n, status in (("1", "pending"), ("2", "completed"), ("3", "completed"))
    ]
    page = page_of(_written(tmp_path, *points, experiments=entries))
    assert "1 more point is in study_result.json, but not on this page." in page.text
    assert "size=3" in page.text, "those with results come first"


def test_power_is_drawn_for_as_many_cycles_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_llem.reporting.html import contents

    example = ROOT / "docs" / "example"  # 4 points of 3 cycles
    monkeypatch.setattr(contents, "MAX_SAMPLES", 4 * 2 * contents.MIN_SAMPLES)
    found = contents.read_contents(example, StudyResult.load(example))
    assert [[one.cycle for one in cycles] for cycles in found.power.values()] == [[1, 2]] * 4
    drawn = [samples for cycles in found.power.values() for one in cycles for samples in one.samples.values()]
    assert sum(map(len, drawn)) <= contents.MAX_SAMPLES
    plot = power_plot(found)
    assert plot is not None
    assert plot.caption.endswith("Left out to keep the page small: the power of 4 later cycles.")


def test_content_security_policy_allows_only_own_scripts(tmp_path: Path) -> None:
    html = _written(tmp_path, point({"size": 1}, **{SPEED: [1.0], COST: [2.0]})).read_text()
    policy = only(r'http-equiv="Content-Security-Policy" content="(.*?)"', html).replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(scripts) == policy.count("sha256-") == 2
    assert not re.search(r"<[^>]* on\w+=", html.partition("<script")[0])


def test_plot_data_cannot_end_its_script_element() -> None:
    text = as_json({"</script><!--": "a&b\u2028\u2029<"})
    assert not {*"<>&\u2028\u2029"} & {*text}
    assert json.loads(text) == {"</script><!--": "a&b\u2028\u2029<"}
    with pytest.raises(ValueError, match="JSON"):
        as_json(float("nan"))


# ---- plots ----


def test_pareto_plot_marks_optimal_points_and_estimates() -> None:
    def at(speed: float, cost: float | None, **how: Any) -> PointResult:
        given = {} if cost is None else {COST: summary(COST, [cost] * 3, **how)}
        return point({"size": speed}, **{SPEED: [speed] * 3, **given})

    estimated = {"method": "estimated", "boundary": "cpu_package"}
    measured = [at(10.0, 5.0), at(20.0, 5.0), at(30.0, 7.0), at(25.0, 8.0), at(40.0, None)]
    plot = pareto_plot([*measured, at(1.0, 0.001, **estimated), at(2.0, 0.001, **estimated)])
    assert plot
    named = {trace["name"]: trace for trace in plot.figure["data"] if "name" in trace}
    assert {name: trace["x"] for name, trace in named.items()} == {
        "Pareto-optimal, measured (gpu_board)": [20.0, 30.0],
        "other points, measured (gpu_board)": [10.0, 25.0],
        "Pareto-optimal, estimated (cpu_package)": [2.0],
        "other points, estimated (cpu_package)": [1.0],
    }
    symbols = {trace["marker"]["symbol"] for name, trace in named.items() if "estimated" in name}
    assert symbols == {"diamond-open"}
    assert "Energies of different methods or boundaries are not compared with each other." in plot.caption
    assert "hollow marks and triangles are not measured" in plot.caption
    assert plot.figure["layout"]["yaxis"]["title"]["text"] == "J per output token (method: see legend)"
    alone = pareto_plot([point({"a": 1}, **{SPEED: [10.0], COST: [5.0]})])
    assert alone
    assert "Pareto" not in alone.caption
    assert "intervals" not in alone.caption  # one cycle has no interval
    repeated = pareto_plot([point({"a": 1}, **{SPEED: [10.0, 11.0, 12.0], COST: [5.0, 5.1, 5.2]})])
    assert repeated
    assert "Bars are 95 % intervals of the mean." in repeated.caption
    assert alone.figure["layout"]["yaxis"]["title"]["text"] == "J per output token (measured)"


def test_best_point_of_each_energy_method_is_named(tmp_path: Path) -> None:
    points = [point({"a": n}, **{COST: [2.0 - n] * 3}) for n in range(2)]
    for n in range(2):
        points.append(point({"a": 2 + n}, **{COST: summary(COST, [0.2 - n / 10] * 3, method="estimated")}))
    text = page_of(_written(tmp_path, *points)).text
    assert "Least energy per output token 1.00 J ±0.0%, n = 3: #2 a=1, measured" in text
    assert "Least energy per output token 0.100 J ±0.0%, n = 3: #4 a=3, estimated" in text


def test_best_point_of_each_host_is_named(tmp_path: Path) -> None:
    points = [
        point({"a": 2 * n + faster}, testbed={"cpu": host}, **{SPEED: [speed + faster] * 3})
        for n, (host, speed) in enumerate({"Xeon": 10.0, "EPYC": 1000.0}.items())
        for faster in (0, 1)
    ]
    text = page_of(_written(tmp_path, *points)).text
    assert "Most tokens per second 11.0 tokens/s ±0.0%, n = 3: #2 a=1, on Xeon" in text
    assert "Most tokens per second 1,001 tokens/s ±0.0%, n = 3: #4 a=3, on EPYC" in text


def test_almost_equal_tokens_are_not_shown_as_equal(tmp_path: Path) -> None:
    agreement = {"point": "b", "reference": "a", "share": 0.99996, "requests": 1, "tokens": 25_000}
    file = _written(tmp_path, point({"a": 1}), token_agreement=[agreement])
    assert "Tokens before the first difference 99.996 % of 25,000 greedy tokens: b and a" in page_of(file).text


def test_card_of_a_single_point_has_no_invalid_figure(tmp_path: Path) -> None:
    invalid = summary(COST, [2.0] * 3, invalid="counter_disagrees")
    file = _written(tmp_path, point({"a": 1}, **{SPEED: [1.0], COST: invalid}))
    assert "<dt>Output tokens per second</dt>" in file.read_text()
    assert "<dt>Energy per output token</dt>" not in file.read_text()


@pytest.mark.parametrize(
    ("outcomes", "card", "tone"),
    [
        (("skipped", "skipped"), "none decided of 2 gates, 2 skipped", ""),
        (("passed", "skipped"), "none failed of 2 gates, 1 skipped", ""),
        (("passed", "passed"), "none failed of 2 gates", "good"),
        (("failed", "skipped"), "1 failed of 2 gates, 1 skipped", "bad"),
    ],
)
def test_card_of_gates_is_good_only_if_all_are_decided(
    tmp_path: Path, outcomes: tuple[Any, ...], card: str, tone: str
) -> None:
    verdicts = [
        GateVerdict(gate="budget", id="x", metric=COST, point="p", verdict="NOT JUDGED", outcome=one, unit="J")
        for one in outcomes
    ]
    file = _written(tmp_path, point({"a": 1}, verdicts=verdicts))
    assert f"Gates {card} " in page_of(file).text
    assert f'<div class="card {tone}"><dt>Gates</dt>' in file.read_text()


def test_subtitle_counts_models_and_planned_cycles(tmp_path: Path) -> None:
    points = [point({"model": f"m{n}"}, config={"model": f"m{n}"}, **{SPEED: [1.0]}) for n in range(5)]
    assert "model, 1 cycle each, of m0, m1, m2, m3 and 1 more model." in page_of(_written(tmp_path, *points)).text
    planned = _written(tmp_path, *points, status="interrupted", measurement_protocol={"n_cycles": 3})
    assert "model, 3 planned cycles each, of m0" in page_of(planned).text


def test_subtitle_counts_selected_points(tmp_path: Path) -> None:
    selected, other = (point({"a": n}, config_hash=f"{n}", **{SPEED: [1.0] * n}) for n in (1, 0))
    entries = [
        {"experiment_id": one.id, "config_hash": one.config_hash, "config_summary": one.id, "cycle": 1}
        | {"status": "completed" if one.cycles else "deselected"}
        for one in (selected, other)
    ]
    file = _written(tmp_path, selected, other, experiments=entries)
    assert "throughput of inference: 1 point, 1 cycle each." in page_of(file).text


def test_sweep_plot_joins_points_that_differ_only_in_the_axis() -> None:
    points = [
        point({"precision": precision, "noop.size": size}, **{SPEED: [size * 10.0]})
        for precision in ("bf16", "<b>fp32</b>")
        for size in (16, 2)
    ]
    plot = sweep_plot(points)
    assert plot
    assert [select.options for select in plot.selects] == [
        ["precision", "size"],
        ["Output tokens per second (1/s)"],
    ]
    layer, values = plot.layers["1"], plot.layers["1/0"]
    assert layer["layout"]["xaxis"]["ticktext"] == ["2", "16"], "numbers in order"
    assert [trace["name"] for trace in layer["data"]] == ["precision=bf16", "precision=&lt;b&gt;fp32&lt;/b&gt;"]
    assert [trace["y"] for trace in values["data"]] == [[20.0, 160.0]] * 2
    assert plot.layers["0"]["layout"]["xaxis"]["ticktext"] == ["bf16", "&lt;b&gt;fp32&lt;/b&gt;"]
    assert sweep_plot(points[:1]) is None


def test_sweep_plot_starts_with_colours_and_panels_of_the_other_axes() -> None:
    grid = itertools.product((1, 2, 4, 8, 16), ("a", "b", "c"), ("x", "y"), range(9))
    plot = sweep_plot(
        [point(dict(zip("bklm", values, strict=True)), **{SPEED: [1.0]}) for values in grid if values[3] < 2]
    )
    assert plot
    assert plot.by_axis == ByAxis("line", color="k", panel="l")
    assert plot.selects[0].options[plot.selects[0].first] == "b"
    assert [len(trace["meta"]) for trace in plot.layers["0"]["data"]] == [5] * 12


def test_axes_that_do_not_vary_are_left_out_of_labels() -> None:
    points = [point({"model": "m", "backend": one, "n": 4}, **{SPEED: [1.0]}) for one in ("pytorch", "vllm")]
    assert labels_of(points) == ["#1 backend=pytorch", "#2 backend=vllm"]
    assert labels_of(points[:1]) == ["#1 model=m-backend=pytorch-n=4"]
    assert axes_data(points) == [
        {"name": "backend", "values": ["pytorch", "vllm"], "isNumber": False, "of": [0, 1]}
    ]


def test_long_values_of_an_axis_are_shortened_and_still_differ() -> None:
    folder = "/mnt/models/organisation/"
    paths = [f"{folder}llama-8b", f"{folder}{'x' * 40}-1", f"{folder}{'x' * 40}-2"]
    short = short_texts(paths)
    assert list(short.values()) == ["…/llama-8b", "…/xxxxxxxxx…xxxxxxxxxx-1", "…/xxxxxxxxx…xxxxxxxxxx-2"]
    alike = [f"{'x' * 40}{n}{'x' * 40}" for n in range(2)]
    assert list(short_texts(alike)) == list(short_texts(alike).values()) == alike
    assert short_texts(["a/b", "a/c"]) == {"a/b": "a/b", "a/c": "a/c"}


def test_identifiers_are_broken_between_words_only() -> None:
    assert pieces("batch_size=0.5-model=a/b") == ["batch_", "size=", "0.5-", "model=", "a/", "b"]
    assert wrapped("max_output_tokens", 12) == ["max_output_", "tokens"]
    assert wrapped("max_output_tokens", 3) == ["max_", "output_", "tokens"], "longer words stay whole"


def test_only_cycle_of_a_point_is_shown_as_measured(tmp_path: Path) -> None:
    def values_of(cycles: int) -> list[str]:
        one = point({"a": 1}, **{SPEED: [1.0, 2.0][:cycles]})
        entry = {"experiment_id": "1", "config_hash": one.config_hash, "config_summary": "1"}
        entries = [entry | {"cycle": cycle + 1, "status": "completed"} for cycle in range(cycles)]
        file = _written(tmp_path, one, experiments=entries)
        options = re.findall(r">(as measured|relative to the point&#39;s mean)</option>", file.read_text())
        file.unlink()
        return options

    assert values_of(1) == ["as measured"]
    assert values_of(2) == ["relative to the point&#39;s mean", "as measured"]


def test_table_of_points_has_axes_as_columns_and_energy_methods(tmp_path: Path) -> None:
    cost = summary(COST, [1.0], method="estimated")
    points = [point({"pytorch.size": n, "m": "x"}, **{SPEED: [1.0], COST: cost}) for n in (1, 2)]
    page = page_of(_written(tmp_path, *points))
    assert "size pytorch.size" not in page.text
    assert "pytorch.size" in page.titles
    assert "Energy per output token (J) , estimated" in page.text
    assert "How the energy was obtained" not in page.titles
    points[1].metrics[COST] = summary(COST, [1.0])
    (tmp_path / "page.html").unlink()
    page = page_of(_written(tmp_path, *points))
    assert "How the energy was obtained" in page.titles
    assert "Energy per output token (J) , estimated" not in page.text


def test_energy_methods_are_shown_without_tokens(tmp_path: Path) -> None:
    methods = ("measured", "estimated")
    points = [point({"m": one}, energy_j=summary("energy_j", [2.0], method=one)) for one in methods]
    page = page_of(_written(tmp_path, *points))
    assert "How the energy was obtained" in page.titles
    lines = render(*points_table(points, {"0" * 16: 1}, 100)[:2])
    assert [line.split()[-1] for line in lines[-2:]] == [*methods]


def test_axis_range_is_limited_for_wide_intervals() -> None:
    def mean(value: float, half: float | None = None) -> Summary:
        return Summary(mean=value, n=3, unit="s", ci95=None if half is None else (value - half, value + half))

    narrow = range_of([mean(10.0, 0.1), mean(12.0, 0.1)])
    assert (narrow.type, narrow.cut) == ("linear", False)
    assert narrow.edges[0] < 9.9 < 12.1 < narrow.edges[1]
    wide = range_of([mean(10.0, 500.0), mean(12.0, 0.1)])
    assert wide.cut
    assert 0 <= wide.edges[0] < 10 < 12 < wide.edges[1] < 20
    far = range_of([mean(0.01, 1.0), mean(100.0)])
    assert (far.type, far.cut) == ("log", True)
    assert far.edges[0] < -2
    assert far.edges[1] > 2
    assert range_of([mean(0.0)]).edges[0] < range_of([mean(0.0)]).edges[1]
    assert range_of([mean(-3.0), mean(2.0)]).edges[0] < -3


def test_thinned_power_samples_keep_extremes() -> None:
    rows = [f"{at / 10},GPU-1,{400 if at == 777 else 100 + at % 7}" for at in range(2000)]
    found = read_power("\n".join(["seconds,device,power_w", *rows]), 100)
    assert len(found["GPU-1"]) <= 100
    assert (77.7, 400.0) in found["GPU-1"]
    assert found["GPU-1"] == sorted(found["GPU-1"])
    assert len(read_power("\n".join(["seconds,device,power_w", *rows]), 2000)["GPU-1"]) == 2000


def test_percentiles_of_latencies_without_empty_columns() -> None:
    values = []
    for cycle in range(2):
        rows = "".join(f"1,{n},1,1,{n + 50 * cycle},,9\n" for n in range(1, 51))
        found = read_latencies(f"pass,request,input_tokens,output_tokens,ttft_ms,itl_mean_ms,e2e_ms\n{rows}")
        assert "itl_mean_ms" not in found
        values += found["ttft_ms"]
    assert percentiles(values)[50] == pytest.approx(50.5)
    assert percentiles(values)[95] == pytest.approx(95.05)
    assert read_latencies("x") == {}


# ---- words ----


def test_metric_names_values_and_texts_are_formatted() -> None:
    assert [name_of(one) for one in ("ttft_p50_ms", "gpu_energy_j", "output_tokens_per_second")] == [
        "TTFT p50",
        "GPU energy",
        "Output tokens per second",
    ]
    assert title_of("mfu") == "MFU"
    assert shown(Summary(mean=None, n=0, unit="J")) == "–"
    assert details(summary(COST, [1.0, 2.0, 3.0]), "J") == (
        "2 J, 95 % interval -0.4841 to 4.484, sd 1, n = 3, measured, gpu_board"
    )
    assert neutral("<b>&lt;\n%{x}", 99) == "&lt;b&gt;&amp;lt; %{x}"
    assert neutral("x" * 200) == "x" * 119 + "…"


def test_differing_facts_show_their_number_of_points() -> None:
    points = [point({"a": n}, **{SPEED: [1.0]}, testbed={"gpu": "A" if n else "B", "cpus": 2}) for n in range(3)]
    assert facts(points, "testbed") == [("gpu", "A (2 of the points); B (1 of the points)"), ("cpus", "2")]


def test_environment_is_grouped_and_unknown_values_are_listed() -> None:
    environment = {"os": "Linux", "smt": None, "packages": {"torch": "2"}, "gpus": [{"name": "A", "mig": False}]}
    assert groups(environment) == [
        ("machine", [("os", "Linux"), ("not known", "smt")]),
        ("packages", [("torch", "2")]),
        ("gpus 1", [("name", "A"), ("mig", "no")]),
    ]


def test_plot_of_cycles_has_no_deviation_of_a_metric_that_the_point_lacks() -> None:
    contents: Any = SimpleNamespace(points=[point({"size": 1})])
    cycle: Any = SimpleNamespace(point=0)
    assert _deviation(contents, "ttft_p50_ms", cycle, 1.0) is None
