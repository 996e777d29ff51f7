"""A load: closed and open loops, their ramps and steady states, and the errors that end them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.engines.protocol import PreflightError, RequestRecord
from pytest_llem.serving.answers import Answer
from pytest_llem.serving.checks import check_client
from pytest_llem.serving.client import Client, Endpoint, LoadRequest
from pytest_llem.serving.errors import (
    ClientBoundError,
    DatasetExhaustedError,
    LoadError,
    NotSteadyError,
    ServerGoneError,
    TooManyErrors,
)
from pytest_llem.serving.load import Load
from pytest_llem.serving.schedule import ClosedLoop, OpenLoop, constant, from_trace, poisson
from tests.support.serving import all_in_flight, mock_server, requests

Schedule = ClosedLoop | OpenLoop


def under_load(
    schedule: Schedule,
    *server: str,
    dataset: Iterator[LoadRequest] | None = None,
    window: Callable[[Load], Awaitable[None]] = lambda load: load.hold(0.3),
    timeout_seconds: float = 60.0,
    **options: Any,
) -> tuple[Load, float, float]:
    """Put a mock server under load; the drained load, and begin and end of its window."""

    async def run(url: str) -> tuple[Load, float, float]:
        endpoint = Endpoint(url, token_ids=True, timeout_seconds=timeout_seconds)
        async with Client(endpoint, connections=64) as client:
            load = Load(client, dataset or requests(), schedule, **options)
            try:
                await load.begin()
                began = time.monotonic()
                await window(load)
                ended = time.monotonic()
            finally:
                await load.stop(timeout=60)
            return load, began, ended

    with mock_server(*(server or ("--step-ms", "2+0"))) as url:
        return asyncio.run(run(url))


def requests_ended(number: int) -> Callable[[Load], Awaitable[None]]:
    """Return a window in which *number* requests end."""
    return lambda load: load.hold(0.0, min_finished=number)


def test_closed_loop_keeps_its_concurrency_in_flight() -> None:
    load, began, ended = under_load(ClosedLoop(8))
    assert load.mean_in_flight(began, ended) == pytest.approx(8, abs=0.4)
    assert load.in_flight == 0
    assert all(request.record.error is None for request in load.records)
    assert load.finished == len(load.records)
    assert load.tokens_so_far == 8 * load.finished
    starts = [request.sent for request in load.records]
    assert starts == sorted(starts)
    assert len({request.index for request in load.records}) == len(load.records)


def test_next_request_is_sent_before_an_answer_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers often end together, and decoding them all takes longer than a request may be late."""
    order: list[tuple[str, Answer]] = []
    post, record = Client._post, Answer.record

    def posted(client: Client, body: bytes, answer: Answer) -> Any:
        order.append(("sent", answer))
        return post(client, body, answer)

    def recorded(answer: Answer, error: str | None) -> RequestRecord:
        order.append(("decoded", answer))
        return record(answer, error)

    monkeypatch.setattr(Client, "_post", posted)
    monkeypatch.setattr(Answer, "record", recorded)
    under_load(ClosedLoop(1), window=requests_ended(3))
    answers = [answer for what, answer in order if what == "sent"]
    assert len(answers) >= 4
    for answer, following in pairwise(answers):
        assert order.index(("sent", following)) < order.index(("decoded", answer))


def test_steady_state_begins_when_every_slot_has_finished() -> None:
    load, began, _ = under_load(ClosedLoop(8, ramp_seconds=0.2), "--step-ms", "5+0")
    first_starts = [request.sent for request in load.records][:8]
    assert sum(request.ended <= began for request in load.records) >= 8
    assert began - first_starts[0] >= 0.2 * 7 / 8


def test_slots_start_over_one_latency() -> None:
    """Prefills of slots in lock-step would wait for each other."""
    load, _, _ = under_load(ClosedLoop(8), "--step-ms", "5+0", window=requests_ended(8))
    spans = [(request.sent, request.ended) for request in load.records]
    latency = min(ended - sent for sent, ended in spans)
    assert all_in_flight(spans, 8) - min(ended for _, ended in spans) >= 0.8 * latency


def test_hold_waits_for_a_number_of_requests() -> None:
    load, began, ended = under_load(ClosedLoop(2), window=requests_ended(20))
    assert sum(began <= request.ended <= ended for request in load.records) >= 20


