"""What one run of a load generator measured, in the units and by the definitions of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.engines.protocol import RequestRecord

#: Clocks of the times of requests: that of ``time.monotonic``, that of ``time.time``, or any other.
Clock = Literal["monotonic", "unix", "other"]


@dataclass(frozen=True)
class CutRecords:
    """Totals of a run of which the records have only the first requests.

    Attributes:
        requests: Completed requests of the run.
        output_tokens: Their output tokens; None if unknown.
        seconds: Time from the first request's submission to the end of the run, in s.
    """

    requests: int
    output_tokens: float | None
    seconds: float


@dataclass(frozen=True)
class ToolRun:
    """One run of a load generator.

    Attributes:
        files: The files that it was read from.
        format: The format's name on the command line, such as ``vllm``.
        tool: The tool's own name, such as ``vllm bench serve``.
        version: Version of the tool; None if the file does not say.
        settings: What the run was asked for, by the tool's own names. Runs of one configuration have the same.
        document: The file's content, in which ``--axis`` looks up values.
        model: Name of the model; None if the file does not say.
        concurrency: Maximum number of requests in flight; None if there was no maximum, or if it is not known.
        requests: A record for each request; empty if the file has none.
        times_unknown_reason: Why the requests' times are not on one clock; None if they are.
        clock: The clock of the requests' times.
        figures: The tool's own figures, by the name of the metric that has the same definition.
        completed: Number of answered requests; None if unknown.
        seconds: Duration of the run, in s; None if unknown.
        ended_at: End of the run; None if unknown.
        server_start: Identity of the start of the server that was measured; None if the file does not say.
        cut: Totals of the run, if the records have only its first requests; else None.
    """

    files: Sequence[Path]
    format: str
    tool: str
    version: str | None
    settings: Mapping[str, Any]
    document: Any = field(repr=False)
    model: str | None = None
    concurrency: int | None = None
    requests: Sequence[RequestRecord] = field(default=(), repr=False)
    times_unknown_reason: str | None = None
    clock: Clock = "other"
    figures: Mapping[str, float] = field(default_factory=dict)
    completed: int | None = None
    seconds: float | None = None
    ended_at: datetime | None = None
    server_start: str | None = None
    cut: CutRecords | None = None

    @property
    def source(self) -> str:
        """Files, tool and version, for messages: ``out.json of vllm bench serve``."""
        names = ", ".join(file.name for file in self.files)
        return f"{names} of {self.tool}{f' {self.version}' if self.version else ''}"


def figures(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return those *values* that are known and whose name is that of a metric in the catalogue."""
    return {name: value for name, value in values.items() if value is not None and name in CATALOGUE}


def token_times(first: float, gaps: Sequence[float], tokens: int | None) -> list[float]:
    """Return the time of each token, from the time of the stream's first chunk and the gaps between chunks.

    Empty if a chunk may hold several tokens.
    """
    return [*_sums(first, gaps)] if tokens == len(gaps) + 1 else []


def _sums(first: float, gaps: Sequence[float]) -> Iterator[float]:
    yield first
    for gap in gaps:
        first += gap
        yield first
