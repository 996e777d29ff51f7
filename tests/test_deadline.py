"""The deadline of an experiment: its computation, its place in the plan, its effect and its overrides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.execution import experiment
from pytest_llem.isolation.launcher import Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.planning.deadline import deadline_seconds, max_load_seconds
from pytest_llem.planning.estimate import seconds
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.planning.model_files import Footprint, from_config
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.execution import ExecutionConfig
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow

LLAMA_70B = from_config(
    {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
LLAMA_1B = from_config(
    {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
)
CPU = Host(64 * 2**30)
GPU = Host(2**40, (GpuCapacity("g", 80 * 2**30, (9, 0)),))
GPUS = Host(2**40, GPU.gpus * 4)
NEVER = {"enabled": False}


def deadline(model: Footprint | None, host: Host = GPU, timeout: float | None = None, /, **changes: Any) -> float:
    execution = ExecutionConfig(experiment_timeout_seconds=timeout)
    config = ExperimentConfig.model_validate({"model": "m", **changes})
    return deadline_seconds(config, execution, _needs(config, model), model, host)


def _needs(config: ExperimentConfig, model: Footprint | None) -> Needs:
    return shipped_needs(config, model.parameters if model else None) or Needs()


class TestComputed:
    def test_loading_70_billion_weights_gets_half_an_hour(self) -> None:
        least = {"n": 1, "max_output_tokens": 1, "warmup": NEVER, "baseline": NEVER}
        assert LLAMA_70B.parameters == pytest.approx(70.6e9, rel=0.01)
        loading = deadline(LLAMA_70B, **least) - deadline(LLAMA_1B, **least)
        assert 29 * 60 <= loading <= 31 * 60

    def test_deadline_is_the_sum_of_its_parts(self) -> None:
        # With one weight and no work, the deadline is 5 min plus window, thermal floor and idle power.
        nothing = from_config(
            dict.fromkeys(
                ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), 1
            )
        )
        least = {"n": 1, "max_input_tokens": 1, "max_output_tokens": 1, "measurement": {"min_window_seconds": 55}}
        assert deadline(nothing, **least, warmup=NEVER, baseline=NEVER) == 360
        assert deadline(nothing, **least, warmup=NEVER, baseline={"duration_seconds": 50}) == 420
        floor = {"thermal_floor_seconds": 600}
        assert deadline(nothing, **least, warmup=floor, baseline=NEVER) == 360 + 600
        assert deadline(nothing, **least, warmup={**floor, "enabled": False}, baseline=NEVER) == 360
        compiled = {"pytorch": {"torch_compile": True}}
        assert deadline(nothing, **least, warmup=NEVER, baseline=NEVER, **compiled) == 360 + 1800
        # An engine other than pytorch may compile by itself.
        assert deadline(nothing, **least, warmup=NEVER, baseline=NEVER, backend="other") == 360 + 1800

    @pytest.mark.parametrize(
        ("model", "changes", "minutes"),
        [
            (LLAMA_1B, {}, 6),
            (LLAMA_1B, {"backend": "vllm"}, 36),
            (LLAMA_70B, {}, 35),
            (None, {}, None),
            (LLAMA_1B, {"backend": "server", "server": {"url": "http://127.0.0.1:1"}, "load": {"rate": 1}}, None),
        ],
    )
    def test_load_has_its_part_of_the_deadline(
        self, model: Footprint | None, changes: dict[str, Any], minutes: float | None
    ) -> None:
        config = ExperimentConfig.model_validate({"model": "m", **changes})
        found = max_load_seconds(config, ExecutionConfig(), _needs(config, model), model)
        assert found == (None if minutes is None else 60 * minutes)
        given = ExecutionConfig(experiment_timeout_seconds=7200)
        assert max_load_seconds(config, given, _needs(config, model), model) is None

    @pytest.mark.parametrize("host", [CPU, GPU])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"n": 1},
            {"n": 5000, "pytorch": {"batch_size": 8}},
            {"max_output_tokens": 2000},
            {"warmup": {"n_warmup": 100}},
            {"warmup": {"thermal_floor_seconds": 900.0}},
            {"measurement": {"min_window_seconds": 3600.0}},
            {"pytorch": {"load_in_4bit": True, "num_beams": 4}},
        ],
    )
    def test_deadline_is_a_multiple_of_the_estimate(self, host: Host, changes: dict[str, Any]) -> None:
        config = ExperimentConfig.model_validate({"model": "m", **changes})
        expected = seconds(
            config, ExecutionConfig(experiment_gap_seconds=0.0), _needs(config, LLAMA_1B), LLAMA_1B, host
        )
        found = deadline(LLAMA_1B, host, **changes)
        assert found >= expected + 240
        asked = 0.0
        if config.warmup.thermal_floor_seconds or config.measurement.min_window_seconds > 10:
            asked = config.warmup.thermal_floor_seconds + config.measurement.min_window_seconds
        assert found - asked >= 4 * (expected - asked)
        assert found % 60 == 0

    def test_deadline_grows_with_prompts_tokens_and_warm_up(self) -> None:
        usual = deadline(LLAMA_1B)
        assert deadline(LLAMA_1B, n=1000) > usual
        assert deadline(LLAMA_1B, max_output_tokens=1000) > usual
        assert deadline(LLAMA_1B, max_input_tokens=100_000) > usual
        assert deadline(LLAMA_1B, warmup={"max_prompts": 500}) > usual
        assert deadline(LLAMA_1B, pytorch={"batch_size": 50}) < usual
        assert deadline(LLAMA_1B, CPU) > usual

    def test_quantised_model_is_read_whole(self) -> None:
        least = {"n": 1, "max_output_tokens": 1, "warmup": NEVER}
        four_bit = deadline(LLAMA_70B, **least, pytorch={"load_in_4bit": True})
        assert four_bit == pytest.approx(deadline(LLAMA_70B, **least), rel=0.1)

    @pytest.mark.parametrize(
        "options",
        [
            {"device_map": "cpu"},
            {"device_map": {"model": 0, "lm_head": "cpu"}},
            {"device_map": {"model": "disk"}},
            {"device_map": "auto", "max_memory": {"0": "1GiB", "cpu": "50GiB"}},
        ],
    )
    def test_offloaded_layers_lengthen_the_deadline(self, options: dict[str, Any]) -> None:
        offloaded = deadline(LLAMA_1B, pytorch={"device_map": "auto"})
        assert offloaded == deadline(LLAMA_1B)
        assert deadline(LLAMA_1B, pytorch=options) > 5 * offloaded

    def test_model_larger_than_the_gpu_lengthens_the_deadline(self) -> None:
        spread = {"pytorch": {"device_map": "auto"}}
        assert deadline(LLAMA_70B, GPU, **spread) > 5 * deadline(LLAMA_70B, GPUS, **spread)

    def test_model_of_unknown_size_gets_two_hours_more(self) -> None:
        least = {"n": 1, "warmup": NEVER, "baseline": NEVER, "measurement": {"min_window_seconds": 0}}
        assert deadline(None, **least, max_output_tokens=1) == 7200 + 60  # rounded up to whole minutes
        assert deadline(None, **{**least, "n": 6000}, max_output_tokens=20) == 7200 + 6000
        floored = {**least, "warmup": {"thermal_floor_seconds": 600}}
        assert deadline(None, **floored, max_output_tokens=1) == 7200 + 60 + 600

    def test_deadline_has_a_maximum(self) -> None:
        huge = {"measurement": {"min_window_seconds": 1e308}, "warmup": {"thermal_floor_seconds": 1e308}}
        for model in (None, LLAMA_1B):
            assert deadline(model, **huge, n=10**8, max_output_tokens=10**8) == 315_360_000

    def test_given_timeout_is_the_deadline(self) -> None:
        assert deadline(LLAMA_70B, GPU, 0.5) == deadline(None, CPU, 0.5) == 0.5


TINY = {
    "model": "builtin:tiny-llama",
    "backend": None,
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "sweep": {"n": [1, 2]},
    "execution": {"n_cycles": 1},
}


def line(result: pytest.RunResult) -> str:
    lines = [one for one in result.outlines if one.startswith("llem: ")]
    [found] = [one for one in lines if not one.startswith("llem: warning: ")]  # printed on a busy machine
    return found


class TestInThePlan:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (TINY, " s · deadline 6 min each · needs about 0.5 GiB"),
            ({**TINY, "sweep": {"measurement.min_window_seconds": [0, 600]}}, " · deadline 6–16 min each · "),
            ({**TINY, "sweep": {"measurement.min_window_seconds": [0, 7200]}}, " · deadline 6 min–2.1 h each · "),
            ({**TINY, "sweep": None}, " · deadline 6 min · "),
            ({}, ", time unknown · deadline 2.0 h each · memory unknown"),
            (
                {**TINY, "execution": {"experiment_timeout_seconds": 1234.5}},
                " · deadline 1,234.5 s each (given) · ",
            ),
        ],
        ids=["all equal", "from to", "other unit", "single experiment", "unknown model", "given"],
    )
    def test_plan_shows_the_deadline(
        self, pytester: pytest.Pytester, write_study: WriteStudy, changes: dict[str, Any], text: str
    ) -> None:
        write_study(**changes)
        assert text in line(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only"))

    def test_plan_has_no_deadline_where_nothing_is_started(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(runners={"noop": "docker"})
        assert "deadline" not in line(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only"))

    def test_plan_file_has_the_deadline_of_each_experiment(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(
            **{
                **TINY,
                "sweep": {"measurement.min_window_seconds": [0, 600]},
                "experiments": [{"backend": "tensorrt"}, {"n": 7}],
                "skip": [{"where": {"n": 7}}],
            }
        )
        pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json")
        plan = json.loads((pytester.path / "plan.json").read_text())
        found = {}
        for one in plan["experiments"]:
            config = one["config"]
            found[config["backend"], config["n"], config["measurement"]["min_window_seconds"]] = one[
                "deadline_seconds"
            ]
        assert found == {
            ("pytorch", 2, 0): 360,
            ("pytorch", 2, 600): 960,
            ("tensorrt", 2, 0): None,
            ("pytorch", 7, 0): None,
        }


class TestOption:
    @pytest.mark.parametrize("how", [["--llem-timeout", "90"], ["-o", "llem_timeout=90"]])
    @pytest.mark.parametrize("given", [None, 5])
    def test_option_and_ini_value_win_over_the_study(
        self, pytester: pytest.Pytester, write_study: WriteStudy, how: list[str], given: int | None
    ) -> None:
        write_study(**{**TINY, "execution": {"n_cycles": 1, "experiment_timeout_seconds": given}})
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", *how)
        assert " · deadline 90 s each (given) · " in line(result)

    def test_command_line_wins_over_the_ini_file(self, pytester: pytest.Pytester, write_study: WriteStudy) -> None:
        write_study(**TINY)
        pytester.makeini("[pytest]\nllem_timeout = 90\n")
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-timeout", "0.25")
        assert " · deadline 0.25 s each (given) · " in line(result)

    @pytest.mark.parametrize(
        ("sweep", "workers"),
        [(None, ()), ({"n": [1]}, ()), slow({"n": [1]}, ("-n", "1"))],
        ids=["single", "serial", "xdist"],
    )
    def test_slow_experiment_is_ended_at_the_deadline(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        sweep: dict[str, Any] | None,
        workers: tuple[str, ...],
    ) -> None:
        write_study(noop={"seconds": 5}, n=1, sweep=sweep, execution={"n_cycles": 1})
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-timeout", "0.5", *workers)
        run.assert_outcomes(failed=1)
        error = results.manifest["experiments"][0]["error"]
        assert (error["kind"], error["message"]) == ("timeout", "not finished after 0.5 s")

    @pytest.mark.parametrize("text", ["0", "-1", "soon", "", "nan", "inf", "1e999"])
    def test_invalid_timeout_is_a_usage_error(self, pytester: pytest.Pytester, text: str) -> None:
        result = pytester.runpytest("-p", "llem", f"--llem-timeout={text}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        message = f"must be a number of seconds, greater than 0 (got {text!r})"
        assert f"ERROR: --llem-timeout: {message}" in result.errlines
        if text:  # an empty ini option means that it is not set
            result = pytester.runpytest("-p", "llem", "-o", f"llem_timeout={text}")
            assert f"ERROR: llem_timeout: {message}" in result.errlines


def test_experiment_gets_the_deadline_of_the_plan(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job, timeout: float | None, **_: object) -> Outcome:
        return Outcome(error=ErrorRecord(kind="crash", type="None", message=f"deadline {timeout}"))

    monkeypatch.setattr(experiment, "run_isolated", fail)
    write_study(**{**TINY, "sweep": {"measurement.min_window_seconds": [0, 600]}})
    result = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines_random(["crash: deadline 360.0", "crash: deadline 960.0"])
