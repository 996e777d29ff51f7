"""Request records of engines are checked against the clock, and their number is limited."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pytest_llem import ExperimentConfig
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement import engine_reports
from pytest_llem.measurement import pass_window as drivers
from pytest_llem.measurement.engine_reports import (
    MAX_REQUESTS,
    MAX_TOKENS,
    check_engine_reports,
    recorded_passes,
    too_fast_reason,
)
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.measurement.pass_window import measure
from pytest_llem.measurement.records import Measured
from pytest_llem.measurement.requests import BEFORE_WINDOW, Requests
from pytest_llem.results.quality_warnings import QualityWarning, worst
from tests.conftest import NOOP_STUDY
from tests.support.clock import clock
from tests.support.measured import pass_window, record
from tests.support.warned import texts

#: Four tokens: the first after 10 ms, the others 2 ms apart.
RECORD = record(3, [7, 7, 7, 7], ttft_s=0.010, itl_s=[0.002] * 3, e2e_s=0.016)

FIELDS = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}


def config(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({**FIELDS, "baseline": {"enabled": False}, **changes})


def run(**changes: Any) -> Measured:
    return ExperimentOrchestrator(config(**changes)).run()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"last_token": 0.030}, "itself: last_token differs from token_times[-1] by 14 ms"),
        ({"last_token": 0.012}, "itself: last_token differs from token_times[-1] by 4 ms"),
        ({"first_token": 0.005}, "itself: first_token differs from token_times[0] by 5 ms"),
        ({"token_times": [], "first_token": 0.020}, "itself: its times are not in the order"),
        ({"token_times": [0.010, 0.016, 0.012, 0.016]}, "itself: its times are not in the order"),
        ({"admitted": 0.015}, "itself: its times are not in the order"),
        ({"output_ids": [7] * 5}, "itself: it reports the times of 4 tokens, and 5 tokens"),
        ({"output_ids": []}, "itself: it reports the times of 4 tokens, and 0 tokens"),
        ({"input_tokens": 2}, "its input: it reports 2 input tokens for a prompt of 3"),
        (
            {"token_times": [], "last_token": 0.022},
            "the clock: its times span 22 ms, and the pass took 20 ms",
        ),
        (
            {"sent": 5.0, "token_times": [], "first_token": None, "last_token": None},
            "the clock: its times are 5000 ms to 5000 ms after the start of the window, which took 40 ms",
        ),
        ({"sent": -1.0}, "the clock: its times are -1000 ms to 16 ms after the start of the window"),
        ({"last_token": math.nan}, "itself: last_token differs from token_times[-1] by nan ms"),
    ],
)
def test_contradiction_is_an_error(changes: dict[str, Any], problem: str) -> None:
    """One contradiction in any pass suffices."""
    wrong = replace(RECORD, **changes)
    with pytest.raises(ValueError, match="the engine contradicts") as error:
        _check([[RECORD, RECORD], [RECORD, wrong]], [[5, 6, 7]] * 2, 6, 0.020)
    assert str(error.value).startswith(f"the engine contradicts {problem}")
    assert str(error.value).endswith("(request 2 of 2)")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"last_token": 0.0168},  # rounded
        {"token_times": []},
        {"token_times": [], "first_token": None},
        {"token_times": [], "first_token": None, "last_token": None},
        {"admitted": 0.001},
        {"output_ids": None, "token_times": [], "output_count": 4},
        {"output_ids": [], "token_times": [], "first_token": None},
        {"output_ids": [7], "token_times": [0.010], "last_token": None, "error": "out of memory"},
    ],
)
def test_consistent_reports_are_accepted(changes: dict[str, Any]) -> None:
    _check([[replace(RECORD, **changes)]], [[5, 6, 7]], 3, 0.016)


def test_engine_that_appends_to_its_prompts_is_an_error(
    noop_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import noop_engine as package

    generate = package.NoopEngine.generate

    def append(self: Any, batch: Any) -> Any:
        for prompt in batch:
            prompt.append(7)
        return generate(self, batch)

    monkeypatch.setattr(package.NoopEngine, "generate", append)
    with pytest.raises(ValueError, match=r"its input: it reports \d+ input tokens for a prompt of 4 \("):
        run()


def test_fewer_positions_than_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="contradicts its input: it reports 2 positions for 3 tokens"):
        _check([[RECORD]], [[5, 6, 7]], 2, 0.016)


def _check(
    passes: Sequence[Sequence[RequestRecord]], prompts: Sequence[list[int]], positions: int, seconds: float
) -> None:
    window = pass_window([[]], seconds * len(passes), Account((), Total(None, "unavailable")))
    check_engine_reports(passes, prompts, positions, [seconds] * len(passes), window)


def test_engine_whose_latencies_exceed_its_passes_fails(
    noop_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real case: an engine that returned at once and reported 12 ms."""
    from noop_engine import NoopEngine

    def answer(
        made: NoopEngine, batch: Sequence[list[int]], generated: tuple[float, float]
    ) -> list[RequestRecord]:
        began, _ = generated
        return [record(4, [7, 7, 7], ttft_s=0.008, itl_s=[0.002] * 2, sent=began - 0.012)] * len(batch)

    monkeypatch.setattr(NoopEngine, "requests", answer)
    with pytest.raises(ValueError, match="the engine contradicts the clock: its"):
        run()


