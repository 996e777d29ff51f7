"""The client of a server: times, tokens, and errors as records."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import socket
import statistics
from collections.abc import Awaitable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import coroutine
from typing import Any

import pytest

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.serving.client import Client, Endpoint, LoadRequest, SentRequest
from pytest_llem.serving.errors import LoadError
from tests.support.narrow import not_none
from tests.support.serving import entries, mock_server

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"
REQUEST = LoadRequest(0, [[1, 2, 3]], 8)


def sent(endpoint: Endpoint, *requests: LoadRequest) -> list[RequestRecord]:
    """Send *requests* one after the other; the records of all turns."""

    async def run() -> list[RequestRecord]:
        async with Client(endpoint, connections=1) as client:
            return [record for request in requests for record in await client.send(request)]

    return asyncio.run(run())


def answered(*pieces: bytes, request: LoadRequest = REQUEST, **endpoint: Any) -> RequestRecord:
    """The record of a request to a server that writes *pieces*, each in a packet of its own, and hangs up."""

    async def run() -> RequestRecord:
        hung_up = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}")
            with suppress(ConnectionError):  # the client may hang up first
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            hung_up.set()

        async with await asyncio.start_server(answer, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            async with Client(Endpoint(f"http://127.0.0.1:{port}", **endpoint), connections=1) as client:
                [record] = await client.send(request)
            await hung_up.wait()
            return record

    return asyncio.run(run())


def event(text: Any = "", finish: str | None = None, ids: Sequence[int] | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish} | ({} if ids is None else {"token_ids": ids})
    return b"data: " + json.dumps({"choices": [choice]} | more, ensure_ascii=False).encode() + b"\n\n"


def usage(output: Any, prompt: Any = 3, **more: Any) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return b"data: " + json.dumps({"choices": [], "usage": counts | more}).encode() + b"\n\n"


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A mock server, and its log."""
    log = tmp_path_factory.mktemp("mock") / "log.jsonl"
    with mock_server("--step-ms", "4+0", "--log-file", str(log)) as url:
        yield url, log


@pytest.mark.parametrize("token_ids", [True, False], ids=["ids", "texts"])
def test_token_times_are_those_of_the_server(mock: tuple[str, Path], token_ids: bool) -> None:
    url, log = mock
    found = sent(Endpoint(url, token_ids=token_ids), *[LoadRequest(0, [[1, 2, 3]], 20)] * 5)
    token_delays, delays = [], []
    for record, expected in zip(found, entries(log)[-5:], strict=True):
        assert record.error is None
        assert (record.input_tokens, record.output_tokens) == (3, 20)
        assert (record.output_ids is not None) == token_ids
        seen = zip(record.token_times, expected["tokens"], strict=True)
        token_delays.append([at - emitted for at, emitted in seen])
        delays.append(expected["received"] - not_none(record.sent))
    assert min(map(min, token_delays)) >= 0
    assert min(delays) >= 0
    # A busy machine delays some of the requests.
    assert min(map(statistics.median, token_delays)) < 2e-3
    assert min(delays) < 0.1


def test_chunks_do_not_wake_the_task_of_their_request(mock: tuple[str, Path]) -> None:
    """At thousands of chunks a second, that would cost more than the rest of what the client does."""
    waits = 0

    @coroutine
    def counted(work: Awaitable[list[RequestRecord]]) -> Generator[Any, Any, list[RequestRecord]]:
        nonlocal waits
        steps = work.__await__()
        while True:
            try:
                waited = next(steps)
            except StopIteration as end:
                records: list[RequestRecord] = end.value
                return records
            waits += 1
            yield waited

    async def run() -> list[RequestRecord]:
        async with Client(Endpoint(mock[0]), connections=1) as client:
            return await counted(client.send(LoadRequest(0, [[1]], 100)))

    [record] = asyncio.run(run())
    assert len(set(record.token_times)) > 50
    assert waits < 25


def test_due_time_is_that_of_the_first_turn(mock: tuple[str, Path]) -> None:
    async def run() -> list[RequestRecord]:
        async with Client(Endpoint(mock[0], api="chat"), connections=1) as client:
            return await client.send(LoadRequest(0, ["a b", "c"], 2), due=1.0)

    assert [record.due for record in asyncio.run(run())] == [1.0, None]


