"""Servers over the items of a session: which ones share a server, and what each of pytest's options means then."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.isolation.model_server import answers, free_port
from tests.conftest import OTHER_PLUGINS, Results, RunPytest
from tests.support.load_studies import patient, processes_in, result_of, write_load_study
from tests.support.marks import slow
from tests.support.serving import all_in_flight, entries, mock_server

SWEEP = {"load.concurrency": [1, 2, 3]}


@pytest.fixture(autouse=True)
def folder(pytester: pytest.Pytester) -> Path:
    """The folder of the study."""
    return pytester.path


@pytest.fixture
def run_pytest(run_pytest: RunPytest, pytester: pytest.Pytester) -> RunPytest:
    """Run pytest as the fixture of all tests does, and again if the machine was too busy."""
    return patient(run_pytest, pytester.path)


@pytest.fixture
def newest(pytester: pytest.Pytester) -> Callable[[], Results]:
    """Return a function that returns the results of the newest run."""

    class Newest(Results):
        @property
        def directory(self) -> Path:
            return max(
                (one for one in self.root.iterdir() if one.is_dir()), key=lambda one: one.stat().st_ctime_ns
            )

    return lambda: Newest(pytester.path / "results")


def servers(results: Results) -> list[tuple[str, int]]:
    """Return the server's id and the position of each completed experiment, in order of measurement."""
    found = [result_of(results, one) for one in results.manifest["experiments"] if one["status"] == "completed"]
    found.sort(key=lambda one: str(one["started_at"]))
    return [(one["server"]["id"], one["server"]["position"]) for one in found]


def groups(results: Results) -> list[list[int]]:
    """Return the positions on each server."""
    positions: dict[str, list[int]] = {}
    for server, position in servers(results):
        positions.setdefault(server, []).append(position)
    return list(positions.values())


@pytest.mark.parametrize(
    ("execution", "expected"),
    [({"n_cycles": 2}, [[1, 2, 3], [1, 2, 3]]), slow({"server_reuse": "never"}, [[1], [1], [1]])],
    ids=["load", "never"],
)
def test_load_points_of_a_cycle_share_a_server(
    run_pytest: RunPytest, results: Results, folder: Path, execution: Any, expected: Any
) -> None:
    write_load_study(folder, sweep=SWEEP, execution=execution)
    run_pytest().assert_outcomes(passed=sum(map(len, expected)))
    assert groups(results) == expected
    protocol = results.study_result["measurement_protocol"]
    assert protocol["servers"].startswith(
        "a fresh server for each" if len(expected) == 2 else "a fresh server for every"
    )
    assert protocol["window"].startswith("the steady state")
    assert not processes_in(folder)


