"""Labels that differ from what ran, and tracers that slow down the window, as reported for other tools."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
import torch._inductor
from torch._dynamo.utils import counters

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.engines.models import ModelSource
from pytest_llem.engines.pytorch.adjusted import adjusted_settings
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.measurement.quality_warnings import tracer_warning
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.reporting.terminal.tables import render
from pytest_llem.results.environment import variables
from pytest_llem.results.experiment import EngineRecord, ExperimentResult
from pytest_llem.study.loading import load_study
from tests.conftest import NOOP_STUDY, Results, RunPytest, WriteStudy
from tests.support.study_results import point
from tests.support.tiny import GREEDY, PROMPTS, TINY, engine, generate


class Subclass(PyTorchEngine):
    """A user-defined engine."""


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
SUBCLASS = f"{__name__}:Subclass"


def run(**changes: Any) -> ExperimentResult:
    return ExperimentOrchestrator(ExperimentConfig.model_validate({**TINY, **GREEDY, **changes})).run().result


def adjusted(result: ExperimentResult) -> list[tuple[str, Any, Any]]:
    return [(one.setting, one.given, one.effective) for one in result.adjusted]


class TestCompilation:
    """pytorch#174607 and others: TORCH_COMPILE_DISABLE silently disables torch.compile."""

    @pytest.fixture(autouse=True)
    def _nothing_is_compiled_yet(self) -> None:
        torch._dynamo.reset()
        counters.clear()

    @pytest.mark.slow
    def test_label_of_a_model_that_was_not_compiled_is_adjusted(self) -> None:
        with torch._dynamo.config.patch(disable=True):
            result = run(pytorch=COMPILED)
        assert adjusted(result) == [("pytorch.torch_compile", True, None)]
        assert "TORCH_COMPILE_DISABLE" in str(result.adjusted[0])

    @pytest.mark.slow
    def test_label_of_a_compiled_model_is_kept(self) -> None:
        assert run(n=1, max_output_tokens=1, pytorch=COMPILED).adjusted == []

    @pytest.mark.parametrize(
        ("mode", "expected"), [("reduce-overhead", ["pytorch.torch_compile_mode"]), ("max-autotune", [])]
    )
    def test_compile_mode_without_effect_on_cpu_is_adjusted(self, mode: str, expected: list[str]) -> None:
        made = engine(**GREEDY)
        options = {"torch_compile": True, "torch_compile_mode": mode}
        config = ExperimentConfig.model_validate({**TINY, **GREEDY, "pytorch": options})
        found = adjusted_settings(made._model, config, ModelSource("somewhere", "local"))
        assert [one.setting for one in found] == expected
        graphs = {"triton.cudagraphs": True}
        assert (torch._inductor.list_mode_options(mode) == graphs) is bool(expected)

    def test_compilation_of_generate_itself_can_be_switched_off(self) -> None:
        result = run(n=1, passthrough_kwargs={"disable_compile": True})
        assert result.engine.settings["generation"]["disable_compile"] is True

    def test_environment_variables_that_affect_results_are_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = {"TORCH_COMPILE_DISABLE": "1", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "ATEN_CPU_CAPABILITY": "avx2"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert given.items() <= variables().items()


def _cache(options: Mapping[str, Any]) -> object:
    """Return the cache that a model is called with; transformers before 5.24 calls it ``past_key_values``."""
    return options.get("cache", options.get("past_key_values"))


class TestCache:
    """transformers#40135 and #48036: the cache ``hybrid`` silently runs as a dynamic cache."""

    @pytest.mark.parametrize("given", ["static", "hybrid", "hybrid_chunked", "sliding_window", "dynamic"])
    def test_label_is_the_cache_that_was_used(self, given: str) -> None:
        made = engine(pytorch={"cache_implementation": given}, **GREEDY)
        caches: set[str] = set()
        made._model.register_forward_pre_hook(
            lambda module, args, options: caches.add(type(_cache(options)).__name__), with_kwargs=True
        )
        generate(made, PROMPTS)
        effective = {one.setting: one.effective for one in made.describe().adjusted}
        label = effective.get("pytorch.cache_implementation", given)
        assert caches == {f"{str(label).capitalize()}Cache"}


class TestArgumentsOfGenerate:
    """transformers#40739: arguments of ``generate`` that are silently ignored."""

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("num_assistant_tokens", [2, 5]),
            ("num_beam_groups", [2, 4]),
            ("penalty_alpha", [0.2, 0.6]),
            ("low_memory", [True, False]),
            ("assistant_ensemble_weight", [0.2, 0.6]),
            ("speculation_type", ["dflash", "other"]),
            ("continuous_batching_config", [1, 2]),
            ("transformers_version", ["4", "5"]),
            ("max_cache_len", [64, 128]),
        ],
    )
    def test_unused_generate_arguments_make_no_points(self, tmp_path: Path, name: str, values: list[Any]) -> None:
        file = tmp_path / "s.yaml"
        file.write_text(f"model: m\nsweep: {{passthrough_kwargs.{name}: {str(values).lower()}}}\n")
        study = load_study(file)
        assert len(study.points) == 1
        assert study.excluded[0].reason.startswith(f"passthrough_kwargs.{name} has no effect ")

    def test_draft_arguments_have_an_effect_with_drafting(self) -> None:
        kept = {"assistant_early_exit": 1, "num_assistant_tokens": 2}
        assert run(passthrough_kwargs=kept, n=1).adjusted == []

    def test_label_of_a_subclass_is_adjusted_too(self) -> None:
        result = run(backend=SUBCLASS, passthrough_kwargs={"num_assistant_tokens": 3})
        assert adjusted(result) == [("passthrough_kwargs.num_assistant_tokens", 3, None)]