def test_turn_of_a_conversation_has_all_before_it_in_its_prompt(mock: tuple[str, Path]) -> None:
    conversation = LoadRequest(0, ["one two", "three", "four"], 4)
    records = sent(Endpoint(mock[0], api="chat"), conversation)
    # Each turn adds its own words and, of the mock's answers, 4.
    assert [record.input_tokens for record in records] == [2, 7, 12]
    assert [len(record.token_times) for record in records] == [4, 4, 4]


@pytest.mark.parametrize("key", ["secret", "wrong"])
def test_api_key_is_sent_and_not_shown(key: str) -> None:
    with mock_server("--key", "secret") as url:
        endpoint = Endpoint(url, key=key)
        [record] = sent(endpoint, REQUEST)
    assert record.error == (None if key == "secret" else 'HTTP 401: {"error": "Unauthorized"}')
    assert key not in repr(endpoint)


@pytest.mark.parametrize("size", [1, 7, 1000], ids="{}-byte pieces".format)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_stream_may_be_split_anywhere(size: int, newline: bytes) -> None:
    stream = b": ping\n\nevent: message\n" + event("é") + event("漢字 ") + event("!", "stop") + usage(3) + DONE
    stream = stream.replace(b"\n", newline)
    record = answered(HEAD, *(stream[place : place + size] for place in range(0, len(stream), size)))
    assert (record.error, record.output_text, record.output_tokens) == (None, "é漢字 !", 3)
    assert len(record.token_times) == 3


@pytest.mark.parametrize("end", [b"", DONE[:-2]], ids=["missing", "without newline"])
def test_complete_answer_may_end_without_done(end: bytes) -> None:
    assert answered(HEAD, event("a"), event("b", "length"), usage(2) + end).error is None


def test_usage_may_come_with_the_finish_reason_as_in_llama_cpp() -> None:
    last = event("", "length", usage={"prompt_tokens": 3, "completion_tokens": 2}, timings={"cache_n": 1})
    record = answered(HEAD, event("a"), event("b"), last, DONE)
    assert (record.error, record.output_tokens, record.cached_tokens) == (None, 2, 1)
    assert len(record.token_times) == 2


def test_cached_tokens_are_those_of_usage() -> None:
    record = answered(HEAD, event("a", "stop"), usage(1, prompt_tokens_details={"cached_tokens": 2}), DONE)
    assert record.cached_tokens == 2


def test_chunks_are_not_counted_as_tokens() -> None:
    record = answered(HEAD, event("a"), event("b c"), event("d", "stop"), usage(4), DONE)
    assert record.output_tokens == 4
    assert record.token_times == ()
    assert record.itl_s == []
    assert record.tpot_s is not None


def test_control_token_without_text_has_the_time_of_its_chunk() -> None:
    record = answered(HEAD, event("a"), event(""), event("b"), event("", "length"), usage(3), DONE)
    assert len(record.token_times) == 3


def test_merged_tokens_with_ids_arrive_together() -> None:
    record = answered(
        HEAD, event("a", ids=[5]), event("b c", ids=[6, 7]), event("", "stop", ids=[]), usage(3), DONE
    )
    assert record.output_ids == [5, 6, 7]
    assert record.has_joint_tokens
    assert record.itl_s == []


def test_token_without_text_has_a_time_by_its_id() -> None:
    record = answered(HEAD, event("", ids=[5]), event("é", "length", ids=[6]), usage(2), DONE)
    assert len(record.token_times) == 2


def test_incomplete_ids_leave_the_number_to_usage() -> None:
    record = answered(HEAD, event("a", ids=[5]), event("b"), event("c", "stop", ids=[7]), usage(3), DONE)
    assert (record.error, record.output_ids, record.output_tokens) == (None, None, 3)
    assert record.token_times == ()


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([usage(9)], "wrong usage: 9 completion_tokens, of at most 8"),
        ([usage(0)], "wrong usage: 0 completion_tokens, but 1 token ids arrived"),
        ([usage("1")], "wrong usage: completion_tokens is '1'"),
        ([usage(1, prompt=-1)], "wrong usage: prompt_tokens is -1"),
    ],
)
def test_wrong_usage_is_an_error(pieces: list[bytes], error: str) -> None:
    record = answered(HEAD, event("a", "stop", ids=[5]), *pieces, DONE)
    assert record.error == error
    assert record.output_ids == [5]
    assert record.input_tokens is None


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([event("a", "stop"), DONE], "the answer has no usage, so its number of tokens is unknown"),
        ([event("a")], "the stream was cut after 1 chunks"),
        (
            [event("a"), b'data: {"error": {"message": "out of memory"}}\n\n', DONE],
            "error within the stream: out of",
        ),
        ([event("a"), b'data: {"error": "gone"}\n\n'], "error within the stream: gone"),
        ([event("a", "abort"), usage(1), DONE], "the server ended the answer with finish_reason 'abort'"),
        ([b"<html>"], "the answer is not an event stream"),
        ([b"data: {broken\n\n"], "the answer is not a stream of completion chunks: JSONDecodeError"),
        ([b"data: 1\n\n", DONE], "the answer is not a stream of completion chunks: AttributeError"),
        (
            [event("a", "stop", usage=["1"]), DONE],
            "the answer is not a stream of completion chunks: AttributeError",
        ),
        ([event(["a"], "stop"), DONE], "the answer is not a stream of completion chunks: TypeError"),
        ([], "the answer is not an event stream"),
    ],
)
def test_incomplete_answer_is_an_error(pieces: list[bytes], error: str) -> None:
    record = answered(HEAD, *pieces)
    assert record.error is not None
    assert record.error.startswith(error)


