"""Output before anything runs: plan lines, ``--llem-plan``, estimates, limits, overrides."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_llem._plugin.options import Settings
from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.execution import plans
from pytest_llem.planning.estimate import (
    FORK_SECONDS,
    STARTUP_SECONDS,
    duration_text,
    idle_power_seconds,
    memory_bytes,
    seconds,
)
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.planning.model_files import from_config, read_footprint
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.config import BaselineConfig, ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.loading import load_study
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow

TINY = {
    "model": "builtin:tiny-llama",
    "backend": None,
    "measurement": {"min_window_seconds": 0},
    "sweep": {"pytorch.use_cache": [True, False], "pytorch.cache_implementation": [None, "static"]},
}


def plan_lines(result: pytest.RunResult) -> list[str]:
    """Return the line that begins with ``llem:`` and the indented lines after it."""
    start = next(i for i, line in enumerate(result.outlines) if line.startswith("llem:"))
    lines = [result.outlines[start]]
    for line in result.outlines[start + 1 :]:
        if not line.startswith("  "):
            break
        lines.append(line)
    return lines


def test_plan_shows_counts_time_and_excluded_combinations(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study(**TINY)
    line, left_out = plan_lines(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only"))
    start, hash_, rest = line.replace("[", "]").split("]")
    assert start == "llem: noop "
    assert len(hash_) == 16
    assert rest.startswith(": 3 points × 2 cycles = 6 experiments, shuffled, about ")
    assert rest.endswith(" · 1 combination left out · needs about 0.5 GiB")
    assert left_out == (
        "  left out: pytorch.use_cache=false-pytorch.cache_implementation=static: "
        "pytorch: cache_implementation 'static' needs use_cache: true"
    )


def test_plan_shows_unknown_estimates_as_unknown(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study()
    [line] = plan_lines(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only"))
    assert line.endswith("8 experiments, shuffled, time unknown · deadline 2.0 h each · memory unknown")


def test_plan_shows_the_number_of_selected_experiments(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**TINY)
    whole = plan_lines(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only"))[0]
    part = plan_lines(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "-k", "cycle=1"))[0]
    assert "6 experiments, shuffled, 3 selected, about " in part
    assert "selected" not in whole


@pytest.mark.parametrize("workers", [[], slow(["-n", "2"])], ids=["serial", "xdist"])
def test_plan_is_printed_once_and_written_before_experiments_run(
    pytester: pytest.Pytester, write_study: WriteStudy, workers: list[str]
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 2})
    result = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-plan", "plan.json", *workers)
    result.assert_outcomes(passed=2)
    [plan] = [index for index, line in enumerate(result.outlines) if line.startswith("llem: noop [")]
    assert plan < next(index for index, line in enumerate(result.outlines) if line.startswith(". llem: 1/2 "))
    assert len(json.loads((pytester.path / "plan.json").read_text())["experiments"]) == 2


def test_quiet_runs_print_no_plan(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**TINY)
    for quiet in ("-q", "-qq"):
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", quiet)
        result.stdout.no_fnmatch_line("*llem:*")


class TestPlanFile:
    def test_plan_file_lists_experiments_in_run_order(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(**TINY)
        pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json")
        plan = json.loads((pytester.path / "plan.json").read_text())
        assert plan["study"] == "noop"
        assert len(plan["study_design_hash"]) == 16
        assert [one["index"] for one in plan["experiments"]] == list(range(6))
        ids = [one["id"] for one in plan["experiments"]]
        shown = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "-q").outlines
        assert [f"study.yaml::experiment[{one}]" for one in ids] == shown[:6]
        first = plan["experiments"][0]
        assert {first["cycle"], len(first["config_hash"])} == {1, 16}
        assert first["config"]["pytorch"]["batch_size"] == 1
        [excluded] = plan["excluded"]
        assert excluded["config"]["pytorch"] == {"use_cache": False, "cache_implementation": "static"}
        assert excluded["reason"] == "pytorch: cache_implementation 'static' needs use_cache: true"
        assert plan["preflight"] == []
        assert plan["estimated_seconds"] > 0
        assert plan["estimated_memory_bytes"] > 2**29

    def test_plan_file_does_not_overwrite_a_study(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        study = write_study("one.study.yaml")
        before = study.read_text()
        run = pytester.runpytest("-p", "llem", "--collect-only", "--llem-plan", "one.study.yaml")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        message = "ERROR: --llem-plan: exists with other content and is not overwritten (got '*/one.study.yaml')"
        run.stderr.fnmatch_lines([message])
        assert study.read_text() == before

    def test_plan_file_lists_only_selected_experiments(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study()
        arguments = ["study.yaml", "-p", "llem", "--collect-only", "--llem-plan", "plan.json", "-k", "size=2"]
        pytester.runpytest(*arguments)
        plan = json.loads((pytester.path / "plan.json").read_text())
        assert len(plan["experiments"]) == 4
        assert all("size=2" in one["id"] for one in plan["experiments"])
        assert plan["estimated_seconds"] is None
        assert plan["estimated_memory_bytes"] is None

    def test_plan_counts_the_start_of_a_forkserver_once(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(**{**TINY, "sweep": {"n": [1, 2, 3]}})
        seconds = {}
        for method in ("spawn", "forkserver"):
            arguments = ["--llem-plan", "plan.json", "--llem-start-method", method]
            pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", *arguments)
            seconds[method] = json.loads((pytester.path / "plan.json").read_text())["estimated_seconds"]
        forks = STARTUP_SECONDS + 6 * FORK_SECONDS
        assert seconds["spawn"] - seconds["forkserver"] == pytest.approx(6 * STARTUP_SECONDS - forks)

    def test_plan_file_of_several_studies_is_a_usage_error(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study("a.yaml", name="a")
        write_study("b.yaml", name="b")
        arguments = ["-p", "llem", "--collect-only", "--llem-plan", "plan.json"]
        result = pytester.runpytest("a.yaml", "b.yaml", *arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: --llem-plan: needs exactly one study, but 2 were collected"])
        pytester.makepyfile("def test(): pass")
        result = pytester.runpytest(*arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: --llem-plan: needs exactly one study, but 0 were collected"])

    @pytest.mark.parametrize("workers", [[], slow(["-n", "1"])], ids=["serial", "xdist"])
    def test_study_options_without_a_study_are_reported(
        self, pytester: pytest.Pytester, workers: list[str]
    ) -> None:
        pytester.makepyfile("def test(): pass")
        asked = ["--llem-save=main", "--llem-baseline=main", "--llem-resume"]
        run = pytester.runpytest_inprocess("-p", "llem", *asked, *workers)
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(
            ["llem: no study was collected: --llem-save, --llem-baseline, --llem-resume had no effect"]
        )

    @pytest.mark.parametrize("workers", [[], slow(["-n", "1"])], ids=["serial", "xdist"])
    def test_a_broken_or_planned_study_counts_as_collected(
        self, pytester: pytest.Pytester, write_study: WriteStudy, workers: list[str]
    ) -> None:
        write_study(sweep={"n": [1]})
        run = pytester.runpytest_inprocess
        asked = ["study.yaml", "-p", "llem", "--llem-resume", *workers]
        looked = run(*asked, "--setup-plan")
        write_study(sweep={"n": "no list"})
        broken = run(*asked)
        broken.assert_outcomes(errors=1)
        assert "no study was collected" not in looked.stdout.str() + broken.stdout.str()

    def test_plan_file_that_cannot_be_written_is_a_usage_error(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(sweep={"n": [1]})
        result = pytester.runpytest("study.yaml", "-p", "llem", "--llem-plan", "no/plan.json")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: --llem-plan: *No such file or directory*"])


BIG = {**TINY, "sweep": {"n": list(range(1, 201))}, "execution": {"n_cycles": 3}}


class TestMaxExperiments:
    def test_too_large_study_is_refused_with_count_and_time(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(**BIG)
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        result.stdout.fnmatch_lines(
            [
                "study.yaml:*:3: execution.n_cycles: makes 600 experiments (200 points × 3 cycles), more than "
                "llem_max_experiments (500); --llem-yes runs them all; they take about *"
            ]
        )

    def test_time_of_an_unknown_model_is_unknown(self, pytester: pytest.Pytester, write_study: WriteStudy) -> None:
        write_study(**{**BIG, "backend": "noop", "model": "none"})
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only")
        result.stdout.fnmatch_lines(["*--llem-yes runs them all; they take an unknown time"])

    def test_llem_yes_lifts_the_limit(self, pytester: pytest.Pytester, write_study: WriteStudy) -> None:
        write_study(**BIG)
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-yes")
        result.stdout.fnmatch_lines(["collected 600 items"])

    def test_ini_option_changes_the_limit(self, pytester: pytest.Pytester, write_study: WriteStudy) -> None:
        write_study(**BIG)
        arguments = ["study.yaml", "-p", "llem", "--collect-only", "-o"]
        pytester.runpytest(*arguments, "llem_max_experiments=600").stdout.fnmatch_lines(["collected 600 items"])
        result = pytester.runpytest(*arguments, "llem_max_experiments=10")
        result.stdout.fnmatch_lines(["*more than llem_max_experiments (10)*"])

    def test_llem_yes_does_not_lift_the_absolute_limit(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        values = list(range(1, 1001))
        write_study(**{**TINY, "sweep": {"n": values, "max_input_tokens": values, "max_output_tokens": values}})
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "--llem-yes")
        result.stdout.fnmatch_lines(
            ["*makes 2,000,000,000 experiments (1,000,000,000 points × 2 cycles), more than the maximum of *"]
        )

    def test_other_errors_are_reported_with_the_limit(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(**BIG, name="a/b")
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only")
        result.stdout.fnmatch_lines(["study.yaml:*: name: must be a name*"])
        result.stdout.fnmatch_lines(["study.yaml:*: execution.n_cycles: makes 600 experiments*"])


def collected(result: pytest.RunResult) -> list[str]:
    return [line.partition("experiment[")[2][:-1] for line in result.outlines if "::experiment[" in line]


class TestOverrides:
    @pytest.mark.parametrize("how", [["--llem-cycles", "3"], ["-o", "llem_cycles=3"]])
    def test_n_cycles_can_be_overridden(
        self, pytester: pytest.Pytester, write_study: WriteStudy, how: list[str]
    ) -> None:
        write_study(sweep={"n": [1]})
        ids = collected(pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "-q", *how))
        assert sorted(ids) == ["n=1-cycle=1", "n=1-cycle=2", "n=1-cycle=3"]

    @pytest.mark.parametrize("how", [["--llem-order", "{}"], ["-o", "llem_order={}"]])
    def test_the_cycle_order_can_be_overridden(
        self, pytester: pytest.Pytester, write_study: WriteStudy, how: list[str]
    ) -> None:
        write_study(sweep={"n": [1, 2]}, execution={"n_cycles": 2, "cycle_order": "shuffled"})
        arguments = ["study.yaml", "-p", "llem", "--collect-only", "-q"]
        sequential, interleaved = (
            collected(pytester.runpytest(*arguments, *(one.format(order) for one in how)))
            for order in ("sequential", "interleaved")
        )
        assert sequential == ["n=1-cycle=1", "n=1-cycle=2", "n=2-cycle=1", "n=2-cycle=2"]
        assert interleaved == ["n=1-cycle=1", "n=2-cycle=1", "n=1-cycle=2", "n=2-cycle=2"]

    def test_the_command_line_wins_over_the_ini_file(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(sweep={"n": [1]})
        pytester.makeini("[pytest]\nllem_cycles = 3\nllem_order = sequential\n")
        arguments = [
            "study.yaml",
            "-p",
            "llem",
            "--collect-only",
            "--llem-cycles",
            "4",
            "--llem-order",
            "interleaved",
        ]
        result = pytester.runpytest(*arguments)
        result.stdout.fnmatch_lines(["llem: *: 1 point × 4 cycles = 4 experiments, interleaved,*"])

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (["--llem-cycles", "0"], "--llem-cycles: must be a whole number, at least 1 (got '0')"),
            (["--llem-cycles", "two"], "--llem-cycles: must be a whole number, at least 1 (got 'two')"),
            (["-o", "llem_cycles=-1"], "llem_cycles: must be a whole number, at least 1 (got '-1')"),
            (
                ["--llem-order", "random"],
                "--llem-order: must be one of sequential, interleaved, shuffled (got 'random')",
            ),
            (["--llem-order", ""], "--llem-order: must be one of sequential, interleaved, shuffled (got '')"),
            (["--llem-plan", ""], "--llem-plan: must not be empty"),
            (["--llem-results-dir", ""], "--llem-results-dir: must not be empty"),
            (["-o", "llem_results_dir="], "llem_results_dir: must not be empty"),
            (
                ["-o", "llem_baseline_dir=~nobody-of-that-name"],
                "llem_baseline_dir: Could not determine home directory. (got '~nobody-of-that-name')",
            ),
            (["-o", "llem_strict=maybe"], "llem_strict: invalid truth value 'maybe'"),
            (["-o", "llem_model_path='"], "llem_model_path: No closing quotation"),
            (["-o", "llem_order=x"], "llem_order: must be one of sequential, interleaved, shuffled (got 'x')"),
            (
                ["-o", "llem_max_experiments=many"],
                "llem_max_experiments: must be a whole number, at least 1 (got 'many')",
            ),
        ],
    )
    def test_invalid_options_are_usage_errors(
        self, pytester: pytest.Pytester, how: list[str], message: str
    ) -> None:
        result = pytester.runpytest("-p", "llem", *how)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"ERROR: {message}" in result.errlines

    @pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 9 reads TOML's own types")
    def test_number_in_a_toml_ini_file_is_a_usage_error(self, pytester: pytest.Pytester) -> None:
        (pytester.path / "pytest.toml").write_text("[pytest]\nllem_cycles = 3\n")
        run = pytester.runpytest("-p", "llem")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["ERROR: llem_cycles: *expects a string, got int: 3"])

    @pytest.mark.parametrize("how", [["--llem-strict"], ["-o", "llem_strict=true"]])
    def test_strict_makes_excluded_combinations_errors(
        self, pytester: pytest.Pytester, write_study: WriteStudy, how: list[str]
    ) -> None:
        write_study(**TINY)
        result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", *how)
        assert result.ret == pytest.ExitCode.INTERRUPTED
        result.stdout.fnmatch_lines(
            ["study.yaml:*:1: sweep: *=false-*=static is excluded, an error with --llem-strict: pytorch: *"]
        )

    @pytest.mark.parametrize("how", [["--llem-no-gaps"], ["-o", "llem_no_gaps=true"]])
    def test_no_gaps_removes_idle_time(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, how: list[str]
    ) -> None:
        write_study(
            sweep={"n": [1, 2]},
            execution={"n_cycles": 1, "experiment_gap_seconds": 3600, "cycle_gap_seconds": 3600},
        )
        pytester.runpytest("study.yaml", "-p", "llem", *how).assert_outcomes(passed=2)
        protocol = results.study_result["measurement_protocol"]
        assert protocol["experiment_gap_seconds"] == protocol["cycle_gap_seconds"] == 0


class TestEstimate:
    LLAMA_8B = from_config(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
    )
    HOST = Host(memory_bytes=64 * 2**30)

    def test_parameters_of_a_dense_model_are_counted(self) -> None:
        assert self.LLAMA_8B.parameters == 8_030_261_248  # as in the model card of Llama-3.1-8B
        assert self.LLAMA_8B.kv_values_per_token == 2 * 32 * 8 * 128

    def test_parameters_in_files_match_the_configuration(self) -> None:
        from pytest_llem.engines.tiny_llama import SHAPE, tiny_llama

        assert read_footprint(tiny_llama()) == from_config(SHAPE)

    def test_size_of_a_mixture_of_experts_is_unknown_without_files(self) -> None:
        with pytest.raises(KeyError):
            from_config(
                {
                    **vars(self.LLAMA_8B),
                    "hidden_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 1,
                    "vocab_size": 8,
                    "intermediate_size": 8,
                    "num_local_experts": 8,
                }
            )

    @pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"not json"])
    def test_size_of_broken_weights_is_unknown(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
        (tmp_path / "model.safetensors").write_bytes(content)
        assert read_footprint(tmp_path) is None

    def test_size_without_files_is_unknown(self, tmp_path: Path) -> None:
        assert read_footprint(tmp_path) is None

    def needs(self, config: ExperimentConfig) -> Needs:
        needs = shipped_needs(config, self.LLAMA_8B.parameters)
        assert needs is not None
        return needs

    def test_memory_estimate_includes_weights_and_cache(self) -> None:
        small = ExperimentConfig(model="m")
        large = ExperimentConfig(model="m", pytorch=PyTorchConfig(batch_size=64))
        weights = 8_030_261_248 * 2
        assert weights < memory_bytes(small, self.needs(small), self.LLAMA_8B) < weights + 2 * 2**30
        cache = 63 * (512 + 128) * 2 * 32 * 8 * 128 * 2
        assert (
            memory_bytes(large, self.needs(large), self.LLAMA_8B)
            > memory_bytes(small, self.needs(small), self.LLAMA_8B) + cache
        )
        four_bit = ExperimentConfig(model="m", pytorch=PyTorchConfig(load_in_4bit=True))
        assert memory_bytes(four_bit, self.needs(four_bit), self.LLAMA_8B) < weights / 2

    def test_time_estimate_grows_with_the_work(self) -> None:
        def time(**changes: Any) -> float:
            config = ExperimentConfig(model="m", **changes)
            return seconds(config, ExecutionConfig(), self.needs(config), self.LLAMA_8B, self.HOST)

        assert time(max_output_tokens=256) > time() > time(pytorch={"batch_size": 8})
        assert time() > time(warmup={"enabled": False})
        gap = ExecutionConfig(experiment_gap_seconds=100.0)
        config = ExperimentConfig(model="m")
        assert seconds(config, gap, self.needs(config), self.LLAMA_8B, self.HOST) == pytest.approx(time() + 100)

    GPU = Host(2**36, (GpuCapacity("g", 80 * 2**30, (9, 0)),))

    @pytest.mark.parametrize(
        ("host", "changes", "expected"),
        [
            (GPU, {}, 30.0),
            (GPU, {"baseline": {"duration_seconds": 12}}, 12.0),
            (GPU, {"baseline": {"enabled": False}}, 0.0),
            (GPU, {"energy": {"backend": None}}, 0.0),
            (HOST, {}, 0.0),  # without a GPU, idle power does not count
        ],
    )
    def test_idle_power_counts_once_per_point_not_per_experiment(
        self, host: Host, changes: dict[str, Any], expected: float
    ) -> None:
        config = ExperimentConfig(model="m", **changes)
        assert idle_power_seconds(config, host) == expected
        without = config.model_copy(update={"baseline": BaselineConfig(enabled=False)})
        times = [
            seconds(one, ExecutionConfig(), self.needs(one), self.LLAMA_8B, host) for one in (config, without)
        ]
        assert times[0] - times[1] == pytest.approx(expected / 5), (
            "except for the short measurement after the window"
        )

    def test_plan_counts_idle_power_per_point_and_once_without_context(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def time(cycles: int, **fields: Any) -> float:
            text = {"model": "builtin:tiny-llama", "sweep": {"n": [1, 2]}, "execution": {"n_cycles": cycles}}
            (tmp_path / "study.yaml").write_text(json.dumps({**text, **fields}))
            study = load_study(tmp_path / "study.yaml")
            estimated = Plan(study, study.experiments, Preflight(study, (), [])).seconds
            assert estimated is not None
            return estimated

        monkeypatch.setattr(Preflight, "host_of", lambda preflight, config: self.GPU)
        off = {"baseline": {"enabled": False}}
        assert time(3) - time(3, **off) == pytest.approx(2 * 30 + 5 + 6 * 6)
        assert time(1) - time(1, **off) == pytest.approx(2 * 30 + 5 + 2 * 6)
        assert time(3, **off) == pytest.approx(3 * time(1, **off))

    def test_time_estimate_is_shorter_on_a_gpu(self) -> None:
        gpu = Host(2**36, (GpuCapacity("g", 80 * 2**30, (9, 0)),))
        config, execution = ExperimentConfig(model="m"), ExecutionConfig()
        needs = self.needs(config)
        on_gpu, on_cpu = (seconds(config, execution, needs, self.LLAMA_8B, host) for host in (gpu, self.HOST))
        assert on_gpu < on_cpu

    @pytest.mark.parametrize(
        ("total", "text"),
        [(59.6, "60 s"), (200, "3 min"), (2 * 3600, "2.0 h"), (40 * 3600, "2 days"), (10**9, "11,574 days")],
    )
    def test_durations_are_shown_in_readable_units(self, total: float, text: str) -> None:
        assert duration_text(total) == text


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        '{"hidden_size": NaN}',
        '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 0, "vocab_size": 8}',
        '{"hidden_size": 1' + "0" * 400 + "}",
        '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": "abc"}',
        "7",
    ],
)
def test_a_model_with_an_odd_configuration_has_an_unknown_size(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert read_footprint(tmp_path) is None


def test_plan_reports_a_model_larger_than_the_memory(pytester: pytest.Pytester) -> None:
    (pytester.path / "study.yaml").write_text(
        "model: builtin:tiny-llama\nmax_input_tokens: 128\nn: 1000000\n"
        "sweep: {pytorch.batch_size: [1, 1000000]}\nexecution: {n_cycles: 1}\n"
    )
    run = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only")
    run.stdout.re_match_lines([r"llem: .* needs about [\d,]+ GiB, available [\d.,]+ GiB$"])


def test_time_of_a_cycle_counts_points_that_run(write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = [{"where": {"n": 2}, "reason": "known"}]
    study = load_study(
        write_study(
            sweep={"n": [1, 2]}, execution={"n_cycles": "auto"}, skip=skipped, gates={"metrics": ["seconds"]}
        )
    )
    running = [one for one in study.experiments if one.point.skip is None]
    preflight = SimpleNamespace(refusal=lambda point: None)
    plan: Any = SimpleNamespace(seconds=30.0 * len(running), to_run=study.experiments, preflight=preflight)
    monkeypatch.setattr(Settings, "from_config", lambda config: SimpleNamespace(against="other"))
    first, *_ = plans._effects(cast("pytest.Config", None), study, plan)
    assert ", about 60 s each, " in first
