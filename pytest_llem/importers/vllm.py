"""Read the results of ``vllm bench serve --save-result``, with and without ``--save-detailed``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pytest_llem.catalogue import PERCENTILES
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.reading import Fields, scalars
from pytest_llem.importers.run import ToolRun, figures, token_times

FORMAT, TOOL = "vllm", "vllm bench serve"

#: Key of ``--metadata`` that names the start of the server.
SERVER_START = "server_start"

#: What a run was asked for. Every other text or number that is not a result is from ``--metadata``.
_SETTINGS = (
    *("backend", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"),
)

#: Names of results. A version may add some.
_RESULT = re.compile(
    r"(mean|median|std|p[\d.]+|max|min|total|spec_decode|diffusion|probe)_.*|.*_(throughput|goodput|times?)"
    r"|date|endpoint_type|label|duration|completed|failed|rtfx|steady_state.*"
)

_NO_TIMES = "the file has no times of requests (vllm bench serve --save-detailed writes them)"


def matches(document: Any) -> bool:
    """Return whether *document* is such a result."""
    return isinstance(document, dict) and "request_throughput" in document and "num_prompts" in document


def read(fields: Fields) -> Iterator[ToolRun]:
    """Yield the run in a result.

    Raises:
        ImportFileError: A value has the wrong type.
    """
    data = fields.data
    settings = {name: data[name] for name in _SETTINGS if data.get(name) is not None}
    extra = {name: value for name, value in scalars(data) if name not in _SETTINGS and not _RESULT.fullmatch(name)}
    server_start = extra.pop(SERVER_START, None)
    requests = requests_of(fields)
    date = fields.text("date")
    yield ToolRun(
        files=[fields.file],
        format=FORMAT,
        tool=TOOL,
        version=None,
        settings={**settings, **extra},
        document=data,
        model=fields.text("model_id"),
        concurrency=fields.count("max_concurrency"),
        requests=requests,
        times_unknown_reason=None if any(one.sent for one in requests) else _NO_TIMES,
        clock="monotonic",  # start_times are of time.perf_counter
        figures=_figures(fields),
        completed=fields.count("completed"),
        seconds=fields.number("duration"),
        ended_at=_time(date) if date else None,
        server_start=None if server_start is None else str(server_start),
    )


def _time(date: str) -> datetime | None:
    try:
        return datetime.strptime(date, "%Y%m%d-%H%M%S").astimezone(UTC)
    except ValueError:
        return None


def requests_of(fields: Fields) -> list[RequestRecord]:
    """Return the requests in the lists of a result; empty without ``--save-detailed``.

    Without ``start_times``, the times of each request are from its own submission.

    Raises:
        ImportFileError: A value has the wrong type, or lists differ in length.
    """
    columns: dict[str, list[Any] | None] = {"ttfts": fields.numbers("ttfts")}
    columns |= {name: fields.items(name) for name in ("itls", "input_lens", "output_lens", "errors")}
    lists = [values for values in columns.values() if values is not None]
    if len(lists) < len(columns):
        return []
    count = len(lists[0])
    if any(len(values) != count for values in lists):
        lengths = ", ".join(f"{name} {len(values)}" for name, values in zip(columns, lists, strict=True))
        fields.fail("", f"lists differ in length: {lengths}")
    starts, latencies = fields.numbers("start_times"), fields.numbers("latencies")
    for name, values in (("start_times", starts), ("latencies", latencies)):
        if values is not None and len(values) != count:
            fields.fail(name, f"has {len(values)} values for {count} requests")
    found = []
    for place, (ttft, gaps, inputs, outputs, error) in enumerate(zip(*lists, strict=True)):
        sent = starts[place] if starts else 0.0
        one = Fields(fields.file, {"itls": gaps, "output_lens": outputs, "input_lens": inputs}, f"request {place}")
        tokens, itls = one.count("output_lens"), one.numbers("itls") or []
        first = sent + ttft
        latency = latencies[place] if latencies else ttft + sum(itls)
        found.append(
            RequestRecord(
                input_tokens=one.count("input_lens"),
                output_count=tokens,
                sent=sent,
                token_times=[] if error else token_times(first, itls, tokens),
                first_token=None if error else first,
                last_token=None if error else sent + latency,
                error=str(error) if error else None,
            )
        )
    return found


def percentiles_of(fields: Fields, e2e: str) -> dict[str, float | None]:
    """Return the percentiles of latencies in a result, in which *e2e* is the name of the E2E latency."""
    return {
        f"{ours}_p{p}_ms": fields.number(f"median_{theirs}_ms" if p == 50 else f"p{p}_{theirs}_ms")
        for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", e2e))
        for p in PERCENTILES
    }


def _figures(fields: Fields) -> dict[str, float]:
    completed, failed = fields.number("completed"), fields.number("failed")
    total = None if completed is None or failed is None else completed + failed
    return figures(
        {
            "output_tokens_per_second": fields.number("output_throughput"),
            "requests_per_second": fields.number("request_throughput"),
            "goodput_rps": fields.number("request_goodput"),
            "offered_rate": None if fields.data.get("request_rate") == "inf" else fields.number("request_rate"),
            "input_tokens": fields.number("total_input_tokens"),
            "output_tokens": fields.number("total_output_tokens"),
            "error_rate": None if not total or failed is None else failed / total,
            **percentiles_of(fields, "e2el"),
        }
    )