def test_points_that_differ_in_more_than_load_have_own_servers(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    sweep = {"max_output_tokens": [4, 8], "load.concurrency": [1, 2]}
    write_load_study(folder, sweep=sweep, execution={"cycle_order": "shuffled"})
    run_pytest().assert_outcomes(passed=4)
    assert groups(results) == [[1, 2], [1, 2]]


def test_selected_point_starts_its_own_server(run_pytest: RunPytest, results: Results, folder: Path) -> None:
    write_load_study(folder, sweep=SWEEP)
    run_pytest("-k", "concurrency=2").assert_outcomes(passed=1, deselected=2)
    assert groups(results) == [[1]]


@pytest.mark.slow
def test_last_failed_measures_the_failed_point_on_a_server_of_its_own(
    run_pytest: RunPytest, newest: Callable[[], Results], folder: Path
) -> None:
    write_load_study(folder, "--once", "once", "--exit-starting=5", sweep=SWEEP)
    run_pytest().assert_outcomes(passed=2, failed=1)
    assert groups(newest()) == [[1, 2]]
    run_pytest("--lf").assert_outcomes(passed=1)
    assert groups(newest()) == [[1]]


def test_exitfirst_stops_the_server(run_pytest: RunPytest, results: Results, folder: Path) -> None:
    write_load_study(folder, "--error-every=3", sweep={"load.concurrency": [1, 2]})
    run_pytest("-x").assert_outcomes(failed=1)
    assert [*results.statuses().values()] == ["failed", "pending"]
    assert not processes_in(folder)


@pytest.mark.slow
def test_resume_starts_a_server_for_what_is_missing(
    run_pytest: RunPytest, newest: Callable[[], Results], folder: Path
) -> None:
    write_load_study(folder, "--once", "once", "--exit-starting=5", sweep=SWEEP)
    run_pytest().assert_outcomes(passed=2, failed=1)
    [server] = {server for server, _ in servers(newest())}
    run_pytest("--llem-resume").assert_outcomes(passed=3)
    resumed = servers(newest())
    assert sorted(position for _, position in resumed) == [1, 1, 2]
    assert len({one for one, _ in resumed} - {server}) == 1
    run_pytest("--llem-resume-from", newest().directory).assert_outcomes(passed=3)
    assert set(servers(newest())) == set(resumed), "nothing is measured again"


def test_rerun_of_a_failed_point_has_a_fresh_server(
    run_pytest: RunPytest, results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = " ".join(f"-p no:{name}" for name in OTHER_PLUGINS if name != "rerunfailures")
    monkeypatch.setenv("PYTEST_ADDOPTS", others)
    write_load_study(folder, "--once", "once", "--error-every=4", sweep={"load.concurrency": [1, 2]})
    assert run_pytest("--reruns=1").parseoutcomes() == {"passed": 2, "rerun": 1}
    assert sorted(position for _, position in servers(results)) == [1, 2]


@pytest.mark.slow
def test_deadline_ends_the_experiment_and_its_server(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    """A stalled request would have ten minutes."""
    write_load_study(folder, "--once", "once", "--stall-after=2", sweep={"load.concurrency": [1, 2]})
    run = run_pytest("--llem-timeout=5")
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["timeout while *: not finished after 5 s (raise --llem-timeout, *"])
    assert groups(results) == [[1]]


def prompts(log: Path) -> list[Any]:
    """Return the prompts in a server's log."""
    return [one["prompt"] for one in entries(log)]


def test_prompts_of_a_server_are_distinct_and_the_same_in_each_run(run_pytest: RunPytest, folder: Path) -> None:
    seen = []
    for run in ("first", "second"):
        log = folder / run
        sweep = {"load.concurrency": [1, 3]}
        write_load_study(folder, "--log-file", str(log), sweep=sweep, warmup={"n_warmup": 3})
        run_pytest().assert_outcomes(passed=2)
        seen.append([tuple(one) for one in prompts(log)])
    assert all(len(set(one)) == len(one) > 10 for one in seen)
    common = set(seen[0]) & set(seen[1])
    assert len(common) == min(map(len, seen)), "how many are sent depends on the server's speed"


def test_repeated_prompts_are_n_ones(run_pytest: RunPytest, folder: Path) -> None:
    log = folder / "log"
    write_load_study(folder, "--log-file", str(log), load={"concurrency": 2, "prompts": "repeated"})
    run_pytest().assert_outcomes(passed=1)
    assert len({tuple(one) for one in prompts(log)}) == 4


def test_dataset_that_is_shorter_than_its_load_is_an_error(run_pytest: RunPytest, folder: Path) -> None:
    lines = [f"prompt number {number}" for number in range(8)]
    (folder / "prompts.txt").write_text("\n".join(lines))
    log = folder / "log"
    options = ("--log-file", str(log), "--step-ms", "1+0")
    texts: dict[str, Any] = {"dataset": "prompts.txt", "server": {"vocab_size": None}, "max_input_tokens": None}
    write_load_study(folder, *options, **texts)
    run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(
        [
            "load while *: the dataset has 8 prompts, and the server has got them all: use a larger dataset, or "
            "load.prompts: repeated"
        ]
    )
    assert prompts(log)[:7] == lines[:7]
    log.unlink()
    write_load_study(folder, *options, **texts, n=8, load={"concurrency": 1, "prompts": "repeated"})
    run_pytest().assert_outcomes(passed=1)
    assert set(prompts(log)) == set(lines)


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        ({}, (), "the study names no model"),
        ({"model": "m"}, ("--log-file", "{model}.log"), "no tokenizer of model 'm' on this machine"),
    ],
)
def test_unknown_vocabulary_is_reported_with_the_reason(
    run_pytest: RunPytest, folder: Path, given: dict[str, str], options: tuple[str, ...], reason: str
) -> None:
    write_load_study(folder, *options, server={"vocab_size": None}, **given)
    run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines([f"preflight: *vocabulary is not known ({reason}): give server.vocab_size, or *"])


