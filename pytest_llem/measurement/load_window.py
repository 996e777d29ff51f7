"""A window in which a server is under load, and what was done within it.

Requests do not begin and end with the window. So output tokens are counted by the time at which they arrived, and
each request counts by the share of its tokens that arrived within the window. Energy is divided by what arrived
between the meter's own edges, which differ from the window's by up to a tick.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pytest_llem.energy.account import join_accounts
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.measurement.window import Window
from pytest_llem.results.serving import ProbeRecord
from pytest_llem.results.statistics import percentile, total_of
from pytest_llem.study.load import SloConfig

#: Part of a request's inter-token latencies that has to be within ``slo.itl_ms``, in percent.
_ITL_PERCENTILE = 99


@dataclass(frozen=True)
class Work:
    """What arrived within a time.

    Attributes:
        requests: Number of answered requests, each counted by the share of its output tokens that arrived.
        input_tokens: Their input tokens, likewise; None if unknown for one of them.
        output_tokens: Output tokens that arrived; None if unknown for one of them.
        good_tokens: Those of the requests within the SLO; None without one, or if unknown.
    """

    requests: float
    input_tokens: float | None
    output_tokens: float | None
    good_tokens: float | None


@dataclass(frozen=True)
class LoadWindow(Window):
    """A window of a server under load, or several that were interleaved with another experiment's.

    Attributes:
        records: Every request that was sent, in ramp-up and drain too, in order.
        slo: Limits on the latency of a request; None without any.
        prompts: Number of requests of a pass.
        load: Number of requests in flight, or requests per second; None for a trace.
        ramp_seconds: Time from the first request to the start of the window, in s.
        drain_seconds: Time from the end of the window to the last answer, in s.
        send_lags: Delays of the client in sending the window's requests, in s.
        concurrency: Mean number of requests in flight.
        batch: Mean number of requests that the server ran at a time; None if it does not report it.
        client_cpu_seconds: CPU time of this process in the window, in s.
        server_tokens: Output tokens from the first request to the last answer by the server's counter; None if
            unknown.
        cache_queries: Input tokens that the server looked up in its prefix cache in that time; None if unknown.
        cache_hits: Those that it found there; None if unknown.
        queue_seconds: Increase, in the window, of the server's counter of the time that requests waited in its
            queue, in s; None if unknown.
        queued_requests: Increase of its counter of these requests; None if unknown.
        probes: All loads that a search tried; empty without a search.
    """

    records: Sequence[RequestRecord] = ()
    slo: SloConfig | None = None
    prompts: int = 1
    load: float | None = None
    ramp_seconds: float = 0.0
    drain_seconds: float = 0.0
    send_lags: Sequence[float] = ()
    concurrency: float | None = None
    batch: float | None = None
    client_cpu_seconds: float | None = None
    server_tokens: float | None = None
    cache_queries: float | None = None
    cache_hits: float | None = None
    queue_seconds: float | None = None
    queued_requests: float | None = None
    turns: Sequence[LoadWindow] = ()
    probes: Sequence[ProbeRecord] = field(default_factory=tuple)

    @property
    def parts(self) -> Sequence[LoadWindow]:
        """The windows of the turns; without turns, this window."""
        return self.turns or (self,)

    @property
    def due(self) -> list[RequestRecord]:
        """The requests that were due in the window, whenever they were answered."""
        return [
            record
            for part in self.parts
            for record in part.records
            if record.start is not None and part.began <= record.start < part.began + part.seconds
        ]

    @property
    def work(self) -> Work:
        """What arrived within the window."""
        return _total(part.work_between(part.began, part.began + part.seconds) for part in self.parts)

    @property
    def metered_work(self) -> Work:
        """What arrived between the edges of the meter's reading; within the window if these are not known."""
        return _total(
            part.work_between(
                part.began if part.account.began is None else part.account.began,
                part.began + part.seconds if part.account.ended is None else part.account.ended,
            )
            for part in self.parts
        )

    @property
    def count(self) -> float:
        """Number of passes that the energy covers: of ``prompts`` requests each."""
        return self.metered_work.requests / self.prompts

    def is_good(self, record: RequestRecord) -> bool | None:
        """Return whether a request is within the SLO; None without one, or if that is not known."""
        return None if self.slo is None else is_good(record, self.slo)

    def work_between(self, began: float, ended: float) -> Work:
        """Return what arrived between two times on the monotonic clock, in s."""
        requests = outputs = inputs = good = 0.0
        has_inputs = has_outputs = True
        for record in self.records:
            if not record.is_served or (share := _share(record, began, ended)) == 0:
                continue
            requests += share
            if record.input_tokens is None:
                has_inputs = False
            else:
                inputs += share * record.input_tokens
            if record.output_tokens is None:
                has_outputs = False
            else:
                outputs += share * record.output_tokens
                if self.is_good(record):
                    good += share * record.output_tokens
        return Work(
            requests,
            inputs if has_inputs else None,
            outputs if has_outputs else None,
            good if has_outputs and self.slo is not None else None,
        )