def test_drain_cancels_what_does_not_end_in_time() -> None:
    async def drain(load: Load) -> None:
        while load.finished < 5 or load.in_flight < 4:  # with the ninth request, the server stalls
            await load.hold(0.001)
        await load.stop(timeout=0.05)

    load, _, _ = under_load(
        ClosedLoop(4, ramp_seconds=0.0),
        *("--step-ms", "2+0", "--stall-after", "9", "--stall-seconds", "60"),
        window=drain,
    )
    errors = [request.record.error for request in load.records]
    # A request that is under way when the ninth is sent may end before the server receives that one.
    assert 1 <= errors.count("cancelled before the answer's end") <= 4
    assert (
        load.finished == errors.count(None) == len(errors) - errors.count("cancelled before the answer's end") > 0
    )


def test_conversation_keeps_its_slot() -> None:
    conversations = (LoadRequest(index, ["a", "b"], 4) for index in range(1000))

    async def run(url: str) -> Load:
        async with Client(Endpoint(url, api="chat"), connections=2) as client:
            load = Load(client, conversations, ClosedLoop(2))
            await load.begin()
            await load.hold(0.1)
            await load.stop(timeout=60)
            return load

    with mock_server("--step-ms", "2+0") as url:
        load = asyncio.run(run(url))
    numbers: dict[int, list[int]] = {}
    for request in load.records:
        numbers.setdefault(request.index, []).append(request.turn)
    assert all(turn == [0, 1] for turn in numbers.values())


def test_poisson_arrivals_are_those_of_their_seed() -> None:
    arrivals = list(islice(poisson(50.0, "7-1"), 5000))
    assert arrivals == list(islice(poisson(50.0, "7-1"), 5000))
    assert arrivals != list(islice(poisson(50.0, "7-2"), 5000))
    intervals = [after - before for before, after in pairwise(arrivals)]
    assert statistics.mean(intervals) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(intervals) == pytest.approx(1 / 50, rel=0.05)


def test_open_loop_sends_at_the_times_of_its_arrivals() -> None:
    load, began, ended = under_load(OpenLoop(constant(100.0)), window=lambda load: load.hold(0.5))
    due = [request.record.due for request in load.records]
    first = due[0]
    assert first is not None
    assert due == pytest.approx([first + number / 100 for number in range(len(due))])
    assert min(load.send_lags(began, ended)) >= 0
    assert all(request.sent >= (request.record.due or 0) for request in load.records)


def test_open_loop_ends_at_its_maximum_in_flight() -> None:
    schedule = OpenLoop(constant(1000.0), max_in_flight=20)
    with pytest.raises(NotSteadyError, match=r"not steady: 20 requests are in flight while .* were offered and"):
        under_load(schedule, "--step-ms", "20+0")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("trace.txt", "5\n\n5.5\n7\n", [0.0, 0.5, 2.0]),
        ("trace.jsonl", '{"timestamp": 100, "input_length": 6}\n{"timestamp": 350.5}\n', [0.0, 0.2505]),
        ("trace.csv", "Timestamp,Model\n2,a\n2.25,b\n", [0.0, 0.25]),
        (
            "trace.csv",
            "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9799600,4808\n2023-11-16 18:17:04.0319600,3180\n",
            [0.0, 0.052],
        ),
    ],
    ids=["text", "Mooncake", "BurstGPT", "Azure"],
)
def test_trace_has_times_from_its_first_arrival(
    tmp_path: Path, name: str, text: str, expected: list[float]
) -> None:
    (tmp_path / name).write_text(text)
    assert list(from_trace(tmp_path / name)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("trace.txt", "1\nsoon\n", r"trace\.txt:2: expected a time in s, not before .* \(got 'soon'\)"),
        ("trace.txt", "1\n0.5\n", r"trace\.txt:2: expected a time in s, not before .* \(got '0\.5'\)"),
        ("trace.txt", "nan\n", r"trace\.txt:1: expected a time in s"),
        ("trace.txt", "", "has no arrivals"),
        (
            "trace.jsonl",
            '{"time": 1}\n',
            r"trace\.jsonl:1: expected an object with a time in ms under",
        ),
        ("trace.csv", "time\n1\n", r"trace\.csv:1: expected a header with 'timestamp'"),
        ("trace.parquet", "", r"expected a file of type \.txt, \.jsonl, \.csv"),
    ],
)
def test_bad_line_of_a_trace_is_located(tmp_path: Path, name: str, text: str, error: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PreflightError, match=error):
        from_trace(tmp_path / name)


