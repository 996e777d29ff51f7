"""Compilation happens in the warm-up; a window with a compilation is not judged."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.energy.account import Meters
from pytest_llem.measurement import window
from pytest_llem.measurement.pass_driver import MAX_ROUNDS, warm_up
from pytest_llem.measurement.pass_window import MAX_RESTARTS, PassWindow, measure
from pytest_llem.measurement.turns import MIN_TURNS, Turn, Turns
from pytest_llem.study.config import WarmupConfig
from tests.conftest import NOOP_STUDY
from tests.support.clock import clock
from tests.support.narrow import not_none
from tests.support.warned import texts

LENGTHS = {"n": 6, "input_len": {"min": 1, "max": 9}, "seed": 3}


def run(**changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    fields |= {
        "baseline": {"enabled": False},
        "warmup": {"n_warmup": 2, "max_prompts": 5, "window_size": 3, "min_prompts": 3},
        "dataset": LENGTHS,
    }
    study = ExperimentConfig.model_validate({**fields, **changes})
    return ExperimentOrchestrator(study).run().result


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replaces torch's own counter of compiled graphs."""
    made: list[object] = []
    for module in ("pass_driver", "pass_window", "orchestrator"):
        monkeypatch.setattr(f"pytest_llem.measurement.{module}.compilations", lambda: len(made))
    return made


class Compiler:
    """An engine whose batches are lengths, that compiles for each new length, and has its own clock.

    Args:
        graphs: Gets an entry for each compilation; none is visible where it is None.
        once: Compile for a length's first run only; otherwise for every run.
    """

    def __init__(self, graphs: list[object] | None, *, once: bool = True) -> None:
        self.now = 0.0
        self.ran: list[int] = []
        self._graphs, self._once = graphs, once

    def positions(self, batch: int) -> int:
        return batch

    def seed(self, seed: int) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def generate(self, batch: int) -> int:
        self.now += 0.01
        if batch not in self.ran or not self._once:
            self.now += 5.0
            if self._graphs is not None:
                self._graphs.append(batch)
        self.ran.append(batch)
        return batch


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def make(graphs: list[object] | None, **given: Any) -> Any:
        engine = Compiler(graphs, **given)
        for module in ("pass_driver", "pass_window"):
            monkeypatch.setattr(f"pytest_llem.measurement.{module}.time", clock(lambda: engine.now))
        return engine

    return make


def warm(engine: Any, batches: Sequence[int], **changes: Any) -> Any:
    return not_none(warm_up(engine, batches, WarmupConfig(**{"n_warmup": 2, **changes}), lambda run, most: None))


def measured(engine: Any, batches: Sequence[int], min_seconds: float = 0.05) -> PassWindow:
    return measure(engine, batches, Meters(), min_seconds=min_seconds, seed=0)


@pytest.mark.parametrize("visible", [True, False])
def test_every_length_runs_in_the_warm_up_of_an_engine_that_compiles(
    visible: bool, compiler: Callable[..., Any], graphs: list[object]
) -> None:
    """With torch.compile or a compiler without a counter, and with any number of runs."""
    lengths = list(range(1, 40))
    engine = compiler(graphs if visible else None)
    record = warm(engine, [*lengths, *lengths], max_prompts=20)
    assert set(engine.ran) == set(lengths)
    assert record.converged is True
    one = measured(engine, lengths)
    assert (one.compiled, one.restarts) == (None, 0)
    assert one.seconds == pytest.approx(0.39)


def test_an_engine_that_compiles_nothing_runs_two_lengths_only(
    compiler: Callable[..., Any], graphs: list[object]
) -> None:
    engine = compiler(None)
    engine.ran = list(range(40))
    warm(engine, list(range(1, 40)))
    assert set(engine.ran[40:]) == {39, 20}


