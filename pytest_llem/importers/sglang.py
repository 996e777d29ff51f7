"""Read the results of SGLang's ``bench_serving``: one a line, with and without ``--output-details``.

It began as a copy of vLLM's benchmark, and writes the same lists of requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llem.importers.reading import Fields
from pytest_llem.importers.run import ToolRun, figures
from pytest_llem.importers.vllm import percentiles_of, requests_of

FORMAT, TOOL = "sglang", "SGLang bench_serving"

_SETTINGS = (
    *("backend", "dataset_name", "request_rate", "max_concurrency"),
    *("sharegpt_output_len", "random_input_len", "random_output_len", "random_range_ratio"),
)


def matches(document: Any) -> bool:
    """Return whether *document* is one line of such a file."""
    return isinstance(document, dict) and "request_throughput" in document and "median_e2e_latency_ms" in document


def read(fields: Fields) -> Iterator[ToolRun]:
    """Yield the run of a line.

    Raises:
        ImportFileError: A value has the wrong type.
    """
    data = fields.data
    server = fields.section("server_info")
    yield ToolRun(
        files=[fields.file],
        format=FORMAT,
        tool=TOOL,
        version=None,
        settings={name: data[name] for name in _SETTINGS if data.get(name) is not None},
        document=data,
        model=server.text("served_model_name") or server.text("model_path"),
        concurrency=fields.count("max_concurrency"),
        requests=requests_of(fields),
        times_unknown_reason="the file has durations of requests, and not when they were sent",
        figures=_figures(fields),
        completed=fields.count("completed"),
        seconds=fields.number("duration"),
    )


def _figures(fields: Fields) -> dict[str, float]:
    has_no_rate = isinstance(fields.data.get("request_rate"), str)  # "inf", or "trace"
    return figures(
        {
            "output_tokens_per_second": fields.number("output_throughput"),
            "requests_per_second": fields.number("request_throughput"),
            "offered_rate": None if has_no_rate else fields.number("request_rate"),
            "concurrency_mean": fields.number("concurrency"),
            "input_tokens": fields.number("total_input_tokens") or fields.number("total_input"),
            "output_tokens": fields.number("total_output_tokens") or fields.number("total_output"),
            **percentiles_of(fields, "e2e_latency"),
        }
    )
