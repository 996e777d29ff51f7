"""Read the results of SGLang's ``bench_serving``: one a line, with and without ``--output-details``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.reading import Fields, each
from pytest_llem.importers.run import ToolRun, figures, token_times

NAME, FORMAT = "sglang", "SGLang bench_serving"

_SETTINGS = (
    *("backend", "dataset_name", "request_rate", "max_concurrency"),
    *("sharegpt_output_len", "random_input_len", "random_output_len", "random_range_ratio"),
)


def matches(document: Any) -> bool:
    """Return whether *document* is one line of such a file."""
    return isinstance(document, dict) and "request_throughput" in document and "median_e2e_latency_ms" in document


def read(lines: list[Fields]) -> Iterator[ToolRun]:
    """Yield the run of each line.

    Raises:
        ImportFileError: A value has the wrong type.
    """
    for fields in lines:
        data = fields.data
        server = fields.section("server_info")
        yield ToolRun(
            files=[fields.file],
            tool=NAME,
            format=FORMAT,
            version=None,
            settings={name: data[name] for name in _SETTINGS if data.get(name) is not None},
            document=data,
            model=server.text("served_model_name") or server.text("model_path"),
            concurrency=fields.count("max_concurrency"),
            requests=_requests(fields),
            no_stamps="the file has durations of requests, and not when they were sent",
            figures=_figures(fields),
            completed=fields.count("completed"),
            seconds=fields.number("duration"),
        )


def _requests(fields: Fields) -> list[RequestRecord]:
    """Return the requests, each with times from its own submission."""
    columns = each(
        fields,
        ("ttfts", "itls", "input_lens", "output_lens", "errors"),
        lambda name: fields.numbers(name) if name == "ttfts" else fields.items(name),
    )
    found = []
    for place, (ttft, gaps, inputs, outputs, error) in enumerate(zip(*columns, strict=True)):
        one = Fields(fields.file, {"itls": gaps, "output_lens": outputs, "input_lens": inputs}, f"request {place}")
        tokens, itls = one.count("output_lens"), one.numbers("itls") or []
        found.append(
            RequestRecord(
                input_tokens=one.count("input_lens"),
                output_count=tokens,
                sent=0.0,
                token_times=[] if error else token_times(ttft, itls, tokens),
                first_token=None if error else ttft,
                last_token=None if error else ttft + sum(itls),
                error=str(error) if error else None,
            )
        )
    return found


def _figures(fields: Fields) -> dict[str, float]:
    percentiles = {
        f"{ours}_p{p}_ms": fields.number(f"median_{theirs}_ms" if p == 50 else f"p{p}_{theirs}_ms")
        for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2e_latency"))
        for p in (50, 90, 95, 99)
    }
    endless = isinstance(fields.data.get("request_rate"), str)  # "inf", or "trace"
    return figures(
        {
            "output_tokens_per_second": fields.number("output_throughput"),
            "requests_per_second": fields.number("request_throughput"),
            "offered_rate": None if endless else fields.number("request_rate"),
            "concurrency_mean": fields.number("concurrency"),
            "input_tokens": fields.number("total_input_tokens") or fields.number("total_input"),
            "output_tokens": fields.number("total_output_tokens") or fields.number("total_output"),
            **percentiles,
        }
    )
