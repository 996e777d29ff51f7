"""``llem compare``: its output formats and exit status; and the table of a comparison."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult, cli
from pytest_llem.gates.eligibility import workload_differences
from pytest_llem.gates.regression import Comparison, compare
from pytest_llem.gates.saving import save
from pytest_llem.gates.verdict_text import verdict_line
from pytest_llem.reporting.terminal.comparison import MAX_LINES, MAX_ROWS, as_json, lines, markdown
from pytest_llem.reporting.text import escaped
from pytest_llem.results.contention import PointContention
from pytest_llem.results.document import SCHEMA_VERSION
from pytest_llem.results.verdicts import ComparisonRecord, GateVerdict
from pytest_llem.study.gates import GatesConfig
from tests.support.marks import slow
from tests.support.study_results import H100, point, saved_file, study_result, summary

GOLDEN = Path(__file__).parent / "golden" / "1.0"
STEADY = [1.000, 1.001, 0.999, 1.0005, 0.9995]
WIDTH = 80

BUDGET = {
    "gate": "budget",
    "id": "seconds",
    "metric": "seconds",
    "point": "p",
    "unit": "s",
    "verdict": "WITHIN",
    "outcome": "passed",
    "mean": 2,
    "minimum": 1,
}

METRICS = ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms")


def _times(factor: Any) -> Any:
    return [value * factor for value in STEADY]


def _result(*factors: Any, sut: Any = None, **fields: Any) -> Any:
    """Return a result with a point for each factor, by which its times are multiplied."""
    return study_result(
        *(
            point(
                {"precision": "bf16", "pytorch.batch_size": size},
                id=f"precision=bf16-batch_size={size}",
                energy_per_output_token_j=_times(0.123 * factor),
                output_tokens_per_second=_times(1234 / factor),
                ttft_p50_ms=_times(20 * factor),
                sut=sut or {"torch": "2.13.0"},
            )
            for size, factor in enumerate(factors, start=1)
        ),
        **fields,
    )


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create baselines below the current folder: main, an equal one, and a worse one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    save(_result(1, 1), "main", tmp_path / ".llem/baselines")
    save(_result(1.001, 1.001, sut={"torch": "2.14.0"}), "same", tmp_path / ".llem/baselines")
    save(_result(1, 1.2), "worse", tmp_path / ".llem/baselines")
    return tmp_path


def _llem(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    status = cli.main(["compare", *arguments])
    out, error = capsys.readouterr()
    return status, out, error


def test_unchanged_results_are_status_0(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = _llem(capsys, "main", "same")
    assert (status, error) == (0, "")
    assert out.splitlines()[-1] == "6 SAME: no gate failed"
    assert "system under test: torch: 2.14.0 in the candidate, 2.13.0 in the reference" in out


def test_a_regression_is_status_1(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _llem(capsys, "main", "worse")
    assert status == 1
    assert out.splitlines()[-1] == "3 REGRESSION, 3 SAME: 3 gates failed"
    assert _llem(capsys, "worse", "main")[0] == 0, "the first is the reference"


def test_table_lists_points_worst_first_with_what_moved(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = _llem(capsys, "main", "worse")[1].splitlines()
    assert max(map(len, table[: table.index("")])) <= WIDTH
    assert [word for line in table for word in line.split() if word in ("REGRESSION", "SAME")] == [
        *["REGRESSION"] * 3,
        *["SAME"] * 3,
    ]
    assert table[3] == "precision=bf16-batch_size=2"
    row = "energy_per_output_token_j 0.123 → 0.148 1.200 1.198–1.202 5 REGRESSION"
    assert table[4].split() == row.split()
    assert table[5] == "    TTFT × 1.200"
    assert table.count("precision=bf16-batch_size=1") == table.count("precision=bf16-batch_size=2") == 1
    assert any("98 % to 99.7 % interval that decided; alpha 0.01 by Holm over 6 gates" in line for line in table)


@pytest.mark.parametrize("given", ["directory", "file", "baseline file"])
def test_results_and_baselines_can_be_compared(
    saved: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    folder = saved / "results" / "run"
    folder.mkdir(parents=True)
    (folder / "study_result.json").write_text(_result(1, 1.2).model_dump_json())
    places = {
        "directory": folder,
        "file": folder / "study_result.json",
        "baseline file": saved_file(saved, "worse", "made-up"),
    }
    assert _llem(capsys, "main", str(places[given]))[0] == 1


def test_json_output(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _llem(capsys, "main", "worse", "--format", "json")
    data = json.loads(out)
    assert status == 1
    assert data["schema_version"] == SCHEMA_VERSION
    record = ComparisonRecord.model_validate(data["comparison"])
    assert (record.reference, record.family) == ("main", 6)
    verdicts = [GateVerdict.model_validate(one) for one in data["verdicts"]]
    assert [one.verdict for one in verdicts] == ["SAME"] * 3 + ["REGRESSION"] * 3


def test_markdown_output(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _llem(capsys, "main", "worse", "--format", "markdown")
    table = out.splitlines()
    heading = "| point | metric | reference | candidate | ratio | interval | n | verdict | what moved |"
    assert table[0] == heading
    assert table[2].count("|") == table[1].count("|") == table[0].count("|") == 10
    what = r"| precision=bf16-batch\_size=2 | energy\_per\_output\_token\_j"
    assert table[2] == what + " | 0.123 | 0.148 | 1.200 | 1.198–1.202 | 5 | REGRESSION | TTFT × 1.200 |"
    assert table[3].startswith("|  | output"), "a point is named once"
    assert table[-1] == "**3 REGRESSION, 3 SAME: 3 gates failed**"


def test_metrics_alpha_and_delta_may_be_given(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "main",
        "worse",
        "--metric",
        "ttft_p50_ms",
        "--delta",
        "0.5",
        "--alpha",
        "0.05",
        "--format",
        "json",
    )
    status, out, _ = _llem(capsys, *arguments)
    data = json.loads(out)
    assert status == 0
    assert [(one["metric"], one["delta"], one["alpha"]) for one in data["verdicts"]] == [
        ("ttft_p50_ms", 0.5, 0.05)
    ] * 2


def test_gates_settings_come_from_the_study(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = GatesConfig(alpha=0.02, delta={"ttft_p50_ms": 0.4}, metrics=["ttft_p50_ms"])
    protocol = {"n_cycles": 5, "gates": gates.model_dump(mode="json")}
    save(_result(1, 1.2, measurement_protocol=protocol), "lenient", saved / ".llem/baselines")
    status, out, _ = _llem(capsys, "main", "lenient", "--format", "json")
    verdicts = json.loads(out)["verdicts"]
    assert (status, [(one["metric"], one["delta"], one["alpha"]) for one in verdicts]) == (
        0,
        [("ttft_p50_ms", 0.4, 0.02)] * 2,
    )
    assert _llem(capsys, "main", "lenient", "--delta", "0.1")[0] == 1


def test_inconclusive_fails_with_fail_on_inconclusive(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in (("noisy", [0.98, 1.0, 1.02]), ("noisy too", [1.02, 0.98, 1.0])):
        save(study_result(point({}, output_tokens_per_second=values)), name, saved / ".llem/baselines")
    status, out, _ = _llem(capsys, "noisy", "noisy too")
    assert (status, out.splitlines()[-1]) == (0, "2 NOT JUDGED, 1 INCONCLUSIVE: no gate failed")
    assert "INCONCLUSIVE" in out
    assert re.search(r"^    about \d+ cycles on either side would decide it$", out, re.M)
    assert _llem(capsys, "noisy", "noisy too", "--fail-on", "inconclusive")[0] == 1


def test_other_devices_are_compared_only_if_asked(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = _result(1, 1)
    for one in other.points:
        one.testbed = H100 | {"gpu": "NVIDIA A100"}
    save(other, "a100", saved / ".llem/baselines")
    line = "GPU model: NVIDIA A100 in the candidate, NVIDIA H100 80GB HBM3 in the reference"
    status, out, _ = _llem(capsys, "main", "a100")
    assert status == 1
    assert f"not judged: cannot be compared: {line} " in out
    status, out, _ = _llem(capsys, "main", "a100", "--allow-mismatch")
    assert status == 0
    assert f"compared despite mismatch: {line}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("nain", "same"),
            "nain: no such baseline, file or folder (did you mean 'main'?); baselines: main, same, worse",
        ),
        (("main", "no/where"), "no/where: no such file or folder"),
        (("main", "broken.json"), "broken.json: not a StudyResult: the file: Invalid JSON"),
        (("main", "same", "--alpha", "0.7"), "--alpha: must be less than 0.5 (got 0.7)"),
        (("main", "same", "--delta", "-1"), "--delta: must be at least 0 (got -1.0)"),
        (("main", "newer.json"), "newer.json: gates.metrics: no metric of that name (got 'new'): give --metric"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    Path("broken.json").write_text("no")
    newer = _result(1, measurement_protocol={"n_cycles": 5, "gates": {"metrics": ["new"]}})
    Path("newer.json").write_text(newer.model_dump_json())
    status, out, error = _llem(capsys, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith(f"llem: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["compare", "main"], ["table"], ["history"], ["aa", "main.json"]])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("points.0.config.n", "2"),
        ("points.0.config.energy", [1]),
        ("points.0.config.load", 5),
        ("points.0.config.load", {}),
        ("points.0.config.load", {"rate": 1, "slo": "x"}),
        ("points.0.config.load", {"rate": 1, "slo": {"attainment": None}}),
        ("points.0.testbed.cpus", ""),
        ("points.0.testbed.energy_ticks", "many"),
        ("measurement_protocol.gates", [1]),
        ("measurement_protocol.n_cycles", "five"),
        ("measurement_protocol.budgets", 5),
        ("points.0.metrics.seconds.mean", math.nan),
        ("points.0.verdicts", [{**BUDGET, "mean": None}]),
        ("points.0.verdicts", [{**BUDGET, "minimum": None}]),
    ],
)
def test_value_of_a_wrong_type_is_one_line_that_names_it(
    saved: Path, capsys: pytest.CaptureFixture[str], command: list[str], place: str, value: Any
) -> None:
    result = _result(1).model_dump(mode="json")
    (saved / "main.json").write_text(json.dumps(result))
    *parents, last = place.split(".")
    section = result
    for key in parents:
        section = section[int(key)] if key.isdigit() else section.setdefault(key, {})
    section[last] = value
    (saved / "edited.json").write_text(json.dumps(result))
    assert cli.main([*command, "edited.json"]) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert f"edited.json: not a StudyResult: {place}" in error


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("second", "there is no metric 'second' (did you mean 'seconds'?)"),
        ("mfu", "mfu cannot be gated: neither higher nor lower values are better"),
    ],
)
def test_unknown_metric_is_refused(
    saved: Path, capsys: pytest.CaptureFixture[str], metric: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "main", "same", "--metric", metric])
    assert stopped.value.code == 2
    assert f"argument --metric: {message}" in capsys.readouterr().err


def test_results_of_older_versions_fail_with_the_reason(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = StudyResult.load(GOLDEN).model_copy(update={"experiments": [], "name": "other"})
    (saved / "other.json").write_text(other.model_dump_json())
    status, out, _ = _llem(capsys, str(GOLDEN), "other.json", "--metric", "seconds")
    assert status == 1
    assert "was written by a version that kept no cycle values: measure it again" in " ".join(out.split())


def test_command_imports_neither_pytest_nor_torch(saved: Path) -> None:
    code = (
        "import sys\n"
        "from pytest_llem.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not {'pytest', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "main", "worse"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "3 REGRESSION" in done.stdout


@pytest.mark.parametrize("form", ["table", slow("markdown"), slow("json")])
def test_output_on_a_terminal_without_unicode(saved: Path, form: str) -> None:
    save(_result(1, 1, sut={"torch": "2.13.0é\x1b[31m"}), "odd", saved / ".llem/baselines")
    done = subprocess.run(
        [sys.executable, "-m", "pytest_llem.cli", "compare", "main", "odd", "--format", form],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "6 SAME" in done.stdout.decode("ascii") or json.loads(done.stdout)["verdicts"]
    assert b"\x1b" not in done.stdout


def _many(points: Any) -> Any:
    factors = [1.2 if n == points // 2 else 1.001 for n in range(points)]
    candidate, reference = _result(*factors, sut={"torch": "2.14.0"}), _result(*[1] * points)
    return compare(candidate, reference, GatesConfig(), name="main")


def test_rows_of_many_points_are_cut() -> None:
    found = _many(50)
    shown = lines(found, WIDTH)
    assert sum(line.endswith(("SAME", "REGRESSION")) for line in shown) == MAX_ROWS + 1, "and what is left out"
    assert shown[3] == "precision=bf16-batch_size=26", "the worst comes first"
    assert f"and {150 - MAX_ROWS} SAME" in shown
    assert max(len(line) for line in shown if "│" in line or "─" in line or "bf16" in line) <= WIDTH
    assert f"and {150 - MAX_ROWS} SAME" in markdown(found)
    assert len(json.loads(as_json(found))["verdicts"]) == 150


def test_no_regression_is_cut_while_a_row_of_another_verdict_is_shown() -> None:
    candidate, reference = _result(*[1.2] * 25), _result(*[1] * 25)
    for one in (candidate, reference):
        for each in one.points:
            each.metrics["output_tokens_per_second"] = summary("output_tokens_per_second", STEADY)
    shown = lines(compare(candidate, reference, GatesConfig(), name="main"), WIDTH)
    assert sum(line.endswith("REGRESSION") for line in shown) == 50
    assert "and 15 SAME" in shown


def test_points_of_one_verdict_are_in_the_order_of_their_change() -> None:
    shown = lines(compare(_result(1.2, 1.4, 1.3), _result(1, 1, 1), GatesConfig(), name="main"), WIDTH)
    assert [line[-1] for line in shown if line.startswith("precision=")] == ["2", "3", "1"]


def test_estimated_energy_is_marked_in_its_row() -> None:
    values = summary("energy_per_output_token_j", STEADY, method="estimated", boundary="cpu_package")
    config = {"precision": "bf16", "energy": {"allow_estimated": True}}
    given = study_result(point({"x": 1}, config=config, energy_per_output_token_j=values))
    found = compare(given, given, GatesConfig(metrics=["energy_per_output_token_j"]), name="main")
    shown = lines(found, WIDTH)
    row = next(place for place, line in enumerate(shown) if line.endswith("SAME"))
    assert shown[row + 1] == "    estimated"
    assert r"| energy\_per\_output\_token\_j (estimated) |" in markdown(found)


def test_numbers_of_the_table_and_its_notes_are_not_rounded_off() -> None:
    speeds = {"output_tokens_per_second": [999.7, 999.7], "requests_per_second": [1.0, 1.0]}
    slow_ones = {"output_tokens_per_second": [1.0, 1.0], "requests_per_second": [1.0, 1.0]}
    gates = GatesConfig(metrics=[*speeds], alpha=0.0125, delta=0.0125)
    shown = lines(
        compare(study_result(point({}, **speeds)), study_result(point({}, **slow_ones)), gates, name="x"), WIDTH
    )
    assert any(line.split()[1:5] == ["1.00", "→", "1,000", "1,000"] for line in shown)
    assert any("alpha 0.0125 by Holm over 2 gates, delta 1.25 %" in line for line in shown)


def test_long_lists_are_cut() -> None:
    record = ComparisonRecord(
        reference="main",
        alpha=0.01,
        family=0,
        sut=[f"package-{n}: 1 in the candidate, 2 in the reference" for n in range(30)],
    )
    shown = lines(Comparison(record, []), WIDTH)
    assert sum(line.startswith("system under test: package-") for line in shown) == MAX_LINES
    assert f"system under test: {30 - MAX_LINES} more" in shown
    assert shown[-1] == "nothing to compare: no gate failed"


def test_no_interval_is_too_wide_for_the_table() -> None:
    wild = study_result(point({}, id="precision=bf16-batch_size=2", output_tokens_per_second=[1.0, 9.0]))
    found = compare(wild, wild, GatesConfig(metrics=["output_tokens_per_second"]), name="main")
    interval = found.verdicts[0].interval
    assert interval is not None
    low, high = interval
    assert low < 0.001
    assert high > 1000
    shown = lines(found, WIDTH)
    assert shown[4].split()[0] == "output_tokens_per_second"
    assert shown[4].split()[5] == "<0.001–>1000"
    assert max(map(len, shown[:5])) <= WIDTH


def test_texts_of_a_result_cannot_begin_a_line() -> None:
    contended = PointContention(contended=[1], reasons=["by\n::error::"])
    evil = study_result(
        point({"x": 1}, seconds=STEADY, contention=contended), pytest_llem_version="1\n::error::\x1b[31m"
    )
    plain = study_result(point({"x": 1}, seconds=STEADY))
    found = compare(plain, evil, GatesConfig(metrics=["seconds"]), name="m")
    assert r"reference: m, measured with pytest-llem 1\n::error::\x1b[31m" in lines(found, WIDTH)
    assert r"contended: by\n::error::" in verdict_line(found.verdicts[0])


def test_new_and_missing_points_are_listed() -> None:
    found = compare(_result(1, 1, 1), _result(1), GatesConfig(), name="main")
    assert "new: precision=bf16-batch_size=2" in lines(found, WIDTH)
    gone = compare(_result(1), _result(1, 1), GatesConfig(), name="main")
    shown = lines(gone, WIDTH)
    assert "missing: precision=bf16-batch_size=2" in shown
    assert shown[-1] == "3 SAME, 1 missing point: 1 gate failed"
    assert lines(found, WIDTH)[-1] == "3 SAME, 2 new points: no gate failed"
    assert not any(
        "new" in line or "missing" in line
        for line in lines(compare(_result(1), _result(1), GatesConfig(), name="m"), WIDTH)
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\nb\r\nc", "a b c"),
        ("<img src=x>&amp;", "&lt;img src=x&gt;&amp;amp;"),
        ("[x](y) *z* `c` _u_", r"\[x\](y) \*z\* \`c\` \_u\_"),
        (r"a\|b", r"a\\\|b"),
    ],
)
def test_markdown_shows_values_literally(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_ids_cannot_break_the_markdown() -> None:
    name = "x=a|b\n| <b>"
    given = study_result(point({"x": "y"}, id=name, seconds=STEADY))
    found = compare(given, given, GatesConfig(metrics=["seconds"]), name="evil|<i>\nname")
    text = markdown(found)
    assert all(line.replace(r"\|", "").count("|") in (0, 9) for line in text.splitlines())
    assert "<" not in text
    assert "reference: evil\\|&lt;i&gt; name" in text


@pytest.mark.parametrize("n", [None, 0])
def test_tokens_per_request_are_not_compared_if_their_number_is_unknown(n: int | None) -> None:
    sides = [point({"size": 1}, config={"n": number, "energy": {}}, output_tokens=[8.0]) for number in (n, 4)]
    assert not [one for one in workload_differences(*sides) if "tokens" in one]
