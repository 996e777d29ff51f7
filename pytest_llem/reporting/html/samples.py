"""Read the latencies of requests and the power samples from the CSV files beside a result; skip invalid lines."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

#: Latency columns of ``requests.csv``, with their names on the page.
KINDS = {
    "ttft_ms": "Time to first token",
    "itl_mean_ms": "Inter-token latency, mean of each request",
    "tpot_ms": "Time per output token after the first",
    "e2e_ms": "End-to-end latency",
}

#: Percentiles shown of each distribution.
SHOWN = (5, 25, 50, 75, 95, 99)


@dataclass
class Latencies:
    """The latencies of a point's requests in ms, by column. Requests without a value of a column are left out."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def extend(self, other: Mapping[str, list[float]]) -> None:
        """Add the latencies of another cycle, in ms, by column."""
        for kind, values in other.items():
            self.values.setdefault(kind, []).extend(values)

    def percentiles(self, kind: str) -> dict[int, float] | None:
        """Return the percentiles of :data:`SHOWN` in ms, or None if there is no request."""
        values = self.values.get(kind)
        if not values:
            return None
        if len(values) == 1:
            return dict.fromkeys(SHOWN, values[0])
        percentiles = statistics.quantiles(values, n=100, method="inclusive")
        return {p: percentiles[p - 1] for p in SHOWN}


@dataclass(frozen=True)
class Power:
    """The power samples of one cycle.

    Attributes:
        cycle: Number of the cycle.
        window_seconds: Length of the measured window in s; it begins at 0.
        samples: Pairs of time since the window began, in s, and power in W, by device.
    """

    cycle: int
    window_seconds: float
    samples: Mapping[str, list[tuple[float, float]]]


def read_latencies(text: str) -> dict[str, list[float]]:
    """Return the latencies in ms of a ``requests.csv``, by column, without those of a load's ramp and drain."""
    found: dict[str, list[float]] = {}
    for row in _rows(text):
        if row.get("pass") in ("ramp", "drain"):
            continue
        for kind in KINDS:
            if (value := _number(row.get(kind))) is not None:
                found.setdefault(kind, []).append(value)
    return found


def read_power(text: str, max_samples: int) -> dict[str, list[tuple[float, float]]]:
    """Return the samples of a ``power.csv`` by device, thinned to *max_samples* by keeping the extremes."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(text):
        at, watts = _number(row.get("seconds")), _number(row.get("power_w"))
        if at is not None and watts is not None:
            found.setdefault(row.get("device") or "?", []).append((at, watts))
    share = max_samples // max(1, len(found))
    return {device: _thinned(samples, share) for device, samples in found.items()}


def _thinned(samples: list[tuple[float, float]], max_samples: int) -> list[tuple[float, float]]:
    """Return the minimum and maximum of each stretch of samples, so that peaks remain visible."""
    if len(samples) <= max_samples:
        return samples
    size = math.ceil(2 * len(samples) / max(2, max_samples))
    parts = (samples[at : at + size] for at in range(0, len(samples), size))
    return [
        sample
        for part in parts
        for sample in sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    ]


def _rows(text: str) -> Iterator[Mapping[str, str | None]]:
    try:
        yield from csv.DictReader(io.StringIO(text))
    except csv.Error:
        return


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
