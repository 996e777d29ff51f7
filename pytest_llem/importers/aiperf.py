"""Read the results of AIPerf: its export, its records of requests, or both of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_llem.catalogue import PERCENTILES
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.reading import Fields, scalars, utc_time
from pytest_llem.importers.run import CutRecords, ToolRun, figures, token_times

FORMAT, TOOL = "aiperf", "AIPerf"

#: Its files in a folder of artifacts: the export, and the records.
FILES = ("profile_export_aiperf.json", "profile_export.jsonl")

#: Parts of the configuration that do not change what is measured, or that may name a host.
_UNIMPORTANT = (
    *("artifacts", "output", "cli_command", "runtime", "otel", "mlflow", "wandb", "gpu_telemetry"),
    *("server_metrics", "network_latency", "endpoint.urls", "endpoint.url"),
)


def matches(document: Any) -> bool:
    """Return whether *document* is of either file."""
    return matches_export(document) or _matches_record(document)


def matches_export(document: Any) -> bool:
    """Return whether *document* is the export of a run, ``profile_export_aiperf.json``."""
    return isinstance(document, dict) and "input_config" in document and "request_count" in document


def _matches_record(document: Any) -> bool:
    """Return whether *document* is one line of the records of a run, ``profile_export.jsonl``."""
    return (
        isinstance(document, dict)
        and isinstance(metadata := document.get("metadata"), dict)
        and ("request_start_ns" in metadata)
    )


def read(export: Fields | None, records: Sequence[Fields]) -> Iterator[ToolRun]:
    """Yield the run of an export and of its records; either may be missing.

    Raises:
        ImportFileError: A value has the wrong type, or the two are not of one run.
    """
    requests = [(index, request) for one in records if (found := _request(one)) for index, request in [found]]
    fields = export or Fields(records[0].file, {})
    files = list(dict.fromkeys([fields.file, *(one.file for one in records[:1])]))
    config = fields.section("input_config")
    settings = {
        name: value
        for name, value in scalars(config.data)
        if not any(f"{name}.".startswith(f"{part}.") for part in _UNIMPORTANT)
    }
    given = next((value for name, value in settings.items() if name.rpartition(".")[2] == "concurrency"), None)
    concurrency = int(given) if isinstance(given, int | float) and given >= 1 else None
    models = config.section("endpoint").items("model_names") or [
        one.text("name") for one in config.section("models").sections("items")
    ]
    ended = max((one.last_token for _, one in requests if one.last_token is not None), default=None)
    yield ToolRun(
        files=files,
        format=FORMAT,
        tool=TOOL,
        version=fields.text("aiperf_version"),
        settings=settings,
        document=fields.data,
        model=", ".join(map(str, models)) or None,
        concurrency=concurrency,
        requests=[request for _, request in requests],
        times_unknown_reason=None
        if requests
        else "the file has no times of requests (profile_export.jsonl has them)",
        clock="unix",
        figures={} if export is None else _figures(export),
        completed=fields.section("request_count").count("avg"),
        seconds=_average(fields, "benchmark_duration"),
        ended_at=utc_time(ended),
        cut=_cut(export, requests, files, concurrency) if export is not None and records else None,
    )


def _request(record: Fields) -> tuple[int | None, RequestRecord] | None:
    """Return a request and its number in the run, if known; None for one of the warm-up."""
    metadata, metrics = record.section("metadata"), record.section("metrics")
    if (metadata.text("benchmark_phase") or "profiling") != "profiling":
        return None
    started, ended = metadata.number("request_start_ns"), metadata.number("request_end_ns")
    ttft, latency = _value(metrics, "time_to_first_token"), _value(metrics, "request_latency")
    gaps = metrics.section("inter_chunk_latency").numbers("value")
    tokens = _value(metrics, "usage_completion_tokens")
    if tokens is None:  # AIPerf's own count of the answer's tokens, from the text
        tokens = _value(metrics, "output_sequence_length")
    inputs = _value(metrics, "usage_prompt_tokens")
    if inputs is None:
        inputs = _value(metrics, "input_sequence_length")
    sent = None if started is None else started / 1e9
    first = None if sent is None or ttft is None else sent + ttft / 1e3
    last = None if ended is None else ended / 1e9
    if sent is not None and latency is not None:
        last = sent + latency / 1e3
    count = None if tokens is None else int(tokens)
    problem = record.data.get("error") or ("cancelled" if metadata.data.get("was_cancelled") else None)
    error = problem.get("message", "failed") if isinstance(problem, dict) else problem
    return metadata.count("session_num"), RequestRecord(
        input_tokens=None if inputs is None else int(inputs),
        output_count=count,
        sent=sent,
        token_times=[] if first is None or error else token_times(first, [gap / 1e3 for gap in gaps or ()], count),
        first_token=None if error else first,
        last_token=None if error else last,
        error=str(error) if error else None,
    )


def _cut(
    export: Fields,
    requests: Sequence[tuple[int | None, RequestRecord]],
    files: Sequence[Path],
    concurrency: int | None,
) -> CutRecords | None:
    """Return the totals of the run, if the records have only its first requests."""
    completed = _average(export, "request_count")
    known = sum(one.error is None for _, one in requests)
    names = " and ".join(file.name for file in files)
    if completed is None or known == completed:
        return None
    if known > completed:
        export.fail("", f"{names} are not of one run: {known} records for {completed:.0f} requests")
    seconds = _average(export, "benchmark_duration")
    numbers = {number for number, _ in requests if number is not None}
    missing = set(range(max(numbers, default=0))) - numbers
    # Records are written as requests end: those in flight when the file ended are missing, too.
    if seconds is None or len(numbers) < known or len(missing) >= (concurrency or 1):
        export.fail("", f"{names}: records of {known} of {completed:.0f} requests, and not of the first ones")
    tokens = _average(export, "total_usage_completion_tokens")
    if tokens is None:
        tokens = _average(export, "total_output_tokens")
    return CutRecords(int(completed), tokens, seconds)


def _value(metrics: Fields, name: str) -> float | None:
    """Return one metric of a record."""
    return metrics.section(name).number("value")


def _average(export: Fields, name: str) -> float | None:
    """Return the mean of a metric of a run, or its only value."""
    return export.section(name).number("avg")


def _figures(export: Fields) -> dict[str, float]:
    def latencies(ours: str, theirs: str) -> dict[str, float | None]:
        section = export.section(theirs)
        return {f"{ours}_p{p}_ms": section.number(f"p{p}") for p in PERCENTILES}

    tokens = _average(export, "total_usage_completion_tokens")
    chunks_are_tokens = tokens is not None and tokens == export.section("http_req_chunks_received").number("sum")
    cached, prompts = (_average(export, f"total_usage_{name}_tokens") for name in ("prompt_cache_read", "prompt"))
    errors = _average(export, "request_error_rate")  # in %
    return figures(
        {
            "output_tokens_per_second": _average(export, "output_token_throughput"),
            "requests_per_second": _average(export, "request_throughput"),
            "goodput_rps": _average(export, "goodput"),
            "slo_attainment": _average(export, "good_request_fraction"),
            "concurrency_mean": _average(export, "effective_concurrency"),
            "input_tokens": prompts if prompts is not None else _average(export, "total_isl"),
            "output_tokens": tokens if tokens is not None else _average(export, "total_output_tokens"),
            "error_rate": None if errors is None else errors / 100,
            "prefix_hit_rate": None if cached is None or not prompts else cached / prompts,
            **latencies("ttft", "time_to_first_token"),
            **latencies("tpot", "inter_token_latency"),
            **(latencies("itl", "inter_chunk_latency") if chunks_are_tokens else {}),
            **latencies("e2e", "request_latency"),
        }
    )
