"""Counters of servers: the names of vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import asyncio

import pytest

from pytest_llem.serving.client import Client, Endpoint, LoadRequest
from pytest_llem.serving.counters import Counters, mean_batch, parse, read_counters
from tests.support.serving import mock_server

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1200.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 2.5e+06
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1200.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 0.0
vllm:num_preemptions_total{engine="0",model_name="m"} 0.0
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 4.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 4.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 0.25
"""

SGLANG = """\
sglang:num_running_reqs{model_name="m",tp_rank="0"} 5.0
sglang:num_running_reqs{model_name="m",tp_rank="1"} 5.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 2.0
sglang:prompt_tokens_total{model_name="m"} 100.0
sglang:generation_tokens_total{model_name="m"} 50.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 10.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 5.0
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 1.0
sglang:queue_time_seconds_sum{model_name="m",tp_rank="0"} 0.5
sglang:queue_time_seconds_sum{model_name="m",tp_rank="1"} 0.5
sglang:queue_time_seconds_count{model_name="m",tp_rank="0"} 8.0
"""

LLAMA_CPP = """\
llamacpp:prompt_tokens_total 100
llamacpp:prompt_tokens_cached_total 20
llamacpp:tokens_predicted_total 64
llamacpp:predicted_tokens_seconds nan
llamacpp:requests_processing 4
llamacpp:requests_deferred 0
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VLLM, Counters(1.0, 1200.0, 2.5e6, 5.0, 1.0, 1200.0, 0.0, 0.25, 4.0, 0.0)),
        (SGLANG, Counters(1.0, 100.0, 50.0, 5.0, 2.0, 100.0, 15.0, 0.5, 8.0, 1.0)),
        (LLAMA_CPP, Counters(1.0, 100.0, 64.0, 4.0, 0.0, 120.0, 20.0)),
    ],
    ids=["vllm", "sglang", "llama.cpp"],
)
def test_counters_are_found_by_each_servers_names(text: str, expected: Counters) -> None:
    assert parse(text, 1.0) == expected


def test_counter_that_is_not_exported_is_none() -> None:
    counters = parse("llamacpp:prompt_tokens_total 100\nllamacpp:requests_processing NaN\n", 1.0)
    assert counters == Counters(1.0, prompt_tokens=100.0)


def test_metrics_of_other_programs_are_no_counters() -> None:
    assert parse("python_info 1.0\n", 1.0) is None


def test_counters_of_a_server_agree_with_the_answers() -> None:
    async def run() -> tuple[Counters | None, Counters | None]:
        with mock_server("--step-ms", "1+0") as url:
            async with Client(Endpoint(url), connections=1) as client:
                await client.send(LoadRequest(0, [[1, 2, 3]], 5))
                return await read_counters(client.session, url), await read_counters(client.session, url, "/none")

    counters, none = asyncio.run(run())
    assert none is None
    assert counters is not None
    assert (counters.prompt_tokens, counters.generation_tokens, counters.running) == (3.0, 5.0, 0.0)
    assert (counters.prefix_cache_queries, counters.queue_count) == (3.0, 1.0)


def test_unreachable_server_has_no_counters() -> None:
    async def run() -> Counters | None:
        async with Client(Endpoint("http://127.0.0.1:9"), connections=1) as client:
            return await read_counters(client.session, "http://127.0.0.1:9")

    assert asyncio.run(run()) is None


def test_mean_batch_needs_a_reading_with_a_batch() -> None:
    assert mean_batch([Counters(0.0, running=8.0), Counters(0.5), Counters(1.0, running=6.0)]) == 7.0
    assert mean_batch([Counters(0.0)]) is None
