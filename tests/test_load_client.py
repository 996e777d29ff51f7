"""The client of a server: times, tokens, and errors as records."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.serving.client import Client, Endpoint, LoadRequest
from tests.support.serving import entries, mock_server


def sent(endpoint: Endpoint, *requests: LoadRequest) -> list[RequestRecord]:
    """Send *requests* one after the other; the records of all turns."""

    async def run() -> list[RequestRecord]:
        async with Client(endpoint, connections=1) as client:
            return [record for request in requests for record in await client.send(request)]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A mock server, and its log."""
    log = tmp_path_factory.mktemp("mock") / "log.jsonl"
    with mock_server("--step-ms", "4+0", "--log-file", str(log)) as url:
        yield url, log


@pytest.mark.parametrize("token_ids", [True, False], ids=["ids", "texts"])
def test_token_times_are_those_of_the_server(mock: tuple[str, Path], token_ids: bool) -> None:
    url, log = mock
    [record] = sent(Endpoint(url, token_ids=token_ids), LoadRequest(0, [[1, 2, 3]], 20))
    expected = entries(log)[-1]
    assert record.error is None
    assert record.output_tokens == 20
    delays = [seen - emitted for seen, emitted in zip(record.token_times, expected["tokens"], strict=True)]
    assert min(delays) >= 0
    assert statistics.median(delays) < 2e-3
    assert record.sent is not None
    assert 0 <= expected["received"] - record.sent < 0.1