def test_conversations_are_sent_turn_by_turn_with_the_answers(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    said = [("human", "what is 1"), ("gpt", "one"), ("human", "and 2"), ("gpt", "two")]
    talk = {"conversations": [{"from": who, "value": text} for who, text in said]}
    (folder / "talks.jsonl").write_text("\n".join([json.dumps(talk)] * 200))
    log = folder / "log"
    write_load_study(
        folder,
        *("--log-file", str(log)),
        dataset="talks.jsonl",
        server={"api": "chat", "vocab_size": None},
        max_input_tokens=None,
        max_output_tokens=2,
    )
    run_pytest().assert_outcomes(passed=1)
    first, second = prompts(log)[:2]
    assert first == [{"role": "user", "content": "what is 1"}]
    assert [one["role"] for one in second] == ["user", "assistant", "user"]
    assert (second[0], second[2]["content"]) == (first[0], "and 2")
    assert len(second[1]["content"].split()) == 2, "the server's own answer"
    result = result_of(results, results.manifest["experiments"][0])
    assert result["load"]["client_output_tokens"] == 2 * result["load"]["sent"]


@pytest.mark.slow
def test_api_key_comes_from_the_environment(
    run_pytest: RunPytest, results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "key").write_text("secret")
    write_load_study(folder, "--key-file", str(folder / "key"), server={"api_key_env": "MOCK_KEY"})
    run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*server.api_key_env: the environment variable MOCK_KEY is not set"])
    monkeypatch.setenv("MOCK_KEY", "wrong")
    run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["preflight: server.api_key_env: the server refuses the key in MOCK_KEY (HTTP 401)"])
    monkeypatch.setenv("MOCK_KEY", "secret")
    run_pytest().assert_outcomes(passed=1)
    written = [one.read_bytes() for one in results.root.rglob("*") if one.is_file()]
    assert not any(b"secret" in content for content in written)


