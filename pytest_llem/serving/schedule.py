"""When requests are sent: a closed loop, or an open loop with an arrival process."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pytest_llem.engines.protocol import PreflightError
from pytest_llem.study.load import LoadConfig


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
        arrivals: Times of the requests, in s from the beginning of the load.
        max_in_flight: Maximum number of requests in flight. If it is reached, the load is not steady. The client
            needs as many connections.
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
        seed: Seed. Made of the study's seed and the cycle, it gives each cycle other times, and each run the same.

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
        path: The file. A ``.txt`` file has a time in s in each line; a ``.jsonl`` file has objects with a
            ``timestamp`` in ms, as Mooncake's traces; a ``.csv`` file has a column ``timestamp`` with date and
            time, as Azure's traces, or with times in s.

    Raises:
        PreflightError: The file cannot be read, a line has another format, or the times decrease.

    Example:
        >>> arrivals = from_trace(Path("AzureLLMInferenceTrace_code.csv"))
    """
    if path.suffix not in _EXPECTED:
        raise PreflightError(f"trace {str(path)!r}: expected a file of type {', '.join(_EXPECTED)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PreflightError(f"trace {str(path)!r} cannot be read: {reason}") from error
    column = None
    times: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".csv" and column is None:
                column = line.lower().split(",").index("timestamp")
                continue
            time = _time(line, column) if path.suffix != ".jsonl" else json.loads(line)["timestamp"] / 1e3
            if not math.isfinite(time) or (times and time < times[-1]):
                raise ValueError
        except (ValueError, TypeError, LookupError):
            expected = _EXPECTED[path.suffix]
            raise PreflightError(
                f"{path}:{number}: expected {expected}, not before the line above (got {line[:80]!r})"
            ) from None
        times.append(time)
    if not times:
        raise PreflightError(f"trace {str(path)!r} has no arrivals")
    return iter([time - times[0] for time in times])


def trace_problem(load: LoadConfig, directory: Path) -> str | None:
    """Return why the trace of a load cannot be used; None if it can, or there is none.

    Args:
        load: The load.
        directory: Folder that the path of a trace is relative to.
    """
    if load.trace is not None:
        try:
            from_trace(directory / load.trace)
        except PreflightError as error:
            return f"load.trace: {error}"
    return None


_EXPECTED = {
    ".txt": "a time in s",
    ".jsonl": "an object with a time in ms under 'timestamp'",
    ".csv": "a header with 'timestamp', and a time in s or date and time in that column",
}


def _time(line: str, column: int | None) -> float:
    """Return the time in *column* of a line, or in the whole line, in s."""
    text = line if column is None else line.split(",")[column]
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()
