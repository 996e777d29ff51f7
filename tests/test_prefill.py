"""Prefill's share of a pass, from passes that stop after the first token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator, run_experiment
from pytest_llem.catalogue import PREFILL_METRICS
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.measurement import accounting
from pytest_llem.measurement.accounting import prefill_metrics
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.estimate import seconds as estimated_seconds
from pytest_llem.planning.host import Host
from pytest_llem.planning.model_files import Footprint
from pytest_llem.results.metrics import Method
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.execution import ExecutionConfig
from tests.conftest import NOOP_STUDY
from tests.support.measured import output_ids, pass_window
from tests.support.tiny import NATURAL, TINY, engine
from tests.support.warned import texts

SPLIT = {"min_window_seconds": 0, "prefill_split": True}


def noop_config(**changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    return ExperimentConfig.model_validate(
        {**fields, "baseline": {"enabled": False}, "measurement": SPLIT, **changes}
    )


def run(**changes: Any) -> Any:
    return ExperimentOrchestrator(noop_config(**changes)).run().result


def window(
    energy_j: Any,
    uncertainty_j: Any = None,
    *,
    passes: int = 2,
    seconds: float = 4.0,
    method: Method = "measured",
    boundary: str = "gpu_board",
) -> Any:
    total = Total(energy_j, method, "nvml_total_energy", boundary, None if energy_j else "lost", uncertainty_j)
    return pass_window([[]] * passes, seconds, Account((), total, seconds=seconds))


def test_shares_of_prefill_and_decode_are_those_computed_by_hand() -> None:
    """A pass takes 50 J and 2 s, its prefill 12 J and 0.5 s, measured by four passes of the second window."""
    found = prefill_metrics(
        window(100.0, 3.0), window(48.0, 4.0, passes=4, seconds=2.0), input_tokens=6, drift_w=0.0
    )
    value = {name: one.value for name, one in found.items()}
    assert value == {
        "prefill_energy_j": 12.0,
        "decode_energy_j": 38.0,
        "energy_per_input_token_j": 2.0,
        "prefill_seconds": 0.5,
        "decode_seconds": 1.5,
    }
    assert found["prefill_energy_j"].uncertainty == 1.0
    assert found["decode_energy_j"].uncertainty == pytest.approx(math.hypot(1.5, 1.0))
    assert found["energy_per_input_token_j"].uncertainty == pytest.approx(1 / 6)
    energies = [one for name, one in found.items() if name.endswith("_j")]
    assert {one.method for one in energies} == {"attributed"}
    assert {(one.source, one.boundary) for one in energies} == {("nvml_total_energy", "gpu_board")}


@pytest.mark.parametrize(
    ("prefill", "metric", "value", "reason"),
    [
        (window(24.0), "decode_energy_j", -2.0, "prefill alone took 12 J, but a whole pass took 10 J"),
        (window(1.0, seconds=5.0), "decode_seconds", -0.5, "prefill alone took 2.5 s, but a whole pass took 2 s"),
    ],
)
def test_negative_difference_is_reported_and_not_judged(
    prefill: PassWindow, metric: str, value: float, reason: str
) -> None:
    found = prefill_metrics(window(20.0), prefill, input_tokens=1, drift_w=0.0)[metric]
    assert (found.value, found.uncertainty, found.not_judged) == (value, None, reason)


def test_positive_differences_are_judged() -> None:
    found = prefill_metrics(window(20.0), window(10.0, seconds=2.0), input_tokens=1, drift_w=0.0)
    assert {one.not_judged for one in found.values()} == {None}


def test_method_weaker_than_attributed_is_kept() -> None:
    found = prefill_metrics(
        window(20.0, method="estimated"), window(5.0, method="estimated"), input_tokens=1, drift_w=0.0
    )
    assert {one.method for name, one in found.items() if name.endswith("_j")} == {"estimated"}


def test_energy_missing_in_either_window_is_null_with_its_reason() -> None:
    found = prefill_metrics(window(20.0), window(None, method="unavailable"), input_tokens=2, drift_w=0.0)
    for name in ("prefill_energy_j", "decode_energy_j", "energy_per_input_token_j"):
        assert (found[name].value, found[name].method, found[name].reason) == (None, "unavailable", "lost")
    assert found["prefill_seconds"].value == 2.0

    found = prefill_metrics(window(None, method="unavailable"), window(20.0), input_tokens=2, drift_w=0.0)
    assert found["prefill_energy_j"].value == 10.0
    assert (found["decode_energy_j"].value, found["decode_energy_j"].reason) == (None, "lost")


def test_windows_of_two_boundaries_are_not_subtracted() -> None:
    found = prefill_metrics(window(20.0), window(5.0, boundary="cpu_package"), input_tokens=1, drift_w=0.0)
    assert found["decode_energy_j"].value is None
    assert found["decode_energy_j"].reason == (
        "energy of the whole pass covers gpu_board, but that of prefill covers cpu_package"
    )


@pytest.mark.usefixtures("noop_engine")
class TestExperiment:
    def test_without_prefill_split_there_are_no_shares(self) -> None:
        result = run(measurement={"min_window_seconds": 0})
        for name in PREFILL_METRICS:
            assert (result.metrics[name].value, result.metrics[name].reason) == (None, accounting.NOT_REQUESTED)
        assert result.prefill_window is None

    def test_the_second_window_is_as_long_and_has_matched_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import noop_engine

        done = []
        for name in ("generate", "generate_first", "seed"):
            real = getattr(noop_engine.NoopEngine, name)

            def noted(self: Any, given: Any, name: Any = name, real: Any = real) -> Any:
                done.append((name, given))
                return real(self, given)

            monkeypatch.setattr(noop_engine.NoopEngine, name, noted)
        result = run(
            noop={"seconds": 0.02, "first_seconds": 0.01},
            measurement={"min_window_seconds": 0.1, "prefill_split": True},
        )
        whole, first = result.window, result.prefill_window
        assert min(whole.window_seconds, first.window_seconds) >= 0.1
        assert 1 <= whole.passes <= 3, "of 0.04 s at least"
        assert 1 <= first.passes <= 5, "of 0.02 s at least"
        at = [name for name, _ in done].index("generate_first")
        passes = done[at + 1 :]  # the pass before the window does not count
        prompts = [given for name, given in done[:at] if name == "generate"][:2]
        one = [("seed", 42), *(("generate_first", batch) for batch in prompts)]
        assert passes == one * first.passes
        seconds = {name: result.metrics[name].value for name in ("seconds", "prefill_seconds", "decode_seconds")}
        assert seconds["prefill_seconds"] == pytest.approx(first.window_seconds / first.passes)
        assert seconds["decode_seconds"] == pytest.approx(seconds["seconds"] - seconds["prefill_seconds"])

    def test_totals_and_requests_are_those_of_the_first_window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        energies = [1.0, 60.0, 20.0]

        class Meter:
            def begin(self) -> None:
                pass

            def end(self) -> Any:
                return Reading((DeviceReading("d", "gpu_board", energies.pop(0), "measured", "m"),), 2.0, 0.5)

            def close(self) -> None:
                pass

        meter: Any = Meter()
        meters = Meters({"one": meter})
        monkeypatch.setattr(Meters, "open", lambda *given: meters)
        result = run()
        value = {name: one.value for name, one in result.metrics.items()}
        assert (value["energy_j"], value["prefill_energy_j"], value["decode_energy_j"]) == (60.0, 20.0, 40.0)
        assert value["energy_per_input_token_j"] == 20.0 / 8
        assert result.tokens.output_tokens == 6
        assert result.window.window_energy_j == 60.0
        assert result.prefill_window.window_energy_j == 20.0
        few = [warning for warning in texts(result.warnings) if "holds 4 ticks" in warning]
        assert [warning.split(" holds")[0] for warning in few] == ["the window", "the prefill window"]

    def test_an_engine_that_cannot_stop_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import noop_engine

        monkeypatch.delattr(noop_engine.NoopEngine, "generate_first")
        reason = (
            r"^engine 'noop' cannot stop after the first token \(it has no generate_first\): leave measurement"
        )
        with pytest.raises(PreflightError, match=reason):
            run()
        assert run(measurement={"min_window_seconds": 0}).metrics["prefill_energy_j"].value is None

    def test_engine_that_does_not_stop_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import noop_engine

        monkeypatch.setattr(noop_engine.NoopEngine, "generate_first", noop_engine.NoopEngine.generate)
        with pytest.raises(ValueError, match="the engine returned 3 tokens for a request for one"):
            run()


# ---- the engine pytorch ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"measurement": NATURAL, "decoder": {"min_new_tokens": 4, "do_sample": False}},
        {"pytorch": {"batch_size": 2, "num_beams": 2}},
        {"pytorch": {"prompt_lookup_num_tokens": 3}},
        {"pytorch": {"cache_implementation": "static"}},
        {"pytorch": {"use_cache": False}},
    ],
)
def test_the_first_token_is_that_of_the_whole_answer(changes: dict[str, Any]) -> None:
    made = engine(**{"decoder": {"do_sample": False}, **changes})
    batch = made.prepare([[5, 6, 7], [9, 10]])[0]
    first = made.requests(batch, made.generate_first(batch))
    whole = made.requests(batch, made.generate(batch))
    assert [len(output_ids(one)) for one in first] == [1] * len(first)
    assert all(len(output_ids(one)) > 1 for one in whole)
    if "num_beams" not in changes.get("pytorch", {}):
        assert [output_ids(one)[0] for one in first] == [output_ids(one)[0] for one in whole]


@pytest.mark.slow
def test_shares_of_a_real_engine_add_up_to_the_pass() -> None:
    result = run_experiment({**TINY, "max_input_tokens": 256, "max_output_tokens": 16, "measurement": SPLIT})
    value: dict[str, Any] = {name: one.value for name, one in result.metrics.items()}
    assert value["prefill_seconds"] > 0
    assert value["prefill_seconds"] + value["decode_seconds"] == pytest.approx(value["seconds"])
    assert value["prefill_energy_j"] + value["decode_energy_j"] == pytest.approx(value["energy_j"])
    assert value["energy_per_input_token_j"] == pytest.approx(value["prefill_energy_j"] / (3 * 256))
    assert result.metrics["prefill_energy_j"].method == "estimated"
    assert json.loads(result.model_dump_json())["prefill_window"]["passes"] == 1


@pytest.mark.parametrize("seconds", [estimated_seconds, deadline_seconds])
def test_prefill_window_counts_in_estimate_and_time_limit(seconds: Callable[..., Any]) -> None:
    footprint = Footprint(10**6, 10, 1000, 1000)

    def planned(**measurement: Any) -> Any:
        config = noop_config(measurement={"min_window_seconds": 600, **measurement})
        return seconds(config, ExecutionConfig(), Needs(), footprint, Host(2**34))

    assert 600 <= planned(prefill_split=True) - planned() <= 660