def test_running_server_is_measured_labelled_and_not_stopped(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    with mock_server() as url:
        write_load_study(folder, server={"command": None, "url": url}, sweep=SWEEP)
        run = run_pytest()
        run.assert_outcomes(passed=3)
        assert answers(url, "/health")
    run.stdout.fnmatch_lines(["note: *the server ran already: it is not a fresh process*"])
    assert groups(results) == [[1, 2, 3]]
    assert results.study_result["measurement_protocol"]["servers"] == "a server that ran before serves all cycles"
    result = result_of(results, results.manifest["experiments"][0])
    assert (result["server"]["attached"], result["server"]["command"]) == (True, None)
    assert result["metrics"]["load_seconds"]["value"] is None


def test_url_without_a_server_is_an_error(run_pytest: RunPytest, folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    write_load_study(folder, server={"command": None, "url": url})
    run = run_pytest()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines([f"preflight: server.url: {url}/health does not answer with status 200: start *"])


@pytest.mark.slow
def test_slots_of_a_study_start_over_one_latency(run_pytest: RunPytest, folder: Path) -> None:
    log = folder / "log"
    write_load_study(folder, "--step-ms", "8+0", "--log-file", str(log), load={"concurrency": 8})
    run_pytest().assert_outcomes(passed=1)
    spans = [(one["received"], one["tokens"][-1]) for one in entries(log)]
    latency = min(ended - received for received, ended in spans)
    assert all_in_flight(spans, 8) - min(ended for _, ended in spans) >= 0.8 * latency


@pytest.mark.slow
def test_rate_above_capacity_fails_with_both_rates(run_pytest: RunPytest, folder: Path) -> None:
    """One request at a time takes 0.05 s, so that 20 a second are served. Its queue is not waited for."""
    log = folder / "log"
    write_load_study(
        folder,
        *("--step-ms", "5+0", "--max-batch", "1", "--log-file", str(log)),
        load={"rate": 60, "arrival": "constant", "request_timeout_seconds": 60},
        max_output_tokens=10,
        measurement={"min_window_seconds": 3},
    )
    run = run_pytest()
    run.assert_outcomes(failed=1)
    [line] = [line for line in run.outlines if line.startswith("load while measuring: ")]
    rates = re.search(r"not steady: requests in flight grew .* while (\S+) requests/s were .* (\S+) served", line)
    assert rates is not None
    # 60 and 20, unless the machine pauses.
    assert 61 >= float(rates[1]) > float(rates[2])
    assert 50 < len(prompts(log)) < 120, "of about 200 that were sent"


def test_queue_time_of_the_servers_counters_is_a_mean(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    """With one request at a time, two in flight wait for each other: the TTFT is nearly all queue."""
    write_load_study(
        folder,
        *("--step-ms", "5+0", "--max-batch", "1"),
        sweep={"server.metrics": ["/metrics", None]},
        load={"concurrency": 2},
    )
    run_pytest().assert_outcomes(passed=2)
    known, unknown = (result_of(results, one)["metrics"] for one in results.manifest["experiments"])
    assert 0.7 * known["ttft_p50_ms"]["value"] < known["queue_mean_ms"]["value"] < known["ttft_p99_ms"]["value"]
    assert known["queue_p50_ms"]["value"] is None
    assert unknown["queue_mean_ms"]["value"] is None
    assert "do not report the time in its queue" in unknown["queue_mean_ms"]["reason"]


@pytest.mark.slow
def test_search_finds_the_largest_concurrency_within_the_slo(
    run_pytest: RunPytest, results: Results, folder: Path
) -> None:
    """An output token takes 4 + 1 · concurrency ms: 10 is the last within 14.5 ms."""
    write_load_study(
        folder,
        *("--step-ms", "4+1"),
        load={"concurrency": "auto", "slo": {"tpot_ms": 14.5}, "search": {"high": 64}},
        max_output_tokens=48,
        measurement={"min_window_seconds": 1},
    )
    run_pytest().assert_outcomes(passed=1)
    load = result_of(results, results.manifest["experiments"][0])["load"]
    assert load["concurrency"] == 10
    assert [probe["load"] for probe in load["probes"]] == [1, 2, 4, 8, 16, 12, 10, 11]
    assert [probe["within_slo"] for probe in load["probes"]] == [True] * 4 + [False] * 2 + [True, False]


@pytest.mark.slow
def test_default_gate_of_a_rate_judges_tpot_if_tokens_arrive_together(
    run_pytest: RunPytest, newest: Callable[[], Results], folder: Path
) -> None:
    """As of vLLM, which joins 1 to 2 % of the tokens. The tables name the metric that was judged."""
    write_load_study(
        folder,
        *("--step-ms", "20+0", "--merge-every", "7"),
        server={"preset": "vllm"},
        load={"rate": 100},
        measurement={"min_window_seconds": 1.5},
        execution={"n_cycles": 2},
    )
    run_pytest("--llem-save=main", "--llem-save-force").assert_outcomes(passed=2)
    run = run_pytest("--llem-baseline=main", "--llem-html=page.html")
    table = ["* llem: load against main *", "*tpot_p99_ms *"]
    run.stdout.fnmatch_lines(["*of tpot_p99_ms if cycles vary by *", *table])
    run.stdout.fnmatch_lines(["judged: tpot_p99_ms in place of itl_p99_ms, which a side does not know"])
    run.stdout.no_re_match_line(r"\s*itl_p99_ms .*")
    (point,) = StudyResult.load(newest().directory).points
    assert point.metrics["itl_p99_ms"].mean is None
    (gate,) = (one for one in point.verdicts if one.id.startswith("itl_p99_ms"))
    assert (gate.metric, gate.mean) == ("tpot_p99_ms", point.metrics["tpot_p99_ms"].mean)
    assert gate.verdict != "NOT JUDGED"
    assert ">tpot_p99_ms<" in (folder / "page.html").read_text()


KILL_ONE_WORKER = """
import os, pathlib
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    mark = pathlib.Path("killed")
    if "concurrency=2" in item.nodeid and not mark.exists():
        mark.touch()
        os._exit(1)
"""


@pytest.mark.parametrize("workers", ["1", slow("2")])
def test_load_points_go_on_after_the_death_of_an_xdist_worker(
    run_pytest: RunPytest, results: Results, folder: Path, workers: str
) -> None:
    (folder / "conftest.py").write_text(KILL_ONE_WORKER)
    write_load_study(folder, sweep=SWEEP)
    run_pytest("-n", workers).assert_outcomes(passed=2, failed=1)
    assert len(servers(results)) == 2, "the one of the dead worker, and another one for the load after it"
    assert processes_in(folder) == []
