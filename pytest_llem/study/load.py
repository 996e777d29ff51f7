"""Define the ``load`` that is put on a server, and the limits that its answers have to keep."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pytest_llem.study.section import NullableSection, single_error

#: Largest number of requests in flight of an open loop, unless ``load.max_in_flight`` is given.
MAX_IN_FLIGHT = 1024

Milliseconds = Annotated[float, Field(gt=0)]

Concurrency = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=100_000)],
    single_error("must be 'auto' or a number of requests, 1 or more"),
]

Rate = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0)],
    single_error("must be 'auto' or a number of requests per second, more than 0"),
]

Seconds = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0)],
    single_error("must be 'auto' or a number of seconds, 0 or more"),
]


class SloConfig(NullableSection):
    """Service level objective (SLO): limits on the latency of a request. A request is good if it keeps them all.

    Example:
        ``slo: {ttft_ms: 500, tpot_ms: 50}``
    """

    ttft_ms: Milliseconds | None = None
    """Limit of the time to the first token, in ms. Default null: no limit."""
    tpot_ms: Milliseconds | None = None
    """Limit of the mean time of an output token after the first, in ms. Default null: no limit."""
    itl_ms: Milliseconds | None = None
    """Limit of the 99th percentile of a request's inter-token latencies, in ms, so that its answer has no long
    pause. Default null: no limit.
    """
    e2e_ms: Milliseconds | None = None
    """Limit of the time to the last token, in ms. Default null: no limit."""
    attainment: float = Field(0.99, gt=0, le=1)
    """Share of requests that have to be good for a load to be within the SLO. Default 0.99."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> SloConfig:
        if not self.limits:
            raise ValueError("needs a limit: ttft_ms, tpot_ms, itl_ms or e2e_ms")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits in ms, by kind of latency: ``ttft``, ``tpot``, ``itl``, ``e2e``."""
        given = {name: getattr(self, f"{name}_ms") for name in ("ttft", "tpot", "itl", "e2e")}
        return {name: value for name, value in given.items() if value is not None}


class SearchConfig(NullableSection):
    """Search for the largest load within the SLO, if ``concurrency`` or ``rate`` is ``auto``."""

    low: float = Field(1.0, gt=0)
    """Smallest load that is tried, in requests in flight or requests per second. Default 1."""
    high: float = Field(256.0, gt=0)
    """Largest load that is tried, in requests in flight or requests per second. Default 256."""
    precision: float = Field(0.05, gt=0, lt=1)
    """The search ends when the largest load within the SLO and the smallest load beyond it differ by at most this
    share of the former or, for ``concurrency``, by one request. Default 0.05.
    """

    @model_validator(mode="after")
    def _low_is_below_high(self) -> SearchConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        return self

    @property
    def max_loads(self) -> int:
        """Number of loads that a search tries at most.

        Example:
            >>> SearchConfig(low=1, high=256, precision=0.05).max_loads
            14
        """
        return math.ceil(math.log2(self.high / self.low)) + 1 + math.ceil(math.log2(1 / self.precision))


class LoadConfig(NullableSection):
    """The load on a server. Exactly one of ``concurrency``, ``rate`` and ``trace`` is required."""

    concurrency: Concurrency | None = None
    """Closed loop: number of requests in flight. A new one is sent when one is answered. ``auto`` searches for the
    largest number within the SLO. Default null.
    """
    rate: Rate | None = None
    """Open loop: requests per second, sent whether or not earlier ones are answered. ``auto`` searches for the
    largest rate within the SLO. Default null.
    """
    trace: Annotated[str, Field(min_length=1)] | None = None
    """Open loop: a file of arrival times, relative to the study. ``.txt``: a time in s in each line; ``.jsonl``:
    objects with ``timestamp`` in ms; ``.csv``: a column ``timestamp`` with date and time, or s. It has to be as
    long as the measurement. Default null.
    """
    arrival: Literal["poisson", "constant"] = "poisson"
    """Arrival process of an open loop with ``rate``: ``poisson`` (independent users) or ``constant`` (equal
    intervals). Default ``poisson``.
    """
    ramp_seconds: Seconds = "auto"
    """Time over which the load is built up, in seconds. ``auto`` is the time that one request takes, so that
    requests do not run in lock-step; in an open loop, at least twice that. Default ``auto``.
    """
    slo: SloConfig | None = None
    """Limits on the latency of a request. Default null: none, and no goodput."""
    search: SearchConfig = Field(default_factory=SearchConfig)
    """Limits of the search if ``concurrency`` or ``rate`` is ``auto``. Default: from 1 to 256, to 5 %."""
    prompts: Literal["distinct", "repeated"] = "distinct"
    """``distinct``: no prompt is sent twice to a server, so that its prefix cache is not measured. A dataset that
    is shorter than the load is an error. ``repeated``: the ``n`` prompts are sent again and again. Default
    ``distinct``.
    """
    max_error_rate: float = Field(0.0, ge=0, lt=1)
    """Share of failed requests above which the experiment fails. Default 0."""
    max_in_flight: int = Field(MAX_IN_FLIGHT, ge=1, le=100_000)
    """Requests in flight at which an open loop is not steady: the server is overloaded. Default 1024."""
    request_timeout_seconds: float = Field(600.0, gt=0)
    """Maximum time of a request, in seconds. A slower one is cancelled and counts as failed. Default 600."""

    @model_validator(mode="after")
    def _goes_together(self) -> LoadConfig:
        given = [name for name in ("concurrency", "rate", "trace") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"given: {', '.join(given)}" if given else "is missing"
            raise ValueError(f"needs exactly one of concurrency, rate and trace ({what})")
        if self.is_search and self.slo is None:
            raise ValueError(f"{given[0]} 'auto' searches for the largest load within the SLO, and needs an slo")
        if self.arrival != "poisson" and self.rate is None:
            raise ValueError(f"arrival {self.arrival!r} needs a rate")
        if self.max_in_flight != MAX_IN_FLIGHT and not self.is_open:
            raise ValueError("max_in_flight needs a rate or a trace: with concurrency, that is the number")
        if self.search != SearchConfig() and not self.is_search:
            raise ValueError("search needs concurrency or rate: auto")
        if self.concurrency == "auto" and not (self.search.low.is_integer() and self.search.high.is_integer()):
            raise ValueError("search.low and search.high must be whole numbers of requests for concurrency: auto")
        return self

    @property
    def is_open(self) -> bool:
        """Whether requests are sent at given times (open loop), and not when others are answered."""
        return self.concurrency is None

    @property
    def is_search(self) -> bool:
        """Whether the load is searched for."""
        return "auto" in (self.concurrency, self.rate)
