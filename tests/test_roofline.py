"""The roofline of a pass: values by hand, scaling, and the reasons if it is not known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.engines.protocol import ModelShape, RequestRecord, ShapeUnknownError
from pytest_llem.hardware import peaks
from pytest_llem.hardware.peaks import Peaks, peaks_of
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.roofline import NAMES, roofline_seconds, steps, work_metrics
from pytest_llem.results.experiment import EngineRecord
from tests.conftest import NOOP_STUDY
from tests.support.narrow import not_none

#: A thousand weights in layers and a hundred in the head, 2 bytes each; 5 keys and values a token, 4 bytes each.
SHAPE = ModelShape(
    parameters=1000,
    head_parameters=100,
    attention_width=10,
    kv_values_per_token=5,
    kv_bytes_per_value=4,
    weight_bytes=2200,
    precision="bf16",
)

#: 1000 FLOP/s, 100 B/s.
SLOW = Peaks({"bf16": 1000.0}, 100.0, cache_bytes=2000)

GPU = EngineRecord(name="e", device="cuda", device_names=["Slow GPU"])


def records(*lengths: Any) -> Any:
    return [RequestRecord(tokens_in, [7] * tokens_out) for tokens_in, tokens_out in lengths]


class Engine:
    """An engine that returns a shape or raises."""

    def __init__(self, shape: Any = SHAPE) -> None:
        self.given = shape

    def shape(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


@pytest.fixture(autouse=True)
def _slow_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peaks._PEAKS, "Slow GPU", SLOW)


def work(requests: Any, seconds: float = 1.0, *, engine: Any = None, record: Any = GPU) -> Any:
    made: Any = engine or Engine()
    return work_metrics(made, record, requests, seconds)


def test_work_of_a_batch_is_that_computed_by_hand() -> None:
    """Prompts of 3 and 2 tokens, answers of 3 and 1: the second row ends after prefill."""
    prefill, first, second = steps(SHAPE, [(3, 3), (2, 1)])
    # 2·1000·(3+2) in layers, 2·100·2 in the head, 4·10·(9+4) in attention, of which 4·10·(6+3) is causal
    assert prefill.flops == 10_000 + 400 + 520
    assert prefill.min_flops == 10_000 + 400 + 360
    assert prefill.bytes == 2200
    # the first row alone, at a context of 4 and 5 tokens: 2·1100 + 4·10·c, and 20 bytes a token of context
    assert (first.flops, first.min_flops, first.bytes) == (2200 + 160, 2200 + 160, 2200 + 80)
    assert (second.flops, second.min_flops, second.bytes) == (2200 + 200, 2200 + 200, 2200 + 100)

    # prefill: 10.76 s of arithmetic and 22 s of reading; steps: 2.36 s and 22.8 s, 2.4 s and 23 s
    found = work(Requests([records((3, 3), (2, 1))]), seconds=135.6)
    assert found["flops"].value == 10_920 + 2360 + 2400
    assert found["roofline_slowdown"].value == pytest.approx(135.6 / (22 + 22.8 + 23))
    assert found["mbu"].value == pytest.approx((2200 + 2280 + 2300) / 135.6 / 100)
    assert found["mfu"].value == pytest.approx(15_680 / 135.6 / 1000)


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    prefill, step = steps(SHAPE, [(3, 2)])
    assert roofline_seconds(prefill, SLOW, 1000) == 22.0
    assert roofline_seconds(prefill, SLOW, 100) == pytest.approx((6000 + 200 + 240) / 100)
    assert roofline_seconds(step, SLOW, 1000) == pytest.approx(22.8)
    assert roofline_seconds(step, SLOW, 10) == pytest.approx(236.0)


def test_weights_are_read_once_for_a_batch_and_context_for_each_row() -> None:
    """One pass has two batches of one, the other one batch of two."""
    alone = Requests([records((3, 2), (3, 2))], sizes=[1, 1])
    together = Requests([records((3, 2), (3, 2))], sizes=[2])
    assert [len(batch) for batch in alone.batches()] == [1, 1]
    assert work(alone)["flops"].value == work(together)["flops"].value
    assert work(alone)["mbu"].value == pytest.approx(2 * (2200 + 2280) / 100)
    assert work(together)["mbu"].value == pytest.approx((2200 + 2200 + 160) / 100)


def test_passes_that_differ_are_averaged() -> None:
    both = work(Requests([records((3, 2)), records((3, 4))]))
    first, second = (work(Requests([records((3, tokens))])) for tokens in (2, 4))
    for name in ("flops", "mfu", "mbu"):
        assert both[name].value == pytest.approx((first[name].value + second[name].value) / 2)
    floors = [1 / one["roofline_slowdown"].value for one in (both, first, second)]
    assert floors[0] == pytest.approx((floors[1] + floors[2]) / 2)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_work_grows_with_each_dimension(tokens: int) -> None:
    base = Requests([records((5, tokens))])
    base_time = 1 / work(base)["roofline_slowdown"].value

    def least_time(requests: Any = base, **changes: Any) -> Any:
        return 1 / work(requests, engine=Engine(replace(SHAPE, **changes)))["roofline_slowdown"].value

    assert least_time(weight_bytes=22_000, kv_bytes_per_value=40) == pytest.approx(10 * base_time), "memory-bound"
    assert least_time(Requests([records((5, tokens + 1))])) > base_time
    assert least_time(Requests([records((6, tokens))])) >= base_time
    assert least_time(Requests([records((5, tokens), (5, tokens))])) >= base_time
    assert least_time(parameters=10**9) > base_time
    assert work(base, seconds=2)["roofline_slowdown"].value == pytest.approx(
        2 * work(base)["roofline_slowdown"].value
    )


def test_nothing_generated_still_takes_its_prefill() -> None:
    (only,) = steps(SHAPE, [(3, 0)])
    assert only.flops == 6000 + 200 + 360


# ---- unknown rooflines ----


def reasons(found: Any) -> Any:
    assert set(found) == set(NAMES)
    assert all((one.value is None) == bool(one.reason) for one in found.values())
    return {name: one.reason for name, one in found.items()}


REQUESTS = Requests([records((3, 2))])


def test_engine_without_a_shape_has_no_roofline() -> None:
    assert set(reasons(work(REQUESTS, engine=object())).values()) == {
        "the engine does not report the shape of its model"
    }


def test_unknown_shape_has_its_reason() -> None:
    found = work(REQUESTS, engine=Engine(ShapeUnknownError("the weights are quantised")))
    assert set(reasons(found).values()) == {"the weights are quantised"}
    found = work(REQUESTS, engine=Engine(KeyError("oops")))
    assert set(reasons(found).values()) == {"the engine's shape() failed: KeyError: 'oops'"}


def test_context_beyond_the_sliding_window_has_no_roofline() -> None:
    narrow = Engine(replace(SHAPE, sliding_window=4))
    reason = "a context of 5 tokens is longer than the model's sliding window of 4"
    assert set(reasons(work(REQUESTS, engine=narrow)).values()) == {reason}
    assert work(REQUESTS, engine=Engine(replace(SHAPE, sliding_window=5))) == work(REQUESTS)


def test_a_processor_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llem.measurement.roofline.cpu_model", lambda: "A Fast CPU")
    found = reasons(work(REQUESTS, record=EngineRecord(name="e", device="cpu")))
    assert found.pop("flops") is None
    assert set(found.values()) == {"the peaks of A Fast CPU are not known"}


def test_unknown_gpu_has_no_peaks() -> None:
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Unheard 9000"):
        record = EngineRecord(name="e", device="cuda", device_names=[name])
        found = reasons(work(REQUESTS, record=record))
        assert found.pop("flops") is None
        assert set(found.values()) == {f"the peaks of {name} are not known"}


def test_peaks_of_equal_devices_add_up() -> None:
    two = EngineRecord(name="e", device="cuda", device_names=["Slow GPU"] * 2)
    large = Engine(replace(SHAPE, weight_bytes=5000))
    found, one = work(REQUESTS, engine=large, record=two), work(REQUESTS, engine=large)
    assert found["mfu"].value == pytest.approx(one["mfu"].value / 2)
    assert found["roofline_slowdown"].value == pytest.approx(2 * one["roofline_slowdown"].value)
    cached = reasons(work(REQUESTS, engine=Engine(replace(SHAPE, weight_bytes=4000)), record=two))
    assert cached["mbu"] is not None, "the weights fit both caches"


def test_peaks_of_different_devices_do_not_add_up() -> None:
    mixed = EngineRecord(name="e", device="cuda", device_names=["Slow GPU", "Fast GPU"])
    found = reasons(work(REQUESTS, record=mixed))["mbu"]
    assert found == "the model ran on Fast GPU and Slow GPU, whose peaks cannot be added"


def test_precision_without_a_peak_still_has_mbu() -> None:
    found = work(REQUESTS, engine=Engine(replace(SHAPE, precision="tf32")))
    assert found["mbu"].value == work(REQUESTS)["mbu"].value
    assert reasons(found)["mfu"] == reasons(found)["roofline_slowdown"] == "the tf32 peak of Slow GPU is not known"


def test_weights_that_fit_the_cache_have_no_mbu() -> None:
    found = work(REQUESTS, engine=Engine(replace(SHAPE, weight_bytes=2000)))
    assert found["mfu"].value == work(REQUESTS)["mfu"].value
    expected = "the weights (0 MB) fit the cache of Slow GPU (0 MB)"
    assert reasons(found)["mbu"] == reasons(found)["roofline_slowdown"] == expected
    assert work(REQUESTS, engine=Engine(replace(SHAPE, weight_bytes=2001)))["mbu"].value is not None


# ---- peaks ----


def test_peaks_are_found_by_the_names_of_cuda() -> None:
    h100 = not_none(peaks_of("NVIDIA H100 80GB HBM3"))
    assert (h100.flops["bf16"], h100.bandwidth, h100.cache_bytes) == (989.5e12, 3.35e12, 50 * 2**20)
    assert peaks_of("A100-SXM4-40GB") == peaks_of("NVIDIA A100-SXM4-40GB")
    assert "bf16" not in not_none(peaks_of("Tesla V100-SXM2-16GB")).flops
    assert peaks_of("AMD Instinct MI300X") is None


@pytest.mark.parametrize("name", [name for name in peaks._PEAKS if name != "Slow GPU"])
def test_peaks_have_plausible_magnitudes(name: str) -> None:
    """Tera not giga, dense not sparse: the machine balance of known GPUs lies in a narrow band."""
    known = peaks._PEAKS[name]
    assert 50e12 <= known.flops["fp16"] <= 2500e12
    assert 1 < known.flops["fp16"] / known.flops["fp32"] < 30
    assert 50 < known.flops["fp16"] / known.bandwidth < 500
    assert 2**22 <= known.cache_bytes <= 2**27


# ---- whole experiments ----


@pytest.fixture
def run(noop_engine: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    import noop_engine as module

    def measured(shape: Any, seconds: float = 0.0, batch: int = 1, **changes: Any) -> Any:
        fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
        config = {**fields, "baseline": {"enabled": False}, "noop": {"seconds": seconds, "size": batch}, **changes}
        monkeypatch.setattr(module.NoopEngine, "shape", Engine(shape).shape, raising=False)
        monkeypatch.setattr(module.NoopEngine, "describe", lambda self: GPU)
        return ExperimentOrchestrator(ExperimentConfig.model_validate(config)).run().result

    return measured


def test_every_result_holds_every_metric(run: Callable[..., Any]) -> None:
    for shape in (SHAPE, ShapeUnknownError("no")):
        result = run(shape)
        assert set(result.metrics) == set(CATALOGUE)
        for name, one in result.metrics.items():
            assert one.unit == CATALOGUE[name].unit
            assert (one.value is None) == bool(one.reason), name


def test_every_metric_is_defined() -> None:
    for name, one in CATALOGUE.items():
        assert all((one.unit, one.meaning)), name
        assert one.better in ("lower", "higher", None), name


def test_roofline_is_that_of_the_experiments_batches(run: Callable[..., Any]) -> None:
    """Two prompts of 4 tokens, 3 new ones each: 2200, 2200 + 5·20 and 2200 + 6·20 bytes for a row alone."""
    alone, together = run(SHAPE, seconds=0.01), run(SHAPE, seconds=0.01, batch=2)
    moved = {1: 2 * (3 * 2200 + 220), 2: 3 * 2200 + 2 * 220}
    for result, size in ((alone, 1), (together, 2)):
        seconds = result.metrics["seconds"].value
        assert result.metrics["mbu"].value == pytest.approx(moved[size] / seconds / 100)
        assert result.metrics["roofline_slowdown"].value == pytest.approx(seconds / (moved[size] / 100))


def test_faster_than_the_roofline_is_a_bug(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes milliseconds, but its roofline time is 136 s."""
    (warning,) = [one for one in run(SHAPE).warnings if one.code == "faster_than_roofline"]
    assert "please report it" in warning.text
    monkeypatch.setitem(peaks._PEAKS, "Slow GPU", Peaks({"bf16": 1e15}, 1e12, 0))
    assert not [one for one in run(SHAPE, seconds=0.001).warnings if one.code == "faster_than_roofline"]
