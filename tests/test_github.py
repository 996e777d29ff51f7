"""Test GitHub annotations, which a runner must be able to parse, and the step summary, which no name may break."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from pytest_llem import StudyResult, cli
from pytest_llem.reporting import github
from pytest_llem.reporting.github import summary_markdown
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.results.verdicts import ComparisonRecord, GateVerdict
from tests.conftest import ROOT
from tests.support.loads import SLO, load_point
from tests.support.study_results import point, study_result
from tests.support.warned import study_warning

GOLDEN = ROOT / "tests" / "golden" / "1.0"
ACTIONS = {"GITHUB_ACTIONS": "true"}

BEYOND = GateVerdict(
    gate="budget",
    id="energy_per_output_token_j-batch_size=8",
    metric="energy_per_output_token_j",
    point="batch_size=8",
    verdict="BEYOND",
    outcome="failed",
    unit="J",
    method="measured",
    mean=0.4712,
    ci95=(0.46, 0.48),
    n=5,
    maximum=0.45,
    file="studies/x.yaml",
    line=12,
)
WITHIN = BEYOND.model_copy(update={"verdict": "WITHIN", "outcome": "passed", "mean": 0.44, "within_noise": True})
REGRESSION = GateVerdict(
    gate="regression",
    id="output_tokens_per_second-batch_size=8",
    metric="output_tokens_per_second",
    point="batch_size=8",
    verdict="REGRESSION",
    outcome="failed",
    unit="1/s",
    mean=1210.0,
    n=5,
    reference_mean=1300.0,
    reference_n=5,
    ratio=0.93,
    interval=(0.91, 0.951),
    confidence=0.98,
    file="studies/x.yaml",
    line=3,
)
UNDECIDED = REGRESSION.model_copy(
    update={"verdict": "INCONCLUSIVE", "outcome": "passed", "n": 3, "cycles_to_decide": 12}
)
NOT_JUDGED = BEYOND.model_copy(
    update={"verdict": "NOT JUDGED", "mean": None, "n": 0, "reason": "energy is estimated"}
)

#: Possible names of models and error messages.
NASTY = [
    "a|b",
    r"a\|b",
    "a\nb\r\n| c | d |",
    "<img src=x onerror=alert(1)>",
    "</table><script>alert(1)</script>",
    "<!-- ",
    "&lt;b&gt; &amp; &#124;",
    "**bold** __bold__ _it_ *it* ~~gone~~ `code` ``` ",
    "[link](https://example.org) ![image](x.png) <https://example.org>",
    "https://example.org www.example.org a@example.org",
    "@somebody #12 $x^2$ $$y$$",
    "# heading",
    "- [ ] task",
    "batch_size=8 _x_y_",
    "trailing\\",
    "\x1b[31mred\u202e\x00",
]


def parse(line: Any) -> Any:
    """Return the name, properties and message of a workflow command as a runner parses it."""
    command = re.fullmatch(r"::(\w+) (.*?)::(.*)", line)
    assert command is not None
    name, properties, message = command.groups()
    pairs = [pair.split("=", 1) for pair in properties.split(",")]
    escapes = (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%"))

    def plain(text: Any, escapes: Any) -> Any:
        for code, one in escapes:
            text = text.replace(code, one)
        return text

    return name, {key: plain(value, escapes) for key, value in pairs}, plain(message, escapes[2:])


class TestAnnotations:
    def test_failed_gate_is_an_error_at_its_line(self) -> None:
        lines = github.workflow_commands([WITHIN, BEYOND, REGRESSION, NOT_JUDGED], Path("/work"), ACTIONS)
        assert lines == [
            "::error file=studies/x.yaml,line=12,title=budget[energy_per_output_token_j-batch_size=8]::"
            "batch_size=8: energy_per_output_token_j: 0.471 J is beyond 0.45 J (0.460–0.480, n = 5)",
            "::error file=studies/x.yaml,line=3,title=regression[output_tokens_per_second-batch_size=8]::"
            "batch_size=8: output_tokens_per_second: 0.930 × the reference: REGRESSION "
            "(98 %25 interval 0.910–0.951, n = 5 against 5)",
            "::error file=studies/x.yaml,line=12,title=budget[energy_per_output_token_j-batch_size=8]::"
            "batch_size=8: energy_per_output_token_j: cannot be judged: energy is estimated",
        ]

    def test_inconclusive_gate_is_a_warning_unless_it_fails(self) -> None:
        (line,) = github.workflow_commands([UNDECIDED], Path("/work"), ACTIONS)
        name, _, message = parse(line)
        assert name == "warning"
        assert message.endswith(
            ": 0.930 × the reference: INCONCLUSIVE (98 % interval 0.910–0.951, n = 3 against 5); "
            "about 12 cycles would decide"
        )
        failed = UNDECIDED.model_copy(update={"outcome": "failed"})
        assert parse(github.workflow_commands([failed], Path("/work"), ACTIONS)[0])[0] == "error"

    def test_annotation_of_a_missing_point_names_no_metric(self) -> None:
        missing = NOT_JUDGED.model_copy(update={"metric": "", "reason": "in the reference"})
        (line,) = github.workflow_commands([missing], Path("/work"), ACTIONS)
        assert parse(line)[2] == "batch_size=8: cannot be judged: in the reference"

    @pytest.mark.parametrize("environ", [{}, {"GITHUB_ACTIONS": "false"}, {"CI": "true"}])
    def test_no_annotations_outside_github_actions(self, environ: dict[str, Any]) -> None:
        assert github.workflow_commands([BEYOND], Path("/work"), environ) == []

    def test_workflow_commands_are_escaped(self) -> None:
        nasty = "100%,a:b::c\r\n::error::%0A"
        verdict = BEYOND.model_copy(update={"id": nasty, "reason": nasty, "file": "a,b:c/x%.yaml"})
        (line,) = github.workflow_commands([verdict], Path("/work"), ACTIONS)
        assert line.splitlines() == [line]
        name, properties, message = parse(line)
        assert name == "error"
        assert properties == {"file": "a,b:c/x%.yaml", "line": "12", "title": f"budget[{nasty}]"}
        assert message.endswith(nasty.replace("\r\n", r"\r\n"))

    def test_files_are_relative_to_the_checkout(self, tmp_path: Path) -> None:
        checkout = tmp_path / "checkout"
        (checkout / "project" / "studies").mkdir(parents=True)
        link = tmp_path / "link"
        link.symlink_to(checkout)
        for root, workspace, file in (
            (checkout / "project", checkout, "project/studies/x.yaml"),
            (link / "project", checkout, "project/studies/x.yaml"),
            (checkout / "project", link, "project/studies/x.yaml"),
            (checkout, checkout / "project", None),
        ):
            environ = {**ACTIONS, "GITHUB_WORKSPACE": str(workspace)}
            (line,) = github.workflow_commands([BEYOND], root, environ)
            found = parse(line)[1]
            assert (found.get("file"), found.get("line")) == (file, "12" if file else None)

    def test_gate_without_a_place_has_no_line(self) -> None:
        verdict = REGRESSION.model_copy(update={"file": None, "line": None})
        (line,) = github.workflow_commands([verdict], Path("/work"), ACTIONS)
        assert set(parse(line)[1]) == {"title"}


@pytest.fixture
def result() -> StudyResult:
    """Return a study's result, with verdicts on its first point."""
    read = StudyResult.load(GOLDEN / "study_result.json")
    read.points[0].verdicts = [WITHIN, UNDECIDED, BEYOND, REGRESSION]
    return read


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that writes a step summary and returns its text."""

    def write(*results: Any, before: bytes = b"") -> Any:
        file = tmp_path / "summary.md"
        file.write_bytes(before)
        error = github.write_summary(results, {**ACTIONS, "GITHUB_STEP_SUMMARY": str(file)})
        assert error is None
        return file.read_text()

    return write


def tables(text: Any) -> Any:
    """Return the displayed cells of each table, and the types of all tokens that are not plain text."""
    found: list[list[list[str]]] = []
    other: list[str] = []
    in_cell = False
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline":
            children = token.children or []
            other += [child.type for child in children if child.type not in ("text", "text_special")]
            if in_cell:
                found[-1][-1].append("".join(child.content for child in children))
        elif token.type in ("html_block", "fence", "code_block", "hr"):
            other.append(token.type)
        in_cell = token.type in ("th_open", "td_open")
    return found, other


class TestSummary:
    def test_summary_has_failed_gates_first_and_every_point(
        self, page: Callable[..., Any], result: StudyResult
    ) -> None:
        (gates, points), other = tables(page(result))
        assert gates[0] == ["verdict", "gate", "point", "result", "energy method"]
        assert [row[0] for row in gates[1:]] == ["BEYOND", "REGRESSION", "INCONCLUSIVE", "WITHIN"]
        assert gates[1][1:] == [
            "budget energy_per_output_token_j",
            "batch_size=8",
            "0.471 J is beyond 0.45 J (0.460–0.480, n = 5)",
            "measured",
        ]
        assert gates[2][3].startswith("0.930 × the reference: REGRESSION (98 % interval 0.910–0.951, n = 5")
        assert set(other) <= {"strong_open", "strong_close"}
        assert points[0][:5] == ["fault", "n", "out tok/s", "TTFT p50 ms", "J/out token estimated"]
        assert points[0][-1] == "verdict"
        assert [f"fault={row[0]}" for row in points[1:]] == [point.id for point in result.points]
        metrics = result.points[0].metrics
        assert points[1][1] == str(metrics["seconds"].n)
        assert points[1][2] == f"{metrics['output_tokens_per_second'].mean:,.0f}", "of two cycles no interval"
        assert points[1][-1] == "BEYOND"

    def test_points_under_load_have_their_slo_and_the_best_load(self, page: Callable[..., Any]) -> None:
        axes = {"server.args.max_num_batched_tokens": 8}
        loads = [load_point({"concurrency": n, "slo": SLO}, 1 / n, 0.5, axes=axes | {"n": n}) for n in (1, 2)]
        text = page(study_result(*loads))
        ((head, *rows),), _ = tables(text)
        assert head[:3] == ["concurrency", "n (prompts)", "n"]
        assert {"J/good token measured", "within SLO", "good req/s"} <= {*head}
        assert [row[head.index("within SLO")] for row in rows] == ["100 %", "50 %"]
        assert "n&#61;1: best within the SLO: concurrency 1" in text.replace("n=1", "n&#61;1")

    def test_summary_has_warnings_errors_and_comparison(
        self, page: Callable[..., Any], result: StudyResult
    ) -> None:
        result.comparison = ComparisonRecord(
            reference="main",
            paired=True,
            alpha=0.01,
            family=6,
            testbed=["power limit: 700 W and 600 W"],
            compared_despite_mismatch=True,
            warnings=["another driver"],
            new_points=["batch_size=16"],
        )
        result.warnings = [study_warning("energy is estimated from CPU time, not measured")]
        entry = result.experiments[0]
        entry.status, entry.error = "failed", ErrorRecord(kind="oom", type="E", message="CUDA out of memory")
        result.experiments[1].status = "skipped"
        text = page(result)
        for line in (
            "2 of 4 experiments completed, 2 failed, 1 skipped",
            "Compared with main, interleaved; alpha 0.01, Holm over 6 gates.",
            "- differs, compared despite mismatch: power limit: 700 W and 600 W",
            "- note: another driver",
            "- new: batch&#61;size",
            "- warning: energy is estimated from CPU time, not measured",
            f"- failed: {entry.experiment_id}: oom: CUDA out of memory",
        ):
            assert line.replace("&#61;size", "_size=16") in text.splitlines()

    @pytest.mark.parametrize("nasty", NASTY)
    def test_names_and_errors_do_not_break_the_summary(
        self, page: Callable[..., Any], result: StudyResult, nasty: str
    ) -> None:
        result.name = nasty
        result.warnings = [study_warning(nasty)]
        for number, one in enumerate(result.points):
            one.id = nasty
            one.axes = {nasty: f"{nasty}{number}"}
        result.points[0].verdicts = [BEYOND.model_copy(update={"point": nasty, "reason": nasty, "metric": nasty})]
        text = page(result)
        (gates, points), other = tables(text)
        assert set(other) <= {"strong_open", "strong_close"}, "text, and nothing else"
        assert {len(row) for row in gates} == {5}
        assert len({len(row) for row in points}) == 1
        shown = "".join(
            one if one.isprintable() else one.encode("unicode_escape").decode() for one in " ".join(nasty.split())
        )
        assert gates[1][2] == shown
        rest = re.sub(r"&#\d+;", "", text)
        assert not re.search(r"<|https?://|\bwww\.|\$", rest)

    @pytest.mark.slow
    def test_summary_is_appended_and_stays_small(self, page: Callable[..., Any], result: StudyResult) -> None:
        point = result.points[0]
        result.points = [
            point.model_copy(update={"axes": {f"axis{k}": f"{'|' * 5_000}{n}" for k in range(10)}})
            for n in range(500)
        ]
        result.warnings = [study_warning("!" * 1_000)] * 1_000
        text = page(result, before=b"what another tool wrote\n")
        assert text.startswith("what another tool wrote\n")
        assert len(text.encode()) <= github.MAX_OWN_BYTES + 30
        assert text.rstrip().endswith("more in study_result.json")
        full = page(result, before=b"x" * (github.MAX_BYTES - 1))
        assert len(full.encode()) < github.MAX_BYTES, "or GitHub would drop what the other tool wrote"

    def test_long_tables_and_lists_say_what_is_missing(
        self, page: Callable[..., Any], result: StudyResult
    ) -> None:
        point = result.points[0].model_copy(update={"verdicts": []})
        result.points = [point.model_copy(update={"id": f"n={number}"}) for number in range(1_000)]
        result.warnings = [study_warning(f"w{number}") for number in range(30)]
        text = page(result)
        (points,), _ = tables(text)
        assert len(points) == 1 + github.MAX_ROWS
        assert "… 800 more (point) in study_result.json" in text
        assert "… 10 more (warning) in study_result.json" in text

    def test_summary_is_written_only_in_github_actions(self, tmp_path: Path, result: StudyResult) -> None:
        file = tmp_path / "summary.md"
        assert github.write_summary([result], {"GITHUB_STEP_SUMMARY": str(file)}) is None
        assert github.write_summary([], {**ACTIONS, "GITHUB_STEP_SUMMARY": str(file)}) is None
        assert github.write_summary([result], ACTIONS) is None
        assert not file.exists()

    def test_unwritable_summary_is_one_line(self, tmp_path: Path, result: StudyResult) -> None:
        for file in (tmp_path, tmp_path / "no" / "such", "/dev/full"):
            error = github.write_summary([result], {**ACTIONS, "GITHUB_STEP_SUMMARY": os.fspath(file)})
            assert error is not None
            assert error.startswith("the GitHub step summary could not be written: ")
            assert len(error.splitlines()) == 1


class TestSummaryCommand:
    def test_failed_jobs_come_first_in_one_overview(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, verdict in (("energy-a100", WITHIN), ("energy-h100", BEYOND)):
            result = study_result(point({"batch_size": 8}, seconds=[1.0, 1.1], verdicts=[verdict]))
            (tmp_path / name / "results" / "llama_1").mkdir(parents=True)
            (tmp_path / name / "results" / "llama_1" / "study_result.json").write_text(result.model_dump_json())
        (tmp_path / "energy-h100" / "cut.json").write_text("{")
        assert cli.main(["summary", str(tmp_path)]) == 0
        found = capsys.readouterr().out.splitlines()
        assert found[0].startswith("- not read: ")
        rows = [line for line in found if line.startswith("| ") and "llama" in line]
        assert [("energy-h100" in row, "**1 BEYOND**" in row, "1 WITHIN" in row) for row in rows] == [
            (True, True, False),
            (False, False, True),
        ]
        assert all("nvidia-h100-80gb-hbm3_700-w" in row for row in rows)

    def test_many_points_fit_into_a_comment(self) -> None:
        points = [point({"n": at}, seconds=[1.0, 1.1], verdicts=[BEYOND] * 3) for at in range(300)]
        text = summary_markdown({str(at): study_result(*points) for at in range(5)})
        assert 30_000 < len(text.encode()) <= 60_000
        assert text.endswith("… more in study_result.json\n")

    @pytest.mark.parametrize("name", ["nowhere", "empty"])
    def test_no_results_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        (tmp_path / "empty").mkdir()
        assert cli.main(["summary", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
