"""Records of a server and of the load that was put on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pytest_llem.results.document import Record
from pytest_llem.results.metrics import Method

#: Phases of a load, as in ``requests.csv``, and those that no metric covers.
PHASES = ("ramp", "window", "drain", "drift")
OUTSIDE_WINDOW = {*PHASES} - {"window"}


class DriftRecord(Record):
    """The first load on a server, measured again as the last one: how far the server has changed meanwhile."""

    first: str
    """Id of the experiment whose load it is: the first on this server."""
    load: dict[str, Any]
    """Section ``load`` of that experiment. A load that a search has found replaces ``auto``."""
    before: dict[str, float]
    """Metrics of that experiment."""
    method: Method | None = None
    """How its energy was obtained; null if it is not available."""
    after: dict[str, float] = Field(default_factory=dict)
    """The same metrics, measured again."""
    window_seconds: float | None = None
    """Duration of the window in which they were measured again, in s."""
    reason: str | None = None
    """Why they could not be measured again."""


class ServerRecord(Record):
    """The server of an experiment."""

    id: str
    """Unique id of the server's start. Load points with the same id were measured on one server."""
    url: str
    """Its address."""
    pid: int | None = None
    """Pid of its first process; null if unknown."""
    supervisor_pid: int | None = None
    """Pid of the process that supervises it and has all of its processes as descendants; null if ``attached``."""
    attached: bool = False
    """Whether it ran before the study, which did not start it: it is not a fresh process."""
    command: list[str] | None = None
    """Program and arguments; null if ``attached``."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Versions of packages of its Python interpreter that can change a result; empty if it has none, or is
    ``attached``.
    """
    started_at: str | None = None
    """Start, UTC, as ISO 8601; null if ``attached``."""
    ready_seconds: float | None = None
    """Time from its start until it was ready, in s; null if ``attached``."""
    position: int = 1
    """Number of this experiment among those on this server, from 1."""
    first_prompt: int = 0
    """Number of prompts that earlier experiments took from the dataset for this server."""
    drift: DriftRecord | None = None
    """Drift of the server; null unless this experiment is the last of several on it."""


class ProbeRecord(Record):
    """One load that a search has tried."""

    load: float
    """Number of requests in flight, or requests per second."""
    attainment: float | None
    """Share of requests within the SLO; null if unknown."""
    within_slo: bool
    """Whether the load is within the SLO."""
    reason: str | None = None
    """Why the load is not within the SLO, if not for its latencies, such as a server that was not steady."""
    window_seconds: float
    """Duration of its window, in s; of the whole attempt if the server was not steady."""
    output_tokens_per_second: float | None = None
    """Output tokens in the window ÷ its duration."""
    energy_per_output_token_j: float | None = None
    """Energy ÷ output tokens in the window, in J; null if unknown."""

    @property
    def outcome(self) -> str:
        """Whether the load is within the SLO, as text."""
        return "within the SLO" if self.within_slo else self.reason or "not within the SLO"


class LoadRecord(Record):
    """The load on a server, and what its server answered."""

    kind: Literal["closed", "open"]
    """``closed``: a new request when one is answered. ``open``: requests at given times."""
    concurrency: int | None = None
    """Number of requests in flight of a closed loop."""
    rate: float | None = None
    """Requests per second of an open loop; null for a trace."""
    ramp_seconds: float
    """Time from the first request to the start of the window, in s."""
    drain_seconds: float
    """Time from the end of the window until the last request was answered, in s."""
    sent: int
    """Number of requests that were sent, in ramp-up and drain too."""
    prompts: int
    """Number of prompts that were taken from the dataset, those of the warm-up included."""
    due: int
    """Number of requests that were to be sent in the window. Latencies are of these requests."""
    failed: int
    """Number of due requests that failed or returned no token."""
    good: int | None = None
    """Number of due requests that were within the SLO; null without an SLO, or if unknown."""
    client_output_tokens: int | None = None
    """Output tokens of all requests without an error, as the client counted them; null if unknown."""
    server_output_tokens: int | None = None
    """The same by the server's own counter; null if it has none."""
    client_cpu_seconds: float | None = None
    """CPU time of the client in the window, in s."""
    probes: list[ProbeRecord] = Field(default_factory=list)
    """Loads that a search has tried, in order; empty without a search."""