@contextmanager
def _traced() -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _profiled() -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def _allocations_traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def _monitored() -> Iterator[None]:
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        pytest.skip("sys.monitoring is of Python 3.12")
    monitoring.use_tool_id(monitoring.PROFILER_ID, "a profiler")
    monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.PY_START)
    try:
        yield
    finally:
        monitoring.free_tool_id(monitoring.PROFILER_ID)


class TestTracer:
    """pytest-benchmark#16, coverage.py#1916: coverage, debuggers and profilers distort measurements."""

    @pytest.mark.parametrize(
        ("tool", "text"),
        [
            (_traced, "a trace function is set"),
            (_profiled, "a profile function is set"),
            (_allocations_traced, "tracemalloc is on"),
            (_monitored, "sys.monitoring is in use (a profiler)"),
        ],
    )
    def test_active_tool_is_named(self, tool: Callable[[], Any], text: str) -> None:
        with tool():
            found = tracer_warning()
        assert found is not None
        assert found.startswith(text)

    @pytest.mark.slow
    def test_experiment_under_a_tracer_is_not_judged(
        self,
        write_study: WriteStudy,
        run_pytest: RunPytest,
        results: Results,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("PYTHONTRACEMALLOC", "1")
        write_study(sweep=None, experiments=[{}], execution={"n_cycles": 1}, budgets={"seconds": 1000})
        outcome = run_pytest("--llem-start-method=spawn")
        outcome.assert_outcomes(passed=1, failed=1)
        (warning,) = [one for one in results.study_result["warnings"] if one["code"] == "traced"]
        assert warning["severity"] == "error"
        assert warning["text"].startswith("tracemalloc is on")
        outcome.stdout.fnmatch_lines(["*not judged: tracemalloc is on*", "*cannot be judged: tracemalloc is on"])


def test_prompts_and_cycles_have_columns_of_different_names() -> None:
    points = [point({"n": n, "noop.size": n}, config_hash=f"{n:016}", seconds=[1.0, 1.1, 1.2]) for n in (4, 8)]
    made = points_table(points, {one.config_hash: 3 for one in points}, 80)
    headings = [str(column.header) for column in made.table.columns]
    assert headings[:3] == ["n\n(prompts)", "size", "n"]
    assert any("(prompts)" in line for line in render(made.table, made.width))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("float16", [("precision", "bf16", "fp16")]), ("torch.bfloat16", []), ("fp8", []), (None, [])],
)
def test_data_type_of_the_engine_is_compared_with_the_label(
    stated: str | None, expected: list[Any], noop_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm#7561, #12794: engines change the data type to one that the device or quantisation supports."""
    import noop_engine as engines

    record = EngineRecord(name="noop", device="cpu", settings={"dtype": stated})
    monkeypatch.setattr(engines.NoopEngine, "describe", lambda self: record)
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    result = ExperimentOrchestrator(ExperimentConfig.model_validate({**fields, "precision": "bf16"})).run().result
    assert adjusted(result) == expected


def test_energy_budget_exceeded_under_a_tracer_names_the_tracer(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys
        import time

        import pytest

        @pytest.mark.energy_budget(seconds=0.001)
        def test_it():
            sys.settrace(lambda *_: None)
            time.sleep(0.01)
        """
    )
    before = sys.gettrace()
    try:
        outcome = pytester.runpytest_inprocess("-p", "llem")
    finally:
        sys.settrace(before)
    outcome.stdout.fnmatch_lines(["*took 0.0* s, while a trace function is set (*), more than its budget*"])