def test_http_error_is_reported_with_the_beginning_of_its_body() -> None:
    head = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 1000\r\n\r\n"
    assert answered(head, b"x" * 1000).error == "HTTP 400: " + "x" * 200


def test_body_that_ends_early_is_an_error_with_what_arrived() -> None:
    chunk = event("a", ids=[5])
    head = HEAD.replace(b"connection: close", b"transfer-encoding: chunked")
    record = answered(head, b"%x\r\n%b\r\n" % (len(chunk), chunk))
    assert record.error == "the stream was cut after 1 chunks"
    assert record.output_ids == [5]
    assert len(record.token_times) == 1


def test_server_that_hangs_up_before_it_answers_is_an_error() -> None:
    assert answered().error == "the server closed the connection before it answered"


def test_answer_that_takes_too_long_is_an_error() -> None:
    pieces = [event("a", ids=[5])] * 10_000
    for timeout in (0.05, 0.5, 5.0):  # on a busy machine, nothing may arrive in the shortest one
        record = answered(HEAD, *pieces, timeout_seconds=timeout)
        assert record.error == f"no complete answer within {timeout:g} s"
        if record.output_ids:
            break
    assert record.output_ids is not None
    assert 0 < len(record.output_ids) < 10_000


def test_refused_connection_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    [record] = sent(Endpoint(f"http://127.0.0.1:{port}"), REQUEST)
    assert record.error is not None
    assert record.error.startswith("cannot connect: ")


def test_connection_closed_between_requests_is_no_failure(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with mock_server("--close-reused", "--log-file", str(log)) as url:
        records = sent(Endpoint(url), REQUEST, REQUEST, REQUEST)
    assert [record.error for record in records] == [None, None, None]
    assert len(entries(log)) == 3


def test_garbage_collection_is_off_while_requests_are_sent(mock: tuple[str, Path]) -> None:
    """A full collection would delay requests, and there is no need for one."""

    async def run() -> tuple[bool, int]:
        async with Client(Endpoint(mock[0], token_ids=True), connections=1) as client:
            gc.collect()
            for _ in range(100):
                await client.send(LoadRequest(0, [[1]], 1))
            return gc.isenabled(), gc.collect()

    is_enabled, unreachable = asyncio.run(run())
    assert not is_enabled
    assert unreachable < 100  # less than one object for each request
    assert gc.isenabled()


def test_open_files_are_allowed_as_far_as_the_system_does(mock: tuple[str, Path]) -> None:
    async def connect(connections: int) -> None:
        async with Client(Endpoint(mock[0]), connections):
            pass

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        asyncio.run(connect(300))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
        with pytest.raises(LoadError, match=f"and this system allows {hard}: see ulimit -Hn"):
            asyncio.run(connect(hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_cancelled_request_is_recorded_with_what_arrived(mock: tuple[str, Path]) -> None:
    async def run() -> RequestRecord:
        async with Client(Endpoint(mock[0], token_ids=True), connections=1) as client:
            turns: list[SentRequest] = []
            task = asyncio.create_task(client.exchange(LoadRequest(0, [[1]], 1000), turns))
            while not client.chunks_in_flight:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return turns[0].record

    record = asyncio.run(run())
    assert record.error == "cancelled before the answer's end"
    assert record.output_ids is not None
    assert 0 < len(record.output_ids) == len(record.token_times) < 1000