class TestTooFast:
    @pytest.mark.parametrize(
        ("lengths", "seconds", "expected"),
        [
            ([[128, 128]], 2e-6, True),
            ([[128, 128]], 1.3e-4, False),
            ([[128], [128]], 1.3e-4, True),  # one batch after the other
            ([[1]], 2e-6, False),
            ([[0]], 0.0, False),
        ],
    )
    def test_limit_depends_on_tokens_in_sequence(
        self, lengths: list[list[int]], seconds: float, expected: bool
    ) -> None:
        one = [[RequestRecord(1, [7] * length) for length in batch] for batch in lengths]
        assert (too_fast_reason([one, one], [seconds, seconds]) is not None) is expected

    def test_no_gate_judges_impossibly_fast_passes(
        self, noop_engine: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from noop_engine import NoopEngine

        monkeypatch.setattr(NoopEngine, "generate", lambda made, batch: None)
        monkeypatch.setattr(
            NoopEngine, "requests", lambda made, batch, _: [RequestRecord(4, [7] * 500) for _ in batch]
        )
        result = run(max_output_tokens=500).result
        (warning,) = [one for one in result.warnings if one.code == "impossibly_fast"]
        assert "the engine returned before its work was done, or did none; no gate judges" in warning.text
        assert worst([QualityWarning.of("drift", "drift"), warning], 1) == [warning]
        assert {name for name, one in result.metrics.items() if one.not_judged is None} == BEFORE_WINDOW


class Counting:
    """An engine whose output is the number of the pass, with a given duration of a pass."""

    def __init__(self, now: list[float], seconds: float) -> None:
        self.now, self.seconds, self.passes = now, seconds, 0

    def seed(self, seed: int) -> None:
        self.passes += 1

    def generate(self, batch: str) -> int:
        self.now[0] += self.seconds
        return self.passes

    def synchronize(self) -> None: ...


class TestRecords:
    @pytest.mark.parametrize(
        ("passes", "keep", "kept", "numbers"),
        [
            (7, sys.maxsize, [1, 2, 3, 4, 5, 6, 7], []),
            (4, 4, [1, 2, 3, 4], []),
            (5, 4, [1, 3, 5], [1, 3, 5]),
            (100, 8, [1, 17, 33, 49, 65, 81, 97], [1, 17, 33, 49, 65, 81, 97]),
            (1000, 2, [1, 513], [1, 513]),
        ],
    )
    def test_kept_passes_are_spread_over_the_window(
        self, monkeypatch: pytest.MonkeyPatch, passes: int, keep: int, kept: list[int], numbers: list[int]
    ) -> None:
        now = [0.0]
        monkeypatch.setattr(drivers, "time", clock(lambda: now[0]))
        engine: Any = Counting(now, 1.0)
        window = measure(engine, ["batch"], Meters(), min_seconds=passes, seed=0, keep=keep)
        assert [outputs for (outputs,) in window.passes] == kept
        assert (window.count, window.seconds, [*window.numbers]) == (passes, passes, numbers)
        assert window.pass_seconds == [1.0] * len(kept)

    def test_number_of_kept_passes_depends_on_their_size(self) -> None:
        assert recorded_passes(config(n=100, max_output_tokens=1)) == MAX_REQUESTS // 100
        assert recorded_passes(config(n=100, max_output_tokens=1000)) == MAX_TOKENS // 100_000
        assert recorded_passes(config(n=1_000_000, max_output_tokens=1000)) == 2, "two passes are always compared"

    def test_all_passes_of_a_long_window_are_counted(
        self, noop_engine: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_reports, "MAX_REQUESTS", 20)
        outcome = run(measurement={"min_window_seconds": 0.1})
        window, tokens = outcome.result.window, outcome.result.tokens
        kept = window.recorded_passes
        assert kept is not None
        assert window.passes is not None
        assert 5 <= kept <= 10 < window.passes
        assert (tokens.requests, tokens.output_tokens) == (2 * kept, 6)
        metrics = {name: one.value for name, one in outcome.result.metrics.items()}
        assert metrics["seconds"] == pytest.approx(window.window_seconds / window.passes)
        assert metrics["energy_j"] == pytest.approx((window.window_energy_j or 0) / window.passes)
        assert metrics["output_tokens_per_second"] == pytest.approx(6 * window.passes / window.window_seconds)
        assert (
            f"records of {kept:,} of {window.passes:,} passes were kept: latencies, output tokens and failed "
            "requests include only these"
        ) in texts(outcome.result.warnings)
        rows = outcome.files["requests.csv"].splitlines()[1:]
        numbers = sorted({int(row.partition(",")[0]) for row in rows})
        assert len(rows) == 2 * kept
        assert numbers == list(range(1, window.passes + 1, numbers[1] - numbers[0]))[:kept]

    def test_no_warning_if_every_pass_is_kept(self, noop_engine: None) -> None:
        result = run().result
        assert result.window.recorded_passes == result.window.passes == 1
        assert not [one for one in result.warnings if one.code == "passes_not_recorded"]

    def test_requests_know_their_pass(self) -> None:
        requests = Requests([[RECORD], [RECORD]], numbers=[1, 9])
        assert [row.split(",")[0] for row in requests.to_csv(0.0).splitlines()[1:]] == ["1", "9"]
