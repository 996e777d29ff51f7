"""Result files of load generators: what is read from them, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.cli import import_
from pytest_llem.importers import vllm
from pytest_llem.importers.formats import FORMATS, read_runs
from pytest_llem.importers.reading import MAX_BYTES, Fields, ImportFileError
from pytest_llem.importers.run import CutRecords, ToolRun
from pytest_llem.importers.steady import NotSteadyError, steady_rates
from pytest_llem.measurement.imported_runs import ImportedRuns
from pytest_llem.results.metrics import Metric
from pytest_llem.study.engines import FileFormat
from tests.support.imports import GOLDEN, vllm_result, write_vllm


def _run(*names: str) -> ToolRun:
    """Return the run in files of GOLDEN; of those of llama-bench, that of the first test."""
    run, *others = read_runs([GOLDEN / name for name in names])
    assert not others or run.format == "llama-bench"
    return run


def _metrics(*runs: ToolRun) -> dict[str, Metric]:
    return ImportedRuns(runs).metrics()


def _value(metrics: dict[str, Metric], name: str) -> float:
    value = metrics[name].value
    assert value is not None
    return value


#: Output tokens/s of one real server under one load, as each tool says, and over the steady state.
STEADY = {
    ("vllm_0.32.0.json",): (110.3, 116.3),  # its own has ramp-up and the time when requests run out
    ("guidellm_0.8.1.json",): (102.4, 123.4),  # its own has only finished requests
    ("aiperf_0.13.0_cut.json", "aiperf_0.13.0_cut.jsonl"): (94.2, 102.4),  # 7.3 of 8 requests in flight
}


@pytest.mark.parametrize("names", STEADY)
def test_rates_are_over_the_steady_state(names: tuple[str, ...]) -> None:
    run = _run(*names)
    own, steady = STEADY[names]
    record = ImportedRuns([run]).record()
    assert record.rates == "steady state"
    assert record.reported["output_tokens_per_second"] == pytest.approx(own, abs=0.05)
    assert _value(_metrics(run), "output_tokens_per_second") == pytest.approx(steady, abs=0.05)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["vllm_0.32.0.json"], {"output_tokens": 1280, "input_tokens": 2560, "itl_p50_ms": 45.857}),
        (["vllm_0.32.0_summary.json"], {"output_tokens": 160, "tpot_p99_ms": 12.637, "itl_p50_ms": 10.700}),
        (["aiperf_0.13.0.json", "aiperf_0.13.0.jsonl"], {"output_tokens": 160, "itl_p50_ms": 10.650}),
        (["aiperf_0.13.0.json"], {"output_tokens": 160, "tpot_p50_ms": 11.180}),
        (["aiperf_0.2.0.json", "aiperf_0.2.0.jsonl"], {"output_tokens": 160, "e2e_p50_ms": 127.442}),
        (["aiperf_0.2.0.jsonl"], {"output_tokens": 160, "e2e_p50_ms": 127.442}),
        (["guidellm_0.8.1.json"], {"output_tokens": 1024, "input_tokens": 2048, "tpot_p50_ms": 45.673}),
        (["llama-bench_b11434.json"], {"seconds": 1.885, "input_tokens": 64}),
        (["llama-bench_b11434.csv"], {"seconds": 1.224, "input_tokens": 64}),
        (["sglang_0.4.10.jsonl"], {"output_tokens": 160, "e2e_p99_ms": 172.627}),
        (["sglang_0.4.10_details.jsonl"], {"output_tokens": 160, "itl_p50_ms": 11.071}),
        (["sglang_0.5.9.jsonl"], {"output_tokens": 160, "e2e_p90_ms": 144.277}),
        (["sglang_0.5.9_details.jsonl"], {"output_tokens": 160, "tpot_p90_ms": 16.050}),
    ],
    ids=" ".join,
)
def test_figures_are_converted(names: Sequence[str], expected: dict[str, float]) -> None:
    metrics = _metrics(_run(*names))
    assert metrics.keys() == CATALOGUE.keys()
    found = {name: metrics[name].value for name in expected}
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "names",
    [
        ["vllm_0.32.0.json"],
        ["aiperf_0.13.0.json", "aiperf_0.13.0.jsonl"],
        ["sglang_0.4.10_details.jsonl"],
        ["sglang_0.5.9_details.jsonl"],
    ],
    ids=" ".join,
)
def test_latencies_of_requests_are_those_that_the_tool_reports(names: Sequence[str]) -> None:
    run = _run(*names)
    metrics = _metrics(run)
    latencies = {name: value for name, value in run.figures.items() if name.endswith("_ms")}
    assert len(latencies) >= 6
    assert {name: metrics[name].value for name in latencies} == pytest.approx(latencies, rel=1e-3)


def test_what_a_file_does_not_hold_is_null_with_its_reason() -> None:
    metrics = _metrics(_run("aiperf_0.13.0.json"))
    assert metrics["energy_j"].value is None
    assert metrics["energy_j"].reason == "not in aiperf_0.13.0.json of AIPerf 0.13.0"


def test_field_that_a_version_does_not_write_is_null(tmp_path: Path) -> None:
    for name in vllm_result():
        document = vllm_result(median_itl_ms=1.0)
        del document[name]
        if name in ("request_throughput", "num_prompts"):  # by which the format is recognised
            continue
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(document))
        runs = ImportedRuns(read_runs([file]))
        assert _value(runs.metrics(), "requests_per_second") > 0, name
        assert runs.window().window_seconds > 0, name


def test_chunks_are_not_counted_as_tokens() -> None:
    merged = vllm_result(tokens=8)
    merged["itls"] = [gaps[1:] for gaps in merged["itls"]]  # the first chunk has two tokens
    metrics = _metrics(*_read(merged))
    assert metrics["itl_p50_ms"].value is None
    assert "several tokens" in (metrics["itl_p50_ms"].reason or "")
    assert _value(metrics, "tpot_p50_ms") == pytest.approx(10, rel=0.02)
    assert _value(metrics, "output_tokens") == 8 * 16


def test_gates_do_not_judge_runs_with_failed_requests() -> None:
    result = vllm_result()
    result["errors"][3] = "Internal Server Error"
    metrics = _metrics(*_read(result))
    assert "1 of 16 requests failed" in (metrics["ttft_p50_ms"].not_judged or "")


def test_steady_state_excludes_ramp_up_and_running_out() -> None:
    rates = steady_rates(*_read(vllm_result(requests=40, slots=4, step=0.01)))
    # Of the 12 steps of a request, 8 give a token.
    assert rates.requests / rates.seconds == pytest.approx(4 / 0.12, rel=0.05)
    assert (rates.output_tokens or 0) / rates.seconds == pytest.approx(4 * 8 / 0.12, rel=0.05)


def test_open_loop_is_steady_from_one_latency_to_the_last_request() -> None:
    result = vllm_result(requests=100, slots=100, max_concurrency=None, request_rate=10.0)
    result["start_times"] = [index / 10 for index in range(100)]
    rates = steady_rates(*_read(result))
    assert rates.ended - rates.began == pytest.approx(9.9 - 0.12, abs=0.01)
    assert rates.requests / rates.seconds == pytest.approx(10, rel=0.02)


def test_records_that_outlast_their_run_have_no_steady_state() -> None:
    [run] = _read(vllm_result(requests=40, slots=4, step=0.01))
    cut = CutRecords(requests=80, output_tokens=640.0, seconds=0.001)
    with pytest.raises(NotSteadyError, match=r"the run ended after 0.001 s, before 4 requests had a first token"):
        steady_rates(replace(run, cut=cut))


def test_requests_sent_at_once_have_no_steady_state() -> None:
    [run] = _read(vllm_result(requests=8, slots=8, max_concurrency=None))
    with pytest.raises(NotSteadyError, match="all 8 requests were sent before"):
        steady_rates(run)
    [warning] = ImportedRuns([run]).warnings()
    assert warning.code == "whole_run_rates"
    assert _value(_metrics(run), "requests_per_second") == run.figures["requests_per_second"]


def _read(result: dict[str, Any]) -> list[ToolRun]:
    return [*vllm.read(Fields(Path("out.json"), result))]


OWN: dict[str, Any] = {
    "llem_run": 1,
    "tool": "mybench",
    "version": "2",
    "model": "smol",
    "concurrency": 1,
    "clock": "monotonic",
    "requests": [
        {"sent": float(at), "token_times": [at + 0.5, at + 0.75], "input_tokens": 4, "output_tokens": 2}
        for at in range(4)
    ],
    "metrics": {"peak_memory_mb": 812.5},
}


def test_own_script_gives_requests_and_metrics(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN))
    runs = ImportedRuns(read_runs([file]))
    metrics = runs.metrics()
    assert (runs.record().tool, runs.record().version) == ("mybench", "2")
    found = {
        name: _value(metrics, name) for name in ("ttft_p50_ms", "itl_p50_ms", "peak_memory_mb", "output_tokens")
    }
    assert found == {"ttft_p50_ms": 500, "itl_p50_ms": 250, "peak_memory_mb": 812.5, "output_tokens": 8}
    assert _value(metrics, "output_tokens_per_second") == pytest.approx(7 / 3.25)


def _own(tmp_path: Path, **values: Any) -> ImportedRuns:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"llem_run": 1, **values}))
    return ImportedRuns(read_runs([file]))


def test_requests_without_duration_have_no_rate(tmp_path: Path) -> None:
    runs = _own(tmp_path, requests=[{"sent": 5, "first_token": 5, "last_token": 5, "output_tokens": 1}])
    assert runs.metrics()["requests_per_second"].value is None


def test_unknown_number_of_requests_is_not_0(tmp_path: Path) -> None:
    tokens = _own(tmp_path, seconds=3, metrics={"peak_memory_mb": 812.5}).tokens()
    assert (tokens.prompts, tokens.padding_waste) == (None, None)


def test_csv_of_requests_that_have_no_times(tmp_path: Path) -> None:
    document = json.loads((GOLDEN / "guidellm_0.8.1.json").read_text())
    for request in document["benchmarks"][0]["requests"]["successful"]:
        del request["request_start_time"], request["info"]["timings"]["request_start"]
    (file := tmp_path / "guidellm.json").write_text(json.dumps(document))
    csv = ImportedRuns(read_runs([file])).to_csv()
    assert csv is not None
    assert len(csv.splitlines()) == 1 + len(document["benchmarks"][0]["requests"]["successful"])


def test_cut_records_are_counted_among_the_requests_of_all_runs() -> None:
    cut = _run("aiperf_0.13.0_cut.json", "aiperf_0.13.0_cut.jsonl")
    whole = _run("aiperf_0.13.0.json", "aiperf_0.13.0.jsonl")
    texts = {one.code: one.text for one in ImportedRuns([cut, whole]).warnings()}
    assert "the records have 40 of 52 requests" in texts["records_cut"]


def test_error_rate_is_of_all_requests_if_the_records_are_cut() -> None:
    cut = _run("aiperf_0.13.0_cut.json", "aiperf_0.13.0_cut.jsonl")
    run = replace(cut, figures={**cut.figures, "error_rate": 0.25})
    assert _value(_metrics(run), "error_rate") == 0.25


def _deep(file: Path) -> None:
    file.write_text("[" * 100_000)


def _sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, 1_000_000_000)


def _pipe(file: Path) -> None:
    os.mkfifo(file)
    os.open(file, os.O_RDWR)  # a reader must not wait for a writer


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.touch(), "is empty"),
    "binary": (lambda file: file.write_bytes(b"\x80abc"), "is not UTF-8 text (byte 0x80 at 0)"),
    "huge": (_sparse, f"has 1,000 MB, and at most {MAX_BYTES / 1e6:,.0f} MB can be imported"),
    "folder": (lambda file: file.mkdir(), "is a folder without JSON, JSON lines or CSV"),
    "pipe": (_pipe, "is not a file"),
    "deep": (_deep, "not valid JSON: nested too deeply"),
    "lists": (lambda file: file.write_text("[" + "[]," * 4_100_000 + "[]]"), "holds more than 4,000,000 lists"),
    "digits": (lambda file: file.write_text("9" * 5000), "not valid JSON: Exceeds the limit"),
    "truncated": (
        lambda file: file.write_text(json.dumps(vllm_result())[:-100]),
        "ends in the middle of its JSON",
    ),
    "no JSON": (lambda file: file.write_text("hello"), ":1:1: not valid JSON: Expecting value"),
    "another": (lambda file: file.write_text('{"a": 1}'), "is of none of the formats"),
    "number": (lambda file: file.write_text("1"), "is of none of the formats"),
    "text": (
        lambda file: write_vllm(file, duration="long"),
        "duration: must be a number (got 'long')",
    ),
    "negative": (
        lambda file: write_vllm(file, duration=-1),
        "duration: must be a finite number, at least 0 (got",
    ),
    "overflow": (lambda file: file.write_text('{"num_prompts": 1, "request_throughput": 1e999}'), "(got inf)"),
    "bool": (lambda file: write_vllm(file, completed=True), "completed: must be a number (got true)"),
    "lengths": (lambda file: write_vllm(file, ttfts=[0.1]), "lists differ in length: ttfts 1, itls 16"),
    "element": (lambda file: write_vllm(file, ttfts=[None] * 16), "ttfts[0]: must be a number (got null)"),
    "nested": (lambda file: write_vllm(file, itls=[{}] * 16), "request 0.itls: must be a list (got {})"),
    "own key": (
        lambda file: file.write_text(json.dumps({**OWN, "modle": "x"})),
        "modle: unknown key (did you mean",
    ),
    "own metric": (
        lambda file: file.write_text(json.dumps({**OWN, "metrics": {"ttft_p50": 1}})),
        "metrics.ttft_p50: unknown metric (did you mean 'ttft_p50_ms'?)",
    ),
    "own order": (
        lambda file: file.write_text(json.dumps({**OWN, "requests": [{"sent": 2, "token_times": [1]}]})),
        "requests[0]: sent, first_token and last_token must be in this order",
    ),
    "own order of the tokens": (
        lambda file: file.write_text(json.dumps({**OWN, "requests": [{"first_token": 5, "last_token": 3}]})),
        "requests[0]: sent, first_token and last_token must be in this order",
    ),
    "own version": (lambda file: file.write_text('{"llem_run": 2}'), "llem_run: must be 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, message = BAD[kind]
    make(file := tmp_path / "result.json")
    with pytest.raises(ImportFileError) as raised:
        ImportedRuns(read_runs([file])).metrics()
    text = str(raised.value)
    assert text.startswith(str(file))
    assert message in text
    assert "\n" not in text


def test_control_characters_of_a_file_are_not_passed_on(tmp_path: Path) -> None:
    [run] = read_runs([write_vllm(tmp_path / "a.json", model_id="\x1b[31mred\x07")])
    assert run.model == " [31mred "


def test_named_format_has_to_be_the_format_of_the_file(tmp_path: Path) -> None:
    file = write_vllm(tmp_path / "a.json")
    assert len(read_runs([file], "vllm")) == 1
    with pytest.raises(ImportFileError, match=r"is not a file of guidellm, but of vllm bench serve"):
        read_runs([file], "guidellm")
    with pytest.raises(
        ImportFileError, match=r"a script \(its key 'llem_run' is missing\), but of vllm bench serve"
    ):
        read_runs([file], "own")


def test_records_of_another_run_are_refused(tmp_path: Path) -> None:
    export = json.loads((GOLDEN / "aiperf_0.13.0.json").read_text())
    export["request_count"]["avg"] = 2
    (file := tmp_path / "export.json").write_text(json.dumps(export))
    with pytest.raises(ImportFileError, match="are not of one run: 20 records for 2 requests"):
        read_runs([file, GOLDEN / "aiperf_0.13.0.jsonl"])


def test_formats_have_the_same_names_everywhere() -> None:
    assert set(import_.FORMATS) == set(get_args(FileFormat)) == FORMATS.keys()


def test_appended_runs_of_vllm_are_runs_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "appended.json"
    file.write_text("\n".join(json.dumps(vllm_result(seed=seed)) for seed in range(3)))
    assert len(read_runs([file])) == 3
