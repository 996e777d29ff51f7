"""Warm-up, window, prompts and metrics, with an engine and a meter of known values."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.energy.account import Meters
from pytest_llem.energy.protocol import DeviceReading, Reading
from pytest_llem.engines.protocol import PreflightError, RequestRecord
from pytest_llem.measurement.pass_driver import warm_up
from pytest_llem.measurement.requests import Requests
from pytest_llem.study.config import WarmupConfig
from pytest_llem.study.engine_options import Needs
from tests.conftest import NOOP_STUDY
from tests.support.measured import record
from tests.support.narrow import not_none
from tests.support.warned import texts

pytestmark = pytest.mark.usefixtures("noop_engine")


def run(tmp_path: Path = Path(), **changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    config = ExperimentConfig.model_validate({**fields, "baseline": {"enabled": False}, **changes})
    return ExperimentOrchestrator(config, directory=tmp_path).run()


NATURAL = {"min_window_seconds": 0, "length_mode": "natural"}


class Meter:
    """A meter with given readings, one for the load and one for the window."""

    def __init__(self, *devices: Any, tick_seconds: Any = None) -> None:
        self.readings = [Reading((DeviceReading("d", "gpu_board", 1.0, "measured", "m"),), 1.0)]
        self.readings.append(Reading(devices, 2.0, tick_seconds))

    def begin(self) -> None:
        pass

    def end(self) -> Any:
        return self.readings.pop(0)

    def close(self) -> None:
        pass


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def use(*devices: Any, tick_seconds: Any = None) -> None:
        meter: Any = Meter(*devices, tick_seconds=tick_seconds)
        meters = Meters({"test": meter})
        monkeypatch.setattr(Meters, "open", lambda *given: meters)

    return use


def test_the_window_holds_whole_passes_and_totals_are_per_pass(meter: Callable[..., Any]) -> None:
    meter(DeviceReading("GPU-1", "gpu_board", 60.0, "measured", "nvml_total_energy"))
    result = run(measurement={"min_window_seconds": 0.2}, noop={"seconds": 0.05}).result
    passes = result.window.passes
    assert passes >= 2
    assert result.window.window_seconds >= 0.2
    assert result.window.window_energy_j == 60.0
    value = {name: metric.value for name, metric in result.metrics.items()}
    assert value["seconds"] == pytest.approx(result.window.window_seconds / passes)
    assert value["energy_j"] == pytest.approx(60 / passes)
    assert value["energy_per_output_token_j"] == pytest.approx(60 / passes / 6)
    assert value["tokens_per_joule"] == pytest.approx(6 / (60 / passes))
    assert value["energy_per_request_j"] == pytest.approx(60 / passes / 2)
    assert value["wh_per_1000_requests"] == pytest.approx(60 / passes / 2 / 3.6)
    assert value["edp_js"] == pytest.approx(60 / passes * value["seconds"])
    assert value["mean_power_w"] == pytest.approx(30.0)
    assert result.window.tail_seconds == pytest.approx(2.0 - result.window.window_seconds)
    assert value["gpu_energy_j"] == pytest.approx(60 / passes)
    assert value["cpu_energy_j"] is None
    assert value["load_energy_j"] == 1.0
    energy = result.metrics["energy_per_output_token_j"]
    assert (energy.method, energy.source, energy.boundary) == ("measured", "nvml_total_energy", "gpu_board")


def test_gpus_packages_and_memory_are_kept_apart(meter: Callable[..., Any]) -> None:
    meter(
        DeviceReading("package-0", "cpu_package", 30.0, "measured", "rapl_package"),
        DeviceReading("dram-0", "dram", 6.0, "measured", "rapl_dram"),
        DeviceReading("package-1", "cpu_package", 20.0, "measured", "rapl_package"),
    )
    found = run().result.metrics
    assert {name: found[f"{name}_energy_j"].value for name in ("gpu", "cpu", "dram")} == {
        "gpu": None,
        "cpu": 50.0,
        "dram": 6.0,
    }
    assert [found[f"{name}_energy_j"].boundary for name in ("gpu", "cpu", "dram")] == [
        "gpu_board",
        "cpu_package",
        "dram",
    ]
    assert (found["energy_j"].value, found["energy_j"].boundary) == (56.0, "cpu_package+dram")
    assert found["gpu_energy_j"].reason == "no meter read gpu_board"


def test_missing_energy_is_null_with_its_reason(meter: Callable[..., Any]) -> None:
    meter(DeviceReading("GPU-1", "gpu_board", None, "unavailable", "nvml_total_energy", "GPU is lost"))
    result = run().result
    for name in ("energy_j", "energy_per_output_token_j", "tokens_per_joule", "mean_power_w", "gpu_energy_j"):
        metric = result.metrics[name]
        assert (metric.value, metric.method) == (None, "unavailable")
        assert "GPU is lost" in metric.reason
    assert result.window.window_energy_j is None


def test_a_window_of_few_ticks_is_flagged(meter: Callable[..., Any]) -> None:
    meter(DeviceReading("GPU-1", "gpu_board", 60.0, "measured", "nvml_total_energy"), tick_seconds=0.5)
    result = run().result
    assert result.window.quantisation_error == pytest.approx(0.25)
    assert any("holds 4 ticks" in warning for warning in texts(result.warnings))


def test_missing_meter_is_a_warning() -> None:
    result = run(energy={"backend": None}).result
    assert result.metrics["energy_j"].value is None
    assert result.metrics["energy_j"].reason == "energy: switched off by energy.backend"


def test_an_estimate_is_warned_of_unless_it_is_allowed() -> None:
    warning = "energy is estimated from CPU time, not measured"
    assert warning in texts(run().result.warnings)
    allowed = run(energy={"backend": "estimate", "allow_estimated": True}).result
    assert warning not in texts(allowed.warnings)
    assert allowed.metrics["energy_j"].method == "estimated"


def test_no_generated_tokens_do_not_divide_by_zero() -> None:
    result = run(noop={"ids": []}, measurement=NATURAL).result
    assert result.tokens.output_tokens == 0
    assert result.metrics["energy_per_output_token_j"].value is None
    assert result.metrics["itl_p50_ms"].value is None


def test_tokens_and_padding_are_counted(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abcd\n\nab\nabcdef\nunused\n")
    outcome = run(tmp_path, dataset="prompts.txt", n=3, noop={"size": 3}, max_input_tokens=5, max_output_tokens=2)
    tokens = outcome.result.tokens
    assert (tokens.prompts, tokens.input_tokens, tokens.output_tokens) == (3, 4 + 2 + 5, 6)
    assert tokens.truncated_prompts == 1
    assert tokens.padding_waste == pytest.approx(1 - 11 / 15)
    (row, *_) = csv.DictReader(outcome.files["requests.csv"].splitlines())
    assert [row[name] for name in ("pass", "request", "input_tokens", "output_tokens")] == ["1", "0", "4", "2"]
    latency = {name: float(row[f"{name}_ms"]) for name in ("ttft", "itl_mean", "tpot", "e2e")}
    assert latency["ttft"] + latency["itl_mean"] == pytest.approx(latency["e2e"], abs=0.001)
    assert latency["tpot"] == pytest.approx(latency["itl_mean"], abs=0.001)
    assert 0 <= float(row["sent_s"]) < float(row["first_token_s"]) < float(row["last_token_s"]) < 60
    assert (row["due_s"], row["admitted_s"], row["queue_ms"], row["error"]) == ("", "", "", "")


def test_engine_that_generates_other_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="the engine generated 2 tokens where exactly 3 were asked for"):
        run(noop={"ids": [1, 2]})
    with pytest.raises(ValueError, match="the engine generated 4 tokens where at most 3 were asked for"):
        run(noop={"ids": [1, 2, 3, 4]}, measurement=NATURAL)
    assert run(noop={"ids": [1, 2]}, measurement=NATURAL).result.tokens.output_tokens == 4


def test_an_engine_that_forgets_a_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import noop_engine

    monkeypatch.setattr(noop_engine.NoopEngine, "requests", lambda self, batch, generated: [])
    with pytest.raises(ValueError, match="the engine returned records for 0 of 2 prompts"):
        run()


def test_peak_memory_is_that_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up batches, and what runs after the window, need more memory than the measured batches."""
    import noop_engine

    engine, used, asked = noop_engine.NoopEngine, [0], []
    generate = engine.generate

    def growing(self: Any, batch: Any) -> Any:
        asked.append(batch)
        used[0] = max(used[0], 9_000_000 if len(asked) <= 2 else 2_000_000)
        return generate(self, batch)

    def first(self: Any, batch: Any) -> None:
        used[0] = 7_000_000

    monkeypatch.setattr(engine, "generate", growing)
    monkeypatch.setattr(engine, "generate_first", first)
    monkeypatch.setattr(engine, "reset_peak_memory", lambda self: used.__setitem__(0, 0))
    monkeypatch.setattr(engine, "peak_memory_bytes", lambda self: used[0])
    warmup = {"n_warmup": 1, "convergence_detection": False}
    result = run(warmup=warmup, measurement={"prefill_split": True, "min_window_seconds": 0}).result
    assert result.warmup.runs == 2
    assert result.metrics["peak_memory_mb"].value == 2.0


