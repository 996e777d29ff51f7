"""Read the results of guidellm, of which a file may have several: one for each load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llem.catalogue import PERCENTILES
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.reading import Fields, scalars, utc_time
from pytest_llem.importers.run import ToolRun, figures

FORMAT, TOOL = "guidellm", "guidellm"

#: Label (``--label``) that names the start of the server.
SERVER_START = "server_start"

#: Parts of a benchmark's configuration that say what was asked for.
_ASKED = ("strategy", "constraints", "requests", "backend.kind", "backend.model", "backend.request_format", "data")

#: Fields of these that guidellm changes while it runs.
_PROGRESS = ("current_index", "type_", "worker_count")


def matches(document: Any) -> bool:
    """Return whether *document* is such a file."""
    return isinstance(document, dict) and isinstance(document.get("benchmarks"), list)


def read(fields: Fields) -> Iterator[ToolRun]:
    """Yield the run of each load.

    Raises:
        ImportFileError: A value has the wrong type.
    """
    spec = fields.section("config").section("spec")
    labels = dict(scalars(fields.section("config").section("metadata").section("labels").data))
    server_start = labels.pop(SERVER_START, None)
    for benchmark in fields.sections("benchmarks"):
        config, strategy = benchmark.section("config"), benchmark.section("config").section("strategy")
        asked = {**config.data, "data": spec.items("data")}
        settings = {
            name: value
            for name, value in scalars(asked)
            if any(f"{name}.".startswith(f"{part}.") for part in _ASKED)
            and name.rpartition(".")[2] not in _PROGRESS
        }
        requests = [*_requests(benchmark)]
        concurrency = strategy.count("streams")
        yield ToolRun(
            files=[fields.file],
            format=FORMAT,
            tool=TOOL,
            version=fields.section("metadata").text("guidellm_version"),
            settings={**settings, **labels},
            document=benchmark.data,
            model=config.section("backend").text("model"),
            concurrency=strategy.count("max_concurrency") if concurrency is None else concurrency,
            requests=requests,
            times_unknown_reason=None if requests else "the file has no requests",
            clock="unix",
            figures=_figures(benchmark),
            completed=benchmark.section("metrics").section("request_totals").count("successful"),
            seconds=benchmark.number("duration"),
            ended_at=utc_time(benchmark.number("end_time")),
            server_start=None if server_start is None else str(server_start),
        )


def _requests(benchmark: Fields) -> Iterator[RequestRecord]:
    """Yield the requests that were answered or failed. Those that the end of the run cut off are left out."""
    for kind in ("successful", "errored"):
        for one in benchmark.section("requests").sections(kind):
            info = one.section("info")
            times = info.section("timings")
            sent = times.number("request_start")
            error = (info.text("error") or "failed") if kind == "errored" else None
            yield RequestRecord(
                input_tokens=one.count("prompt_tokens"),
                output_count=one.count("output_tokens"),
                sent=one.number("request_start_time") if sent is None else sent,
                first_token=None if error else times.number("first_token_iteration"),
                last_token=None if error else times.number("last_token_iteration"),
                error=error,
            )


def _figures(benchmark: Fields) -> dict[str, float]:
    metrics = benchmark.section("metrics")

    def of(name: str, statistic: str) -> float | None:
        return metrics.section(name).section("successful").number(statistic)

    def latencies(ours: str, theirs: str, scale: float = 1.0) -> dict[str, float | None]:
        section = metrics.section(theirs).section("successful")
        percentiles = section.section("percentiles")
        values = {p: percentiles.number(f"p{p}") for p in PERCENTILES} | {50: section.number("median")}
        if not section.number("count"):  # guidellm's statistics of nothing are 0
            values = dict.fromkeys(values)
        return {f"{ours}_p{p}_ms": None if value is None else value * scale for p, value in values.items()}

    totals = metrics.section("request_totals")
    failed, answered = totals.number("errored"), totals.number("successful")
    return figures(
        {
            "output_tokens_per_second": of("output_tokens_per_second", "mean"),
            "requests_per_second": of("requests_per_second", "mean"),
            "concurrency_mean": metrics.section("request_concurrency").section("total").number("mean"),
            "input_tokens": of("prompt_token_count", "total_sum"),
            "output_tokens": of("output_token_count", "total_sum"),
            "error_rate": None if failed is None or not answered else failed / (failed + answered),
            **latencies("ttft", "time_to_first_token_ms"),
            **latencies("tpot", "inter_token_latency_ms"),
            **latencies("e2e", "request_latency", 1000),
        }
    )
