"""An engine that answers repeated prompts faster is measured at cache lookups, which no gate judges."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.energy.account import Meters
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.measurement.quality_warnings import faster_repeats_warning
from pytest_llem.measurement.requests import Requests
from tests.conftest import NOOP_STUDY
from tests.support.clock import clock
from tests.support.measured import pass_window, record
from tests.support.warned import texts

pytestmark = pytest.mark.usefixtures("noop_engine")

FRESH, CACHED = 0.04, 0.001


def run(directory: Path = Path(), **changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    fields |= {"n": 2, "max_input_tokens": 40, "baseline": {"enabled": False}, "energy": {"backend": None}}
    fields |= {"warmup": {"n_warmup": 2, "max_prompts": 8}, "measurement": {"min_window_seconds": 0.3}}
    config = ExperimentConfig.model_validate({**fields, **changes})
    return ExperimentOrchestrator(config, directory=directory).run().result


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Make the engine cache its answers, and return the list of its prompts, in order."""
    import noop_engine

    calls: list[tuple[tuple[int, ...], ...]] = []

    def generate(self: Any, batch: Any) -> tuple[float, float]:
        key = tuple(map(tuple, batch))
        began = time.monotonic()
        time.sleep(CACHED if key in calls else FRESH)
        calls.append(key)
        return began, time.monotonic()

    monkeypatch.setattr(noop_engine.NoopEngine, "generate", generate)
    return calls


@pytest.mark.parametrize("size", [1, 2], ids=["2 batches", "1 batch"])
def test_no_gate_judges_an_engine_that_keeps_its_answers(
    size: int, asked: list[tuple[tuple[int, ...], ...]]
) -> None:
    result = run(noop={"size": size})
    (warning,) = [one for one in texts(result.warnings) if "cache" in one]
    assert re.match(r"a batch took [\d.]+ ms in the first pass and", warning)
    reason = result.metrics["output_tokens_per_second"].not_judged
    assert warning == f"{reason}; no gate judges it: disable the engine's caches of prompts and answers"
    assert result.metrics["load_seconds"].not_judged is None
    assert result.window.restarts == 0, "a second window would repeat the prompts and show nothing"


@pytest.mark.parametrize("delays", [{0}, {0, 1}, {0, 2}], ids=["in the window", "and then", "and once more"])
def test_delayed_first_pass_is_not_taken_for_a_cache(delays: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is busy when the window's prompts run first, and also when one of the other sets does."""
    import noop_engine

    sets: list[Any] = []
    ran: list[Any] = []
    now = 0.0

    def prepare(self: Any, prompts: Any) -> Any:
        sets.append(prompts)
        return [prompts]

    def generate(self: Any, batch: Any) -> tuple[float, float]:
        nonlocal now
        began, number = now, sets.index(batch) - 1
        now += 0.4 if number in delays and batch not in ran else 0.05
        ran.append(batch)
        return began, now

    for module in ("pass_driver", "pass_window"):
        monkeypatch.setattr(f"pytest_llem.measurement.{module}.time", clock(lambda: now))
    monkeypatch.setattr(noop_engine.NoopEngine, "prepare", prepare)
    monkeypatch.setattr(noop_engine.NoopEngine, "generate", generate)
    result = run(measurement={"min_window_seconds": 0.6})
    assert len(sets) == (4 if delays == {0} else 5), "warm-up, window, and two sets, or three if these differ"
    assert result.metrics["output_tokens_per_second"].not_judged is None
    assert not [one for one in texts(result.warnings) if "cache" in one]


def test_single_pass_has_prompts_that_warm_up_did_not_run(asked: list[tuple[tuple[int, ...], ...]]) -> None:
    """A single pass repeats no prompt, so that caches cannot distort it."""
    result = run(measurement={"min_window_seconds": 0}, dataset={"n": 3, "input_len": {"min": 9, "max": 30}})
    assert len(asked) == result.warmup.runs + 3
    assert not set(asked[-3:]) & set(asked[:-3])
    assert result.metrics["seconds"].value >= 3 * FRESH
    assert result.metrics["seconds"].not_judged is None


def test_warm_up_prompts_of_texts_are_as_long_and_hold_their_tokens(
    asked: list[tuple[tuple[int, ...], ...]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("The quick brown fox\njumps\n")
    run(tmp_path, dataset="prompts.txt", measurement={"min_window_seconds": 0})
    texts = [tuple(b"The quick brown fox"), tuple(b"jumps")]
    *before, first, second = [batch[0] for batch in asked]
    assert [first, second] == texts
    assert not set(before) & set(texts)
    assert {len(prompt) for prompt in before} == {19}, "the longest one and the median one"
    assert {token for prompt in before for token in prompt} <= {token for text in texts for token in text}


def window(*call_seconds: Sequence[float], pass_seconds: Sequence[float] = ()) -> PassWindow:
    meters = Meters()
    return pass_window([[]], 1.0, meters.end(), pass_seconds, call_seconds=call_seconds)


def requests(*ttft_s: Sequence[float], size: int = 1) -> Requests:
    """Return requests with the given times, in batches of *size*."""
    passes = [[record(4, [1], ttft_s=seconds) for seconds in one] for one in ttft_s]
    return Requests(passes, sizes=[size] * (len(ttft_s[0]) // size))


def test_prompt_cache_is_detected_by_first_tokens() -> None:
    """Most of a batch's time is decoding, which a prompt cache does not shorten."""
    calls = window(*[[1.0] * 5] * 3)
    found = faster_repeats_warning(calls, requests([0.09] * 5, [0.03] * 5, [0.03] * 5))
    assert found == (
        "a first token took 90 ms in the first pass and 30 ms in later ones, which repeat its prompts: "
        "the engine may answer them from a cache"
    )
    assert faster_repeats_warning(calls, requests([0.04] * 5, [0.03] * 5, [0.03] * 5)) is None


def test_delayed_batch_is_not_taken_for_a_cache() -> None:
    calls = window([1.0], [1.0], [1.0])
    assert faster_repeats_warning(calls, requests([0.08] * 6, [0.03] * 6, [0.03] * 6, size=6)) is None
    assert faster_repeats_warning(calls, requests([0.10] * 6, [0.03] * 6, [0.03] * 6, size=6)) is not None


def test_asynchronous_engine_is_judged_by_pass_durations() -> None:
    calls = [[1e-5, 1e-5]] * 3
    found = faster_repeats_warning(window(*calls, pass_seconds=[2.0, 0.05, 0.05]), requests(*[[0.0] * 2] * 3))
    assert found is not None
    assert found.startswith("a pass took 2000 ms in the first pass and 50 ms")


def test_single_delayed_run_is_not_taken_for_a_cache() -> None:
    no_ttft = requests([0.0], [0.0], [0.0])
    assert faster_repeats_warning(window([0.9, 0.1, 0.1, 0.1, 0.1], *[[0.1] * 5] * 2), no_ttft) is None
    assert faster_repeats_warning(window([0.011], [0.001], [0.001], [0.001], [0.012]), no_ttft) is None
    assert faster_repeats_warning(window([0.25], [0.1], [0.1]), no_ttft) is None
    assert faster_repeats_warning(window([9.0, 9.0]), requests([0.0])) is None


def test_failed_requests_are_not_taken_for_a_cache() -> None:
    answered, failed = record(4, [1], ttft_s=0.2), record(4, [], error="no answer")
    one_each = Requests([[answered], [failed], [failed]], sizes=[1])
    assert faster_repeats_warning(window(*[[1.0]] * 3), one_each) is None