def test_named_meter_is_available_or_the_experiment_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path))
    with pytest.raises(PreflightError, match=r"meter 'rapl' cannot be used: no package counter"):
        run(energy={"backend": "rapl"})


def test_dataset_section_sets_recorded_prompt_counts() -> None:
    result = run(n=7, dataset={"n": 3, "input_len": 5, "output_len": 2}).result
    config = result.effective_config
    assert (config["n"], config["max_input_tokens"], config["max_output_tokens"]) == (3, 5, 2)
    assert (result.tokens.prompts, result.tokens.input_tokens, result.tokens.output_tokens) == (3, 15, 6)


def test_synthetic_prompts_have_exact_lengths_and_a_seed() -> None:
    shape = {"n": 3, "input_len": 7, "output_len": 2}
    first = run(dataset={**shape, "seed": 1})
    assert (first.result.tokens.prompts, first.result.tokens.input_tokens) == (3, 21)


class Engine:
    """An engine with a given duration of each run."""

    def __init__(self, clock: Any, durations: Any) -> None:
        self.clock, self.durations = clock, iter(durations)
        self.ran: list[int] = []

    def positions(self, batch: Any) -> Any:
        return batch

    def generate(self, batch: Any) -> None:
        self.ran.append(batch)
        self.clock[0] += next(self.durations)

    def synchronize(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("pytest_llem.measurement.pass_driver.time.monotonic", lambda: now[0])
    return now


def test_warm_up_ends_when_latencies_settle(clock: list[float]) -> None:
    durations = [1.0, 9.0, 1.0, 5.0, 2.0, 2.01, 1.99, 2.0, 2.0, 99.0]
    engine: Any = Engine(clock, durations)
    runs = []
    record = not_none(warm_up(engine, [10, 30, 20], WarmupConfig(n_warmup=2), lambda run, most: runs.append(run)))
    assert engine.ran == [30, 20, 30, 20] + [20] * 5
    assert (record.runs, record.converged) == (9, True)
    assert not_none(record.cv) < 0.05
    assert record.seconds == pytest.approx(sum(durations[:9]))
    assert runs == list(range(1, 10))


def test_warm_up_uses_its_last_latencies(clock: list[float]) -> None:
    settled = [9.0, 1.0, 9.0, 1.0, *[2.0] * 20]
    engine: Any = Engine(clock, settled)
    record = not_none(
        warm_up(engine, [1], WarmupConfig(n_warmup=1, min_prompts=8, window_size=3), lambda run, most: None)
    )
    assert (record.runs, record.converged, record.cv) == (9, True, 0.0)


def test_warm_up_that_does_not_settle_ends_unconverged(clock: list[float]) -> None:
    engine: Any = Engine(clock, [1.0, 2.0] * 20)
    record = not_none(warm_up(engine, [1], WarmupConfig(n_warmup=1, max_prompts=12), lambda run, most: None))
    assert (record.runs, record.converged) == (12, False)
    assert not_none(record.cv) > 0.05


def test_warm_up_without_detection_runs_n_warmup_times(clock: list[float]) -> None:
    engine: Any = Engine(clock, [1.0, 2.0] * 20)
    record = not_none(
        warm_up(engine, [1], WarmupConfig(n_warmup=3, convergence_detection=False), lambda run, most: None)
    )
    assert (record.runs, record.converged) == (6, None)


def test_warm_up_keeps_the_load_on(clock: list[float]) -> None:
    engine: Any = Engine(clock, [1.0] * 50)
    config = WarmupConfig(n_warmup=3, convergence_detection=False, thermal_floor_seconds=20)
    assert not_none(warm_up(engine, [1], config, lambda run, most: None)).seconds == 20


@pytest.mark.parametrize(
    ("durations", "runs", "settled"),
    [([1.0, 1.0, 2.0, 1.0, *[2.0] * 20], 4, True), ([1.0, 2.0, 2.0, *[9.0, 2.0] * 20], 3, False)],
)
def test_warm_up_has_settled_if_its_last_runs_have(
    clock: list[float], durations: list[float], runs: int, settled: bool
) -> None:
    engine: Any = Engine(clock, durations)
    config = WarmupConfig(n_warmup=1, window_size=2, min_prompts=2, max_prompts=4, thermal_floor_seconds=20)
    seen: list[int | None] = []
    record = not_none(warm_up(engine, [1], config, lambda run, most: seen.append(most)))
    assert record.converged == settled == (not_none(record.cv) < config.cv_threshold)
    assert seen == [4] * runs + [None] * (record.runs - runs)


def test_warm_up_may_be_switched_off(clock: list[float]) -> None:
    engine: Any = Engine(clock, [])
    assert warm_up(engine, [1], WarmupConfig(enabled=False), lambda run, most: None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"window_size": 30},
            "window_size 30 .* max_prompts 20 allows 15 .* max_prompts to 35,",
        ),
        ({"min_prompts": 6, "n_warmup": 3, "max_prompts": 8}, "min_prompts 6 .* allows 5 .* max_prompts to 9,"),
    ],
)
def test_warm_up_that_can_never_settle_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupConfig(**changes)
    WarmupConfig(**changes, convergence_detection=False)
    WarmupConfig(n_warmup=1, max_prompts=3)  # as in studies for LLenergyMeasure: the defaults are not refused


