"""What the files beside a result hold: latencies of requests, and power over time. A line that is not as ours are
is passed over.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

#: Columns of ``requests.csv``, and what they are.
KINDS = {
    "ttft_ms": "Time to first token",
    "itl_mean_ms": "Inter-token latency, mean of each request",
    "e2e_ms": "End-to-end latency",
}

#: Percentiles that are shown of a distribution.
SHOWN = (5, 25, 50, 75, 95, 99)


@dataclass
class Latencies:
    """Of a point's requests, in ms, by column; a request that has none of a kind is left out of that."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def extend(self, other: Mapping[str, list[float]]) -> None:
        for kind, values in other.items():
            self.values.setdefault(kind, []).extend(values)

    def percentiles(self, kind: str) -> dict[int, float] | None:
        """Return those of :data:`SHOWN`; None where there is no request."""
        values = self.values.get(kind)
        if not values:
            return None
        if len(values) == 1:
            return dict.fromkeys(SHOWN, values[0])
        all_of_them = statistics.quantiles(values, n=100, method="inclusive")
        return {p: all_of_them[p - 1] for p in SHOWN}


@dataclass(frozen=True)
class Power:
    """What was sampled in one cycle.

    Attributes:
        cycle: Which one.
        window_seconds: How long the window was that the energy is of; it begins at 0.
        samples: By device, seconds since the window began and watts.
    """

    cycle: int
    window_seconds: float
    samples: Mapping[str, list[tuple[float, float]]]


def read_latencies(text: str) -> dict[str, list[float]]:
    """Return the latencies in a ``requests.csv``, in ms, by column."""
    found: dict[str, list[float]] = {}
    for row in _rows(text):
        for kind in KINDS:
            if (value := _number(row.get(kind))) is not None:
                found.setdefault(kind, []).append(value)
    return found


def read_power(text: str, most: int) -> dict[str, list[tuple[float, float]]]:
    """Return the samples in a ``power.csv`` by device; of more than *most*, the extremes of each stretch."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(text):
        at, watts = _number(row.get("seconds")), _number(row.get("power_w"))
        if at is not None and watts is not None:
            found.setdefault(row.get("device") or "?", []).append((at, watts))
    share = most // max(1, len(found))
    return {device: _thinned(samples, share) for device, samples in found.items()}


def _thinned(samples: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    if len(samples) <= most:
        return samples
    size = math.ceil(2 * len(samples) / max(2, most))
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