def join_windows(parts: Sequence[LoadWindow]) -> LoadWindow:
    """Return the windows of one experiment's turns as one window, which lasts as long as they do together."""
    first = parts[0]
    seconds = math.fsum(part.seconds for part in parts)

    def mean(values: Sequence[float | None]) -> float | None:
        weighted = [
            None if value is None else value * part.seconds for value, part in zip(values, parts, strict=True)
        ]
        total = total_of(weighted)
        return None if total is None else total / seconds

    return LoadWindow(
        seconds,
        join_accounts([part.account for part in parts]),
        first.began,
        first.began_at,
        slo=first.slo,
        prompts=first.prompts,
        load=first.load,
        send_lags=[lag for part in parts for lag in part.send_lags],
        concurrency=mean([part.concurrency for part in parts]),
        batch=mean([part.batch for part in parts]),
        client_cpu_seconds=total_of(part.client_cpu_seconds for part in parts),
        server_tokens=total_of(part.server_tokens for part in parts),
        cache_queries=total_of(part.cache_queries for part in parts),
        cache_hits=total_of(part.cache_hits for part in parts),
        queue_seconds=total_of(part.queue_seconds for part in parts),
        queued_requests=total_of(part.queued_requests for part in parts),
        records=[record for part in parts for record in part.records],
        turns=parts,
    )


def is_good(record: RequestRecord, slo: SloConfig) -> bool | None:
    """Return whether a request is within the SLO; None if that depends on a latency that is not known.

    A failed request is not.
    """
    if not record.is_served:
        return False
    unknown = False
    for kind, limit in slo.limits.items():
        if kind == "itl":
            gaps = record.itl_s
            seconds = percentile(gaps, _ITL_PERCENTILE) if gaps else None
            known = seconds is not None or (record.output_tokens or 0) < 2
        else:
            seconds = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}[kind]
            known = seconds is not None or (kind == "tpot" and (record.output_tokens or 0) < 2)
        if seconds is not None and seconds * 1000 > limit:
            return False
        unknown |= not known
    return None if unknown else True


def _share(record: RequestRecord, began: float, ended: float) -> float:
    """Return the share of a request's output that arrived between two times.

    Tokens without times count as if they arrived evenly between the first and the last.
    """
    times = record.token_times
    if len(times):
        return (bisect_left(times, ended) - bisect_left(times, began)) / len(times)
    first, last = record.first_token, record.last_token
    if first is None or last is None:
        return 0.0
    count = record.output_tokens or 1
    of_first = 1 / count if began <= first < ended else 0.0
    if count == 1 or last <= first:
        return 1.0 if began <= last < ended else 0.0
    overlap = max(0.0, min(ended, last) - max(began, first)) / (last - first)
    return of_first + (1 - 1 / count) * overlap


def _total(parts: Iterable[Work]) -> Work:
    works = list(parts)
    return Work(
        sum(one.requests for one in works),
        total_of(one.input_tokens for one in works),
        total_of(one.output_tokens for one in works),
        total_of(one.good_tokens for one in works),
    )
