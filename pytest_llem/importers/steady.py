"""Find the steady state of a run from the times of its requests, and the rates over it."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.importers.run import ToolRun


class NotSteadyError(ValueError):
    """A run has no steady state. The message says why."""


@dataclass(frozen=True)
class Rates:
    """What was generated within a span of time.

    Attributes:
        began: Start of the span on the clock of the requests, in s.
        ended: Its end, in s.
        requests: Requests, each by the share of its tokens inside, or of its time if its tokens are unknown.
        output_tokens: Output tokens; None if unknown.
    """

    began: float
    ended: float
    requests: float
    output_tokens: float | None

    @property
    def seconds(self) -> float:
        """Duration of the span, in s."""
        return self.ended - self.began


def steady_rates(run: ToolRun) -> Rates:
    """Return the rates over the steady state of *run*.

    With a maximum of requests in flight (closed loop, each of them in a slot), the steady state begins when that
    many requests have had their first token, and ends when fewer are in flight for good. So neither the time until
    all slots are in use counts, nor the time when requests run out. Without a maximum, or if it was not reached
    (open loop), it begins one median E2E latency after the first request was sent, and ends when the last one is
    sent.

    If the records of a closed loop have only the first requests, the end is that of the run, with the time when
    requests run out.

    Raises:
        NotSteadyError: The times are not known, or too few requests are in flight.
    """
    if run.times_unknown_reason is not None:
        raise NotSteadyError(run.times_unknown_reason)
    served = timed_requests(run)
    if not served:
        raise NotSteadyError("no request with times was answered")
    first_sent = min(_sent(one) for one in served)
    slots = _slots(served, run.concurrency)
    if slots is None:
        began = first_sent + statistics.median(_last(one) - _sent(one) for one in served)
        ended = max(map(_sent, served))
        if ended <= began:
            raise NotSteadyError(f"all {len(served)} requests were sent before most of them could be answered")
        return rates_between(served, began, ended)
    if len(served) < 2 * slots:
        raise NotSteadyError(f"{len(served)} requests for {slots} slots, and a steady state needs {2 * slots}")
    began = sorted(_first(one) for one in served)[slots - 1]
    if (cut := run.cut) is not None:
        ended = first_sent + cut.seconds
        if ended <= began:
            raise NotSteadyError(
                f"the run ended after {cut.seconds:g} s, before {slots} requests had a first token"
            )
        # From before the first request: what happened exactly at the start of a span is not counted.
        before = rates_between(served, first_sent - 1, began)
        tokens = None
        if cut.output_tokens is not None and before.output_tokens is not None:
            tokens = cut.output_tokens - before.output_tokens
        return Rates(began, ended, cut.requests - before.requests, tokens)
    ended = sorted(map(_last, served))[-slots]
    if ended <= began:
        raise NotSteadyError(f"{slots} requests were never in flight together")
    return rates_between(served, began, ended)


def timed_requests(run: ToolRun) -> list[RequestRecord]:
    """Return the answered requests of *run* whose start and end are known."""
    return [one for one in run.requests if one.is_served and None not in (one.sent, one.last_token)]


def rates_between(served: Iterable[RequestRecord], began: float, ended: float) -> Rates:
    """Return what *served* requests generated after *began* and until *ended*, both in s on their clock."""
    tokens: float | None = 0.0
    requests = 0.0
    for one in served:
        inside = _tokens_inside(one, began, ended)
        if inside is None or not one.output_tokens:
            tokens = None
            requests += _overlap(_sent(one), _last(one), began, ended)
        else:
            tokens = None if tokens is None else tokens + inside
            requests += inside / one.output_tokens
    return Rates(began, ended, requests, tokens)


def _tokens_inside(one: RequestRecord, began: float, ended: float) -> float | None:
    """Return the tokens of a request in a span; if their times are unknown, as if they came at equal intervals."""
    if one.token_times:
        return float(bisect_right(one.token_times, ended) - bisect_right(one.token_times, began))
    count, first = one.output_tokens, one.first_token
    if count is None or first is None:
        return None
    return (began < first <= ended) + (count - 1) * _overlap(first, _last(one), began, ended)


def _overlap(start: float, end: float, began: float, ended: float) -> float:
    """Return the share of the time from *start* to *end* that lies in a span."""
    if end <= start:
        return float(began < start <= ended)
    return max(0.0, min(end, ended) - max(start, began)) / (end - start)


def _slots(served: Sequence[RequestRecord], concurrency: int | None) -> int | None:
    """Return the number of slots of a closed loop; None if the load was below its maximum, or had none."""
    if concurrency is None:
        return None
    changes = sorted([*((_sent(one), 1) for one in served), *((_last(one), -1) for one in served)])
    in_flight = max(accumulate(change for _, change in changes))
    return concurrency if in_flight >= concurrency else None


def _sent(one: RequestRecord) -> float:
    assert one.sent is not None
    return one.sent


def _first(one: RequestRecord) -> float:
    return _last(one) if one.first_token is None else one.first_token


def _last(one: RequestRecord) -> float:
    assert one.last_token is not None
    return one.last_token