def test_shortest_warm_up_that_can_settle_does(clock: list[float]) -> None:
    config = WarmupConfig(window_size=6, n_warmup=3, max_prompts=9)
    engine: Any = Engine(clock, [1.0] * 9)
    record = not_none(warm_up(engine, [1], config, lambda run, most: None))
    assert (record.runs, record.converged) == (9, True)


def test_an_unsettled_warm_up_is_a_warning() -> None:
    warmup = {"n_warmup": 1, "max_prompts": 6, "cv_threshold": 1e-9}
    result = run(warmup=warmup).result
    assert result.warmup.converged is False
    assert any(warning.startswith("warm-up stopped after 6 runs") for warning in texts(result.warnings))


@pytest.mark.parametrize(
    ("sequences", "sizes"),
    [
        (None, [8, 8] * 5 + [40]),
        (16, [16, 16] * 5 + [40]),
        (40, [40, 40] * 5),  # as many as a pass has
        (64, [40, 40] * 5),
    ],
)
def test_one_batch_warms_up_with_as_many_requests_as_run_at_a_time(
    noop_engine: None, monkeypatch: pytest.MonkeyPatch, sequences: int | None, sizes: list[int]
) -> None:
    from noop_engine import NoopEngine, NoopOptions

    ran: list[int] = []
    generate = NoopEngine.generate

    def logged(made: NoopEngine, batch: Any) -> Any:
        ran.append(len(batch))
        return generate(made, batch)

    monkeypatch.setattr(NoopEngine, "generate", logged)
    monkeypatch.setattr(NoopOptions, "needs", lambda made, config, parameters: Needs(sequences=sequences))
    run(n=40, noop={"size": 40}, warmup={"n_warmup": 5, "convergence_detection": False})
    assert ran[: len(sizes)] == sizes
    assert set(ran[len(sizes) :]) == {40}, "the window"


