"""When requests are sent: a closed loop, or an open loop with an arrival process."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llem.engines.protocol import PreflightError


@dataclass(frozen=True)
class ClosedLoop:
    """Keep *concurrency* requests in flight: a slot sends its next request when its answer has ended.

    Attributes:
        concurrency: Number of slots.
        ramp_seconds: Time over which the slots start, in s. None: over one E2E latency, so that they are not in
            lock-step. The first slot sends alone; the others follow at intervals of the latest E2E latency divided
            by the concurrency.

    Example:
        >>> ClosedLoop(concurrency=16)
    """

    concurrency: int
    ramp_seconds: float | None = None


@dataclass(frozen=True)
class OpenLoop:
    """Send requests at given times, however fast the server answers.

    Attributes:
        arrivals: Times of the requests, in s from the beginning.
        max_in_flight: Maximum number of requests in flight. If it is reached, the load is not steady.
        ramp_seconds: Time until the steady state begins, in s. None: twice the median E2E latency, and at least
            10 requests (or 10 times the median E2E latency, for a low rate).

    Example:
        >>> OpenLoop(poisson(rate=4.0, seed="1-2"))
    """

    arrivals: Iterator[float]
    max_in_flight: int = 4096
    ramp_seconds: float | None = None


def poisson(rate: float, seed: int | str) -> Iterator[float]:
    """Yield the times of a Poisson process, in s, without end.

    Args:
        rate: Mean number of requests per second.
        seed: Seed; make it of the study's seed and the cycle, so that cycles differ and runs agree.

    Example:
        >>> arrivals = poisson(rate=4.0, seed="42-1")
    """
    intervals, time = random.Random(seed), 0.0
    while True:
        time += intervals.expovariate(rate)
        yield time


def constant(rate: float) -> Iterator[float]:
    """Yield times at equal intervals, in s, without end.

    Example:
        >>> from itertools import islice
        >>> list(islice(constant(rate=4.0), 3))
        [0.0, 0.25, 0.5]
    """
    number = 0
    while True:
        yield number / rate
        number += 1


def from_trace(path: Path) -> Iterator[float]:
    """Return the arrival times in a trace file, in s from its first request.

    Args:
        path: A text file with a time in s in each line, or a ``.jsonl`` file of objects with a ``timestamp``: in
            ms if all are integers, as in Mooncake's traces, else in s.

    Raises:
        PreflightError: The file cannot be read, a line has another format, or the times decrease.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"trace {str(path)!r} cannot be read: {error}") from error
    read = _timestamp if path.suffix == ".jsonl" else float
    times: list[int | float] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            time = read(line)
        except (ValueError, TypeError, LookupError):
            expected = "an object with a number under 'timestamp'" if path.suffix == ".jsonl" else "a time in s"
            raise PreflightError(f"{path}:{number}: expected {expected} (got {line[:80]!r})") from None
        if not math.isfinite(time) or (times and time < times[-1]):
            raise PreflightError(f"{path}:{number}: expected a time not before the line above (got {line[:80]!r})")
        times.append(time)
    if not times:
        raise PreflightError(f"trace {str(path)!r} is empty")
    unit = 1e-3 if all(isinstance(time, int) for time in times) else 1.0
    return iter([(time - times[0]) * unit for time in times])


def _timestamp(line: str) -> int | float:
    entry: Any = json.loads(line)["timestamp"]
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        raise TypeError
    return entry