def test_lengths_run_again_until_nothing_is_compiled(
    compiler: Callable[..., Any], graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = compiler(graphs)
    seen: list[tuple[int, int | None]] = []
    warm_up(engine, [1, 2, 3], WarmupConfig(n_warmup=2), lambda run, most: seen.append((run, most)))
    assert engine.ran[4:10] == [3, 2, 1] * 2
    assert all(most is not None and run <= most for run, most in seen)
    thrashing = compiler(graphs, once=False)
    warm(thrashing, [1, 2, 3], convergence_detection=False)
    assert len(thrashing.ran) == 4 + MAX_ROUNDS * 3


def test_window_with_a_compilation_is_restarted(compiler: Callable[..., Any], graphs: list[object]) -> None:
    engine = compiler(graphs)
    begun: list[float] = []
    found = measure(engine, [1, 2], Meters(), min_seconds=30.0, seed=0, before=lambda: begun.append(engine.now))
    assert (found.compiled, found.restarts, len(begun)) == (None, 1, 2)
    assert begun[1] == pytest.approx(10.02), "the first one ends with the pass in which it is seen"
    assert found.seconds / len(found.passes) == pytest.approx(0.02)


def test_window_with_a_slow_first_run_is_restarted(compiler: Callable[..., Any]) -> None:
    """A compiler without a counter has not compiled one of three batches yet."""
    engine = compiler(None)
    engine.ran = [1, 2]
    found = measured(engine, [1, 2, 3], min_seconds=6.0)
    assert (found.compiled, found.restarts) == (None, 1)
    assert found.seconds / len(found.passes) == pytest.approx(0.03)


def test_window_that_always_compiles_is_returned_with_the_reason(
    compiler: Callable[..., Any], graphs: list[object]
) -> None:
    found = measured(compiler(graphs, once=False), [1, 2])
    assert (found.restarts, found.compiled) == (MAX_RESTARTS, "torch.compile compiled 2 graphs in the window")


@pytest.mark.usefixtures("noop_engine")
@pytest.mark.parametrize("may_compile", [False, True], ids=["one length", "several lengths"])
def test_delay_in_a_turn_is_not_a_compilation_if_its_length_ran(
    may_compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of one pass is not measured again. Only another length may still have needed compilation."""
    import noop_engine

    turns = iter([Turn(os.getpid())] * MIN_TURNS)
    seconds: Iterator[float] = repeat(0.001)

    def next_turn(progress: Any) -> Turn | None:
        nonlocal seconds
        if progress.done == 0:  # the warm-up has ended
            seconds = chain([0.3], seconds)
        return next(turns, None)

    def generate(self: Any, batch: Any) -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(next(seconds))
        return began, time.monotonic()

    monkeypatch.setattr(noop_engine.NoopEngine, "generate", generate)

    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    fields |= {"baseline": {"enabled": False}, "measurement": {"min_window_seconds": 0}, "n": 6}
    fields |= {"warmup": {"n_warmup": 2, "convergence_detection": False}}
    fields |= {"dataset": LENGTHS} if may_compile else {"max_input_tokens": 9}
    study = ExperimentConfig.model_validate(fields)
    result = ExperimentOrchestrator(study, turns=Turns("a", 0.0, next_turn)).run().result
    assert result.window is not None
    assert (result.window.compiled is not None) == may_compile
    assert (result.metrics["seconds"].not_judged is not None) == may_compile


def test_short_delay_is_not_a_compilation() -> None:
    stands_out = window.first_run_stands_out
    assert not stands_out(0.09, [0.001])
    assert not stands_out(2.9, [1.0, 1.0])
    assert not stands_out(5.0, [])
    assert stands_out(3.1, [1.0, 1.0])


@pytest.mark.usefixtures("noop_engine")
def test_no_gate_judges_a_window_that_compiles(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    import noop_engine

    generate = noop_engine.NoopEngine.generate

    def compiling(self: Any, batch: Any) -> Any:
        graphs.append(batch)
        return generate(self, batch)

    monkeypatch.setattr(noop_engine.NoopEngine, "generate", compiling)
    result = run(measurement={"min_window_seconds": 0, "prefill_split": True})
    reason = "torch.compile compiled 6 graphs in the window"
    assert (result.window.compiled, result.window.restarts) == (reason, MAX_RESTARTS)
    assert f"{reason}; no gate judges it: use batches of fewer different lengths" in texts(result.warnings)
    assert result.prefill_window.compiled is None
    judged = {name for name, one in result.metrics.items() if one.not_judged is None}
    assert judged == {"load_seconds", "load_energy_j", "idle_power_w", "model_memory_mb"}
    assert result.metrics["seconds"].not_judged == reason


@pytest.mark.usefixtures("noop_engine")
def test_no_gate_judges_prefill_that_compiles(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    import noop_engine

    monkeypatch.setattr(noop_engine.NoopEngine, "generate_first", lambda self, batch: graphs.append(batch))
    metrics = run(measurement={"min_window_seconds": 0, "prefill_split": True}).metrics
    reason = "torch.compile compiled 6 graphs in the window"
    assert (metrics["prefill_seconds"].not_judged, metrics["decode_seconds"].not_judged) == (reason, reason)
    assert metrics["seconds"].not_judged is None


def test_graphs_compiled_by_torch_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is not imported: an engine may not need it."""
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils", raising=False)
    assert window.compilations() == 0
    counted = SimpleNamespace(counters={"stats": {"unique_graphs": 3}})
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", counted)
    assert window.compilations() == 3


@pytest.mark.slow
@pytest.mark.usefixtures("noop_engine")
def test_real_compiler_does_not_compile_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for each length, without a warm-up that would run all lengths."""
    torch = pytest.importorskip("torch")
    import noop_engine

    @torch.compile(backend="eager", dynamic=False)  # type: ignore[untyped-decorator]
    def double(ids: Any) -> Any:
        return ids * 2

    generate = noop_engine.NoopEngine.generate

    def compiled(self: Any, batch: Any) -> Any:
        double(torch.zeros(max(map(len, batch))))
        return generate(self, batch)

    monkeypatch.setattr(noop_engine.NoopEngine, "generate", compiled)
    lengths = {"n": 4, "input_len": {"min": 2, "max": 9}, "seed": 1}
    before = window.compilations()
    cold = run(dataset=lengths, warmup={"enabled": False}).window
    assert window.compilations() > before
    assert (cold.restarts, cold.compiled) == (1, None)
    torch.compiler.reset()
    warmed = run(dataset=lengths).window
    assert (warmed.restarts, warmed.compiled) == (0, None)


@pytest.mark.slow
def test_static_cache_and_mixed_prompt_lengths_do_not_compile_in_window() -> None:
    pytest.importorskip("torch")
    from tests.support.tiny import config

    study = config(
        dataset={"n": 8, "input_len": {"min": 4, "max": 64}, "output_len": 8, "seed": 1},
        pytorch={
            "batch_size": 2,
            "cache_implementation": "static",
            "torch_compile": True,
            "torch_compile_backend": "eager",
        },
        warmup={"n_warmup": 2, "max_prompts": 5, "window_size": 3, "min_prompts": 3},
        energy={"backend": None},
    )
    result = ExperimentOrchestrator(study).run().result
    assert result.window.compiled is None