def test_latency_percentiles_are_over_requests_and_gaps() -> None:
    requests = [record(1, [1] * n, ttft_s=0.1 * n, itl_s=[0.01 * n] * (n - 1), e2e_s=float(n)) for n in (1, 2, 3)]
    metrics = Requests([requests]).latency_metrics()
    assert metrics["ttft_p50_ms"].value == pytest.approx(200)
    assert metrics["itl_p50_ms"].value == pytest.approx(30)
    assert metrics["e2e_p50_ms"].value == pytest.approx(2000)
    assert metrics["e2e_p99_ms"].value == pytest.approx(2980)
    two = Requests([requests[:2], requests[2:]])
    assert two.latency_metrics() == metrics, "of all passes"


def test_latencies_that_the_engine_does_not_report_are_null() -> None:
    requests = Requests([[RequestRecord(1, [1, 2])]], latency_unknown_reason="beams have no tokens to time")
    assert {metric.value for metric in requests.latency_metrics().values()} == {None}
    assert requests.latency_metrics()["ttft_p50_ms"].reason == "beams have no tokens to time"
    assert requests.to_csv(0.0).splitlines()[1] == "1,0,1,2,,,,,,,,,,,"


def test_digest_differs_between_outputs() -> None:
    def digest(*rows: Any) -> Any:
        return Requests([[RequestRecord(1, row) for row in rows]]).output_digest()

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    assert len({digest([1, 2], [3]), digest([1], [2, 3]), digest([1, 2, 3]), digest([12], [3])}) == 4


def test_a_result_survives_json() -> None:
    result = run().result
    again = type(result).model_validate_json(result.model_dump_json())
    assert again == result
    assert json.loads(result.model_dump_json())["identity"]["cycle"] == 1
