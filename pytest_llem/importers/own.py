"""Read the JSON that a user's own script writes: its requests, its figures, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.reading import Fields, scalars, utc_time
from pytest_llem.importers.run import Clock, ToolRun
from pytest_llem.study.problems import did_you_mean

FORMAT, TOOL = "own", "script"

#: Key that marks the format. Its value is the version of the format.
KEY, VERSION = "llem_run", 1

_CLOCKS: dict[str | None, Clock] = {"monotonic": "monotonic", "unix": "unix", None: "other"}

_KEYS = (
    *(KEY, "tool", "version", "model", "concurrency", "settings", "server_start", "clock"),
    *("requests", "completed", "metrics", "seconds", "ended_at"),
)
_REQUEST_KEYS = ("sent", "first_token", "last_token", "token_times", "input_tokens", "output_tokens", "error")


def matches(document: Any) -> bool:
    """Return whether *document* is such a file."""
    return isinstance(document, dict) and KEY in document


def read(fields: Fields) -> Iterator[ToolRun]:
    """Yield the run.

    Raises:
        ImportFileError: A key is unknown, or a value is wrong.
    """
    if fields.data[KEY] != VERSION:
        fields.fail(KEY, f"must be {VERSION}, the version of the format (got {fields.data[KEY]!r})")
    _refuse_others(fields, _KEYS)
    clock = fields.text("clock")
    if clock not in _CLOCKS:
        fields.fail("clock", f"must be 'monotonic', 'unix' or missing (got {clock!r})")
    metrics = fields.section("metrics")
    _refuse_others(metrics, tuple(CATALOGUE), "unknown metric")
    requests = [_request(one) for one in fields.sections("requests")]
    start = fields.data.get("server_start")
    yield ToolRun(
        files=[fields.file],
        format=FORMAT,
        tool=fields.text("tool") or TOOL,
        version=fields.text("version"),
        settings=dict(scalars(fields.section("settings").data)),
        document=fields.data,
        model=fields.text("model"),
        concurrency=fields.count("concurrency"),
        requests=requests,
        times_unknown_reason=None
        if any(one.sent is not None for one in requests)
        else "the file has no times of requests",
        clock=_CLOCKS[clock],
        figures={name: value for name in metrics.data if (value := metrics.number(name)) is not None},
        completed=fields.count("completed"),
        seconds=fields.number("seconds"),
        ended_at=utc_time(fields.number("ended_at")),
        server_start=None if start is None else str(start),
    )


def _request(one: Fields) -> RequestRecord:
    _refuse_others(one, _REQUEST_KEYS)
    times = one.numbers("token_times") or []
    if times != sorted(times):
        one.fail("token_times", "must not decrease")
    record = RequestRecord(
        input_tokens=one.count("input_tokens"),
        output_count=len(times) or None if one.data.get("output_tokens") is None else one.count("output_tokens"),
        sent=one.number("sent"),
        token_times=times,
        first_token=one.number("first_token"),
        last_token=one.number("last_token"),
        error=one.text("error"),
    )
    if times and len(times) != record.output_count:
        one.fail("token_times", f"has {len(times)} times for {record.output_count} output_tokens")
    known = [at for at in (record.sent, record.first_token, record.last_token) if at is not None]
    if known != sorted(known):
        one.fail("", "sent, first_token and last_token must be in this order")
    return record


def _refuse_others(fields: Fields, known: tuple[str, ...], message: str = "unknown key") -> None:
    for name in fields.data:
        if name not in known:
            fields.fail(name, f"{message}{did_you_mean(name, known)}")