def test_missing_trace_is_reported(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be read"):
        from_trace(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (("--error-every", "30"), TooManyErrors, r"\d of \d+ requests failed, .* the first: HTTP 500: "),
        (("--error-event-every", "30"), TooManyErrors, "the first: error within the stream: out of memory"),
        (("--cut-every", "30"), TooManyErrors, "the first: the stream was cut after 4 chunks"),
        (
            ("--wrong-usage-every", "30"),
            TooManyErrors,
            "the first: wrong usage: 15 completion_tokens",
        ),
        (("--stall-after", "30"), TooManyErrors, r"the first: no complete answer within 0\.3 s"),
        (("--die-after-requests", "30"), ServerGoneError, "refuses connections"),
    ],
    ids=["500", "error event", "cut", "wrong usage", "stall", "death"],
)
def test_fault_of_the_server_ends_the_load(fault: tuple[str, ...], error: type[LoadError], message: str) -> None:
    with pytest.raises(error, match=message):
        under_load(
            ClosedLoop(4),
            *("--step-ms", "1+0", *fault),
            window=lambda load: load.hold(60),
            timeout_seconds=0.3 if "--stall-after" in fault else 60,
        )


def test_failed_requests_within_the_accepted_share_are_records() -> None:
    options = ("--step-ms", "1+0", "--error-every", "10")
    load, _, _ = under_load(ClosedLoop(4), *options, window=requests_ended(100), max_error_rate=0.2)
    errors = [request.record.error for request in load.records]
    assert 0.05 < sum(error is not None for error in errors) / len(errors) < 0.15


def test_share_of_failed_requests_is_judged_at_the_end_of_the_window() -> None:
    options = ("--step-ms", "1+0", "--error-every", "10")
    with pytest.raises(TooManyErrors, match=r"load.max_error_rate is 0\.05"):
        under_load(ClosedLoop(4), *options, window=requests_ended(50), max_error_rate=0.05)


def test_owner_can_report_the_end_of_the_server() -> None:
    async def lose(load: Load) -> None:
        asyncio.get_running_loop().call_later(0.1, lost.set)
        await load.hold(60)

    lost = asyncio.Event()
    with pytest.raises(ServerGoneError, match="the server has ended"):
        under_load(ClosedLoop(2), window=lose, lost=lost)


def test_fault_in_the_drain_is_reported() -> None:
    async def nothing(load: Load) -> None:
        pass

    with pytest.raises(TooManyErrors, match="the first: the stream was cut"):
        under_load(ClosedLoop(4), "--step-ms", "5+0", "--cut-every", "8", window=nothing)


def test_exhausted_trace_ends_the_load() -> None:
    with pytest.raises(DatasetExhaustedError, match="the trace has 2 arrivals and the load needs more"):
        under_load(OpenLoop(iter([0.0, 0.01])))


@pytest.mark.parametrize("schedule", [ClosedLoop(8), OpenLoop(constant(100.0))], ids=["closed", "open"])
def test_client_without_cpu_time_is_found_to_be_the_limit(schedule: Schedule) -> None:
    async def starve(load: Load) -> None:
        ended = time.monotonic() + 0.5
        while time.monotonic() < ended:
            time.sleep(0.05)  # keeps the event loop from running, as a busy machine would
            await asyncio.sleep(0.001)

    load, began, ended = under_load(schedule, window=starve)
    with pytest.raises(ClientBoundError, match=r"sent \d+ ms late or later \(limit \d+ ms\)"):
        check_client(load.send_lags(began, ended), load.records)


def test_client_in_time_is_accepted() -> None:
    check_client([0.001] * 100, [])
    load, _, _ = under_load(ClosedLoop(2))
    check_client([0.001] * 100, load.records)
    check_client([*[0.001] * 98, 5.0], load.records)  # one late request may be chance
