"""Read a results directory, one experiment at a time, and keep only what the report shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from pytest_llem.reporting.html.provenance import Provenance
from pytest_llem.results.csv_files import read_csv
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import stored_result
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.serving import OUTSIDE_WINDOW
from pytest_llem.results.study_result import StudyResult, selected_points

#: Maximum number of points on a page: more would make it slow in a browser. The page says how many are left out.
MAX_POINTS = 1000

#: About the maximum number of power samples on a page, divided equally among the cycles that are drawn, and the
#: minimum of a cycle: fewer would not show its course. The page says of how many cycles power is left out.
MAX_SAMPLES = 120_000
MIN_SAMPLES = 60

#: Latency columns of ``requests.csv``, with their names on the page.
LATENCY_COLUMNS = {
    "ttft_ms": "Time to first token",
    "itl_mean_ms": "Inter-token latency, mean of each request",
    "tpot_ms": "Time per output token after the first",
    "e2e_ms": "End-to-end latency",
}

#: Percentiles shown of each distribution.
SHOWN_PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Cycle:
    """A completed experiment: one cycle of one point.

    Attributes:
        entry: The experiment's entry in the manifest.
        point: Index of the point in ``Contents.points``.
        place: Position among the point's completed cycles, which is their index in ``values`` of its metrics.
    """

    entry: ManifestEntry
    point: int
    place: int


@dataclass(frozen=True)
class Power:
    """The power samples of one cycle.

    Attributes:
        cycle: Number of the cycle.
        seconds: Time that the meter covers, in s; the length of the window if that is unknown.
        samples: Pairs of time since the window's start, in s, and power, in W, by device.
    """

    cycle: int
    seconds: float
    samples: Mapping[str, list[tuple[float, float]]]


@dataclass
class Contents:
    """The data that a report shows.

    Attributes:
        result: The study's result.
        points: The points on the page.
        left_out: Number of selected points that are not on the page.
        planned: Number of selected experiments of each point, by the hash of its configuration.
        cycles: The completed experiments of ``points``, in the order in which they started.
        power: The power samples of the first cycles of each point, by index of the point.
        power_left_out: Number of cycles with power samples that are not in ``power``.
        latencies: The latencies in ms of the window's answered requests with a token, of all cycles, by index of
            the point and by column.
        provenance: How the figures were obtained.
        study_text: The study file as it was run; None if it is missing.
        base_text: The file that the study's ``base:`` names; None if it is missing.
    """

    result: StudyResult
    points: list[PointResult]
    left_out: int
    planned: Mapping[str, int]
    cycles: list[Cycle] = field(default_factory=list)
    power: dict[int, list[Power]] = field(default_factory=dict)
    power_left_out: int = 0
    latencies: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    study_text: str | None = None
    base_text: str | None = None


def read_contents(directory: Path, result: StudyResult) -> Contents:
    """Return the data of *result* from its *directory*. Files that are missing or not valid are left out."""
    shown, planned = selected_points(result)
    if len(shown) > MAX_POINTS:  # so that points without results are left out first
        shown.sort(key=lambda point: not point.cycles)
    contents = Contents(result, shown[:MAX_POINTS], max(0, len(shown) - MAX_POINTS), planned)
    contents.study_text = _text(directory / "study.yaml")
    contents.base_text = _text(directory / "study.base.yaml")
    contents.cycles = sorted(_cycles(contents), key=lambda cycle: cycle.entry.started_at or "")
    max_cycles = MAX_SAMPLES // MIN_SAMPLES // max(1, len(contents.points))
    max_samples = MAX_SAMPLES // max(1, sum(cycle.place < max_cycles for cycle in contents.cycles))
    for cycle in sorted(contents.cycles, key=lambda cycle: (cycle.point, cycle.place)):
        _add_cycle(contents, directory, cycle, max_samples if cycle.place < max_cycles else 0)
    return contents


def _cycles(contents: Contents) -> Iterator[Cycle]:
    """Yield the completed experiments of the points on the page."""
    places = {
        (point.config_hash, cycle): (index, place)
        for index, point in enumerate(contents.points)
        for place, cycle in enumerate(point.cycles)
    }
    for entry in contents.result.experiments:
        found = places.get((entry.config_hash, entry.cycle))
        if entry.status == "completed" and found is not None:
            yield Cycle(entry, *found)


def _add_cycle(contents: Contents, directory: Path, cycle: Cycle, max_samples: int) -> None:
    """Add the provenance, latencies and about *max_samples* power samples of *cycle* to *contents*."""
    text = stored_result(directory, cycle.entry)
    if text is None:
        return
    try:
        result = ExperimentResult.model_validate_json(text)
    except ValueError:  # written by another version
        return
    contents.provenance.add(result)
    assert cycle.entry.result_file is not None  # stored_result() has read this file
    stem = directory / cycle.entry.result_file.removesuffix(".json")
    requests, power = (_text(stem.with_name(f"{stem.name}.{suffix}")) for suffix in ("requests.csv", "power.csv"))
    latencies = contents.latencies.setdefault(cycle.point, {})
    for column, values in read_latencies(requests or "").items():
        latencies.setdefault(column, []).extend(values)
    if power is not None and not max_samples:
        contents.power_left_out += 1
    elif samples := read_power(power or "", max_samples):
        seconds = result.window.energy_seconds or result.window.window_seconds
        contents.power.setdefault(cycle.point, []).append(Power(cycle.entry.cycle, seconds, samples))


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    except OSError:
        return None


def read_latencies(text: str) -> dict[str, list[float]]:
    """Return latencies in ms of a ``requests.csv`` by column, of the window's answered requests with a token."""
    found: dict[str, list[float]] = {}
    for row in _rows(text):
        # The pass of a server's request is the phase of the load.
        if row.get("pass") in OUTSIDE_WINDOW or row.get("error") or _number(row.get("output_tokens")) == 0:
            continue
        for column in LATENCY_COLUMNS:
            if (value := _number(row.get(column))) is not None:
                found.setdefault(column, []).append(value)
    return found


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Return the percentiles :data:`SHOWN_PERCENTILES` of *values*, of which there is at least one."""
    return dict(zip(SHOWN_PERCENTILES, map(float, np.percentile(values, SHOWN_PERCENTILES)), strict=True))


def read_power(text: str, max_samples: int) -> dict[str, list[tuple[float, float]]]:
    """Return the samples of a ``power.csv`` by device: about *max_samples* in all, peaks included."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(text):
        seconds, watts = _number(row.get("seconds")), _number(row.get("power_w"))
        if seconds is not None and watts is not None:
            found.setdefault(row.get("device") or "?", []).append((seconds, watts))
    max_per_device = max_samples // max(1, len(found))
    return {device: _thinned(samples, max_per_device) for device, samples in found.items()}


def _thinned(samples: list[tuple[float, float]], max_samples: int) -> list[tuple[float, float]]:
    """Return about *max_samples*: the minimum and maximum of each interval, so that peaks remain visible."""
    if len(samples) <= max_samples:
        return samples
    watts = itemgetter(1)
    size = math.ceil(2 * len(samples) / max(2, max_samples))
    intervals = (samples[start : start + size] for start in range(0, len(samples), size))
    return [
        sample for interval in intervals for sample in sorted({min(interval, key=watts), max(interval, key=watts)})
    ]


def _rows(text: str) -> Iterator[Mapping[str, str | None]]:
    try:
        yield from read_csv(io.StringIO(text))
    except csv.Error:
        return


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
