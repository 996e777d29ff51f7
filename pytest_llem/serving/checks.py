"""Decide from the records of a window whether its figures may be reported."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from pytest_llem.results.statistics import percentile
from pytest_llem.serving.client import SentRequest
from pytest_llem.serving.errors import ClientBoundError, NotSteadyError

#: The requests in flight grow if their mean in the last third of a window exceeds that in the first by more than
#: this many standard errors and one request.
_GROWTH_STANDARD_ERRORS = 4.0

#: A window is overloaded, however short, if less than this share of the offered requests was served …
_MIN_SERVED = 0.8

#: … and the number of those that were not served exceeds this many standard errors.
_OVERLOAD_STANDARD_ERRORS = 3.0

#: Limit of the 99th percentile of the send lag: the larger of a time in s and a share of the median E2E latency.
_MAX_LAG_SECONDS, _MAX_LAG_SHARE = 0.010, 0.05


def mean_in_flight(sent: Iterable[SentRequest], began: float, ended: float) -> float:
    """Return the mean number of requests in flight within a window.

    Args:
        sent: The requests.
        began: Begin of the window, on the clock of ``time.monotonic``, in s.
        ended: End of the window.
    """
    within = (min(request.ended, ended) - max(request.sent, began) for request in sent)
    return sum(seconds for seconds in within if seconds > 0) / (ended - began)


def check_steady(sent: Sequence[SentRequest], began: float, ended: float) -> None:
    """Check that the requests in flight do not grow within a window of an open loop.

    No answer after the window is needed, so that an overloaded server need not be drained first.

    The mean number in flight in the last third is compared with the first third. For requests that arrive at
    random at rate λ, and each stay for a time τ, the variance of such a mean over S seconds is λ·E[τ²]/S. If they
    mostly wait, their number is a random walk, whose variance over the 2·S between the thirds is at most 4·λ·S.

    In simulated queues of 16 slots, with latencies of 0.2 to 1 s and windows of 30 s, this reported no load at
    60 % of the capacity, 0 to 3 % of those at 80 %, 9 to 15 % at 90 %, where queues are long for a time, and all
    at 125 %.

    Args:
        sent: The requests, those of the ramp-up included. One that is not answered ends at infinity.
        began: Begin of the window, on the clock of ``time.monotonic``, in s.
        ended: End of the window.

    Raises:
        NotSteadyError: The requests in flight grow by more than chance explains. The message has the offered and
            the served rate.
    """
    third = (ended - began) / 3
    first = mean_in_flight(sent, began, began + third)
    last = mean_in_flight(sent, ended - third, ended)
    # The times in flight of the first third: later ones are longer if the load is not steady, and would hide it.
    stays = [min(one.ended, ended) - one.sent for one in sent if began <= one.sent < began + third]
    variance = min(2 * sum(stay**2 for stay in stays) / third**2, 4 * len(stays))
    seconds = ended - began
    offered = sum(began <= _arrival(request) <= ended for request in sent) / seconds
    served = sum(began <= request.ended <= ended for request in sent) / seconds
    unserved = (offered - served) * seconds
    standard_error = (2 * max(first, 1.0)) ** 0.5
    is_overload = served < _MIN_SERVED * offered and unserved > _OVERLOAD_STANDARD_ERRORS * standard_error
    if last - first <= _GROWTH_STANDARD_ERRORS * variance**0.5 + 1 and not is_overload:
        return
    raise NotSteadyError(
        f"not steady: requests in flight grew from {first:.3g} to {last:.3g} while {offered:.3g} requests/s were "
        f"offered and {served:.3g} served: lower load.rate, or measure for longer"
    )


def check_client(lags: Sequence[float], sent: Iterable[SentRequest]) -> None:
    """Check that the client sent its requests in time.

    Args:
        lags: How late each request was sent, in s (``Load.send_lags``).
        sent: The requests.

    Raises:
        ClientBoundError: The 99th percentile of *lags* is above 10 ms and above 5 % of the median E2E latency, and
            more than one request is that late.
    """
    latencies = [latency for request in sent if (latency := request.record.e2e_s) is not None]
    if not lags or not latencies:
        return
    late, limit = percentile(lags, 99), max(_MAX_LAG_SECONDS, _MAX_LAG_SHARE * statistics.median(latencies))
    if late > limit and sum(lag > limit for lag in lags) > 1:
        raise ClientBoundError(
            f"the load client is too slow for this load: 1 % of the requests were sent {late * 1e3:.0f} ms late "
            f"or later (limit {limit * 1e3:.0f} ms). Use a machine with more free CPU time, or a lower load"
        )


def _arrival(request: SentRequest) -> float:
    """Return when a request was due, or else when it was sent, on the clock of ``time.monotonic``, in s."""
    return request.sent if request.answer.due is None else request.answer.due
