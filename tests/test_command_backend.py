"""``backend: command``: a command of the user's as the experiment of a study."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from pytest_llem import ExperimentConfig, run_experiment
from pytest_llem.cli import main
from pytest_llem.engines.protocol import EngineCrashError, PreflightError
from pytest_llem.engines.shipped import THIS_ENVIRONMENT, unmet_by_command
from pytest_llem.importers.reading import ImportFileError
from pytest_llem.measurement.command import CommandFailedError
from pytest_llem.planning.plan import whole_cycles_reason
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.study.substitution import PlaceholderError, Substitution
from tests.conftest import Results, RunPytest
from tests.support import mini_bench
from tests.support.imports import vllm_result
from tests.support.narrow import not_none

WATTMETER = Path(__file__).parent / "support" / "wattmeter"
BENCH = ["{python}", mini_bench.__file__, "{out}"]

RunStudy = Callable[..., pytest.RunResult]


def _config(*run: str, **command: Any) -> ExperimentConfig:
    fields = {"backend": "command", "command": {"run": list(run), **command}, "energy": {"backend": None}}
    return ExperimentConfig.model_validate(fields)


def _shell(script: str, **command: Any) -> ExperimentConfig:
    return _config("sh", "-c", script, "sh", "{out}", **command)


@pytest.fixture
def run_study(pytester: pytest.Pytester, run_pytest: RunPytest) -> RunStudy:
    """Return a function that runs a study of the command ``mini_bench`` with changed fields."""

    def run(*options: str, arguments: tuple[str, ...] = ("--made-up",), **changes: Any) -> pytest.RunResult:
        command = {"run": [*BENCH, *arguments], **changes.pop("command", {})}
        execution = {"n_cycles": 2, "experiment_gap_seconds": 0, "contended_retries": 0}
        study = {"backend": "command", "command": command, "execution": execution, "energy": {"backend": None}}
        study |= changes
        pytester.path.joinpath("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return run_pytest(*options)

    return run


def test_sweep_of_a_command_has_its_metrics(run_study: RunStudy, results: Results) -> None:
    arguments = ("--made-up", "--slots", "{slots}", "--requests", "8")
    done = run_study(arguments=arguments, command={"slots": 1}, sweep={"command.slots": [1, 2]})
    done.assert_outcomes(passed=4)
    points = results.study_result["points"]
    assert [point["id"] for point in points] == ["slots=1", "slots=2"]
    rates = [point["metrics"]["output_tokens_per_second"]["mean"] for point in points]
    assert rates == [pytest.approx(100), pytest.approx(200)]
    entry = results.manifest["experiments"][0]
    result = ExperimentResult.model_validate_json((results.directory / entry["result_file"]).read_text())
    assert result.imported is not None
    assert (result.imported.tool, result.imported.rates) == ("mini_bench", "steady state")
    assert result.effective_config["precision"] is None
    assert result.effective_config["command"]["slots"] in (1, 2)
    assert (results.directory / entry["result_file"]).with_suffix(".requests.csv").is_file()


def test_energy_is_that_of_the_steady_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(WATTMETER)
    monkeypatch.setenv("WATTMETER_SHOWS", "100")
    config = _config(*BENCH, "--startup", "1.5", "--step", "0.02", "--requests", "30")
    result = run_experiment({**config.model_dump(), "energy": {"backend": "wattmeter"}})
    found = {name: one.value for name, one in result.metrics.items()}
    # 100 W, of which each of 2 slots gives a token in 20 ms, or later if the machine pauses. With the start-up, it
    # would be twice as much.
    token_j = not_none(found["energy_per_output_token_j"])
    assert 0.9 <= token_j <= 1.5 * 100 / not_none(found["output_tokens_per_second"])
    assert found["energy_per_request_j"] == pytest.approx(5 * token_j, rel=0.05)
    assert found["energy_j"] == pytest.approx(30 * not_none(found["energy_per_request_j"]))
    assert found["mean_power_w"] == pytest.approx(100, rel=0.01)
    assert result.metrics["energy_per_output_token_j"].boundary == "wall"
    assert result.window.window_seconds >= 3
    assert "whole_run_energy" not in {one.code for one in result.warnings}


def test_energy_of_a_short_command_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(WATTMETER)
    fields = {**_config(*BENCH).model_dump(), "energy": {"backend": "wattmeter"}}
    result = run_experiment(fields)
    energy = result.metrics["energy_j"].value
    assert energy == pytest.approx(result.window.window_energy_j)
    assert "whole_run_energy" in {one.code for one in result.warnings}


def test_named_meter_that_cannot_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(WATTMETER)
    monkeypatch.setenv("WATTMETER_FAILS", "open")
    with pytest.raises(PreflightError, match="meter 'wattmeter' cannot be used: ConnectionError: open"):
        run_experiment({**_config(*BENCH).model_dump(), "energy": {"backend": "wattmeter"}})


def test_energy_per_request_needs_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(WATTMETER)
    fields = {"run": ["echo", '{{"llem_run": 1, "seconds": 1, "metrics": {{"output_tokens": 10}}}}']}
    given = {"backend": "command", "command": fields, "energy": {"backend": "wattmeter"}}
    metrics = run_experiment(given).metrics
    assert metrics["energy_per_output_token_j"].value == pytest.approx((metrics["energy_j"].value or 0) / 10)
    assert metrics["energy_per_request_j"].reason == "not in result.json of script: the number of requests"


def test_standard_output_is_the_file_without_a_placeholder(tmp_path: Path) -> None:
    (file := tmp_path / "result.json").write_text(json.dumps(vllm_result()))
    result = run_experiment(_config("cat", str(file)))
    assert result.imported is not None
    assert result.imported.tool == "vllm bench serve"


def test_folder_that_a_command_writes_is_read(tmp_path: Path) -> None:
    (file := tmp_path / "result.json").write_text(json.dumps(vllm_result()))
    assert run_experiment(_shell(f"mkdir $1 && cp {file} $1/any.json")).metrics["ttft_p50_ms"].value


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (_shell("exit 3"), CommandFailedError, "sh ended with exit status 3: see its output"),
        (_shell("kill -9 $$"), EngineCrashError, "sh was ended by signal 9"),
        (_shell("true"), CommandFailedError, "sh did not write {out}"),
        (_shell("echo hello > $1"), ImportFileError, "not valid JSON"),
        (_config("/no/such", "{out}"), PreflightError, "'/no/such' cannot be run: No such file"),
    ],
    ids=["status", "signal", "no file", "no JSON", "no program"],
)
def test_command_that_fails_is_an_error(config: ExperimentConfig, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        run_experiment(config)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "command: {run: [a, '{slot}'], slots: 1}",
            ":2:20: command.run[1]: unknown placeholder '{slot}' (did you",
        ),
        ("command: {run: [a, '{']}", ":2:20: command.run[1]: a single '{' (got '{'): write {{ and }} for braces"),
        ("command: {run: [a], slots: 1}", ":2:21: command.slots: does not reach the command: write {slots} in"),
        ("command: {run: [a]}\nn: 5", ":3:1: n: does not reach the command: write {n} in command.run, or leave"),
        ("command: {run: [a]}\ndecoder: {top_p: 0.5}", ":3:11: decoder.top_p: does not reach the command"),
        ("command: {run: [a], format: vlm}", ":2:21: command.format: must be one of 'vllm', 'aiperf'"),
        ("command: {run: []}", ":2:11: command.run: must not be empty"),
        ("", ":1:1: command.run: is required"),
        ("command: {run: [a]}\nsweep: {command.rate: [1]}", "command.rate: does not reach the command"),
    ],
)
def test_mistake_in_a_command_is_located(text: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "study.yaml").write_text(f"backend: command\n{text}\n")
    with pytest.raises(StudyError) as raised:
        load_study(file)
    [problem] = raised.value.problems
    assert message in str(problem)


def test_missing_program_is_found_before_the_run(run_study: RunStudy) -> None:
    done = run_study(command={"run": ["no-such-program", "{out}"]})
    done.assert_outcomes(failed=2)
    assert "command.run: program 'no-such-program' not found in PATH" in done.stdout.str()


def test_python_placeholder_needs_no_python_in_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not [*unmet_by_command(_config("{python}", "bench.py"), THIS_ENVIRONMENT)]


def test_fields_of_a_study_fill_placeholders(run_study: RunStudy) -> None:
    arguments = ("--made-up", "--requests", "{n}", "--step", "{decoder.temperature}")
    run_study(arguments=arguments, n=6, decoder={"temperature": 0.01}).assert_outcomes(passed=2)


def test_cycles_of_one_server_are_not_compared(run_study: RunStudy) -> None:
    run_study("--llem-save=main").assert_outcomes(passed=2)
    done = run_study("--llem-baseline=main")
    done.assert_outcomes(passed=2, skipped=3)
    assert "2 runs of one server are one cycle and no repetitions" in done.stdout.str()


@pytest.mark.slow
def test_cycles_of_fresh_servers_are_compared(run_study: RunStudy, results: Results) -> None:
    command = {"fresh_server": True}
    run_study("--llem-save=main", "--llem-save-force", arguments=("--own-server",), command=command)
    done = run_study("--llem-baseline=main", arguments=("--own-server",), command=command)
    assert "repetitions" not in done.stdout.str()
    point = results.root.joinpath(sorted(one.name for one in results.root.iterdir())[-1], "study_result.json")
    assert json.loads(point.read_text())["points"][0]["not_repeated"] is None


def test_runs_of_a_command_are_resumed(run_study: RunStudy) -> None:
    run_study("-k", "cycle=1").assert_outcomes(passed=1, deselected=1)
    done = run_study("--llem-resume")
    done.assert_outcomes(passed=2)
    assert "2 of 2 experiments completed (1 of them replayed)" in done.stdout.str()


def test_budgets_of_a_command_are_judged(run_study: RunStudy) -> None:
    done = run_study(budgets={"ttft_p50_ms": 5, "e2e_p50_ms": 1000})
    done.assert_outcomes(passed=3, failed=1)


def test_commands_alternate_cycle_by_cycle() -> None:
    assert whole_cycles_reason(_config("a"), cast(Any, None), cast(Any, None)) == "a command runs as a whole"


@pytest.mark.slow
def test_ten_starts_against_ten_find_a_delay_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, step in (("main", "0.02"), ("same", "0.02"), ("slow", "0.04")):
        files = []
        for start in range(10):
            files.append(f"{name}-{start}.json")
            command = [sys.executable, mini_bench.__file__, files[-1], "--own-server", "--step", step]
            subprocess.run(command, check=True)
        assert main(["import", *files, "-o", name, "--cycle-per", "file"]) == 0
    verdicts = {}
    for name in ("same", "slow"):
        capsys.readouterr()
        main(["compare", "main", name, "--format", "json"])
        found = json.loads(capsys.readouterr().out)["verdicts"]
        verdicts[name] = {one["metric"]: one["verdict"] for one in found}
    assert "REGRESSION" not in verdicts["same"].values()
    assert verdicts["slow"]["output_tokens_per_second"] == verdicts["slow"]["ttft_p50_ms"] == "REGRESSION"


def _substitution(**fields: Any) -> Substitution:
    given = {
        "model": "smol",
        "backend": "command",
        "command": {"run": ["x"], "rate": 4.0, "flag": True, "model": "own"},
    }
    return Substitution(ExperimentConfig.model_validate({**given, **fields}), "command", out="/tmp/o.json")


@pytest.mark.parametrize(
    ("argument", "filled"),
    [
        ("plain", "plain"),
        ("{model}", "smol"),  # a field of the study precedes one of the section
        ("{command.model}", "own"),
        ("--rate={rate}", "--rate=4.0"),
        ("{command.rate}/{out}", "4.0//tmp/o.json"),
        ("{flag}", "true"),
        ("{decoder.temperature} {temperature}", "1.0 1.0"),
        ('{{"ignore_eos": {flag}}}', '{"ignore_eos": true}'),
        ("{{rate}}", "{rate}"),
    ],
)
def test_placeholders_are_filled(argument: str, filled: str) -> None:
    assert _substitution().fill([argument]) == [filled]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{rat}", "unknown placeholder '{rat}' (did you mean 'rate'?)"),
        ('{"a": 1}', "unknown placeholder '{\"a\": 1}': it has to be a field of the experiment; write {{ and }}"),
        ("{enabled}", "unknown placeholder '{enabled}'"),  # of several sections
        ("a}", "a single '}' (got 'a}'): write {{ and }} for braces"),
        ("{pytorch}", "placeholder '{pytorch}' has no value: pytorch is null"),
    ],
)
def test_placeholder_that_cannot_be_filled_is_located(argument: str, message: str) -> None:
    with pytest.raises(PlaceholderError) as raised:
        _substitution().fill(["fine", argument])
    assert str(raised.value).startswith(message)
    assert raised.value.index == 1


def test_fields_of_placeholders_are_named_in_full() -> None:
    found = _substitution().fields_in(["{rate}", "{temperature}x{model}", "{out}", "{{n}}"])
    assert found == {"command.rate", "decoder.temperature", "model"}
