"""Read a results directory, one experiment at a time, and keep what the report shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.reporting.html.provenance import Provenance
from pytest_llem.reporting.html.samples import Latencies, Power, read_latencies, read_power
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import stored_result
from pytest_llem.results.models import ManifestEntry, PointResult
from pytest_llem.results.study_result import StudyResult

#: Points on a page: more make it slow in a browser. The page says how many are left out.
MAX_POINTS = 1000

#: Power samples on a page, divided equally among the experiments.
MAX_SAMPLES = 120_000


@dataclass(frozen=True)
class Cycle:
    """A completed experiment.

    Attributes:
        entry: Its entry in the manifest.
        point: Index of its point in ``Contents.points``.
        place: Index of its values in ``Summary.values``: its position among the point's completed cycles.
    """

    entry: ManifestEntry
    point: int
    place: int


@dataclass
class Contents:
    """The data that a report shows.

    Attributes:
        result: The study's result.
        points: The points on the page.
        left_out: Number of points that are not on the page.
        cycles: The completed experiments of those points, in run order.
        power: The power samples of each cycle, by index of the point, in the order of the cycles.
        latencies: The latencies of the requests of all cycles, by index of the point.
        provenance: How the figures were obtained.
        study_text: The study file as it was run; None if it is missing.
        base_text: The file that the study's ``base:`` names; None if it is missing.
    """

    result: StudyResult
    points: list[PointResult]
    left_out: int
    cycles: list[Cycle] = field(default_factory=list)
    power: dict[int, list[Power]] = field(default_factory=dict)
    latencies: dict[int, Latencies] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    study_text: str | None = None
    base_text: str | None = None


def read_contents(directory: Path, result: StudyResult) -> Contents:
    """Return the data of *result* from its *directory*. Files that are missing or not valid are left out."""
    shown = _shown(result)
    contents = Contents(result, shown[:MAX_POINTS], max(0, len(shown) - MAX_POINTS))
    contents.study_text = _text(directory / "study.yaml")
    contents.base_text = _text(directory / "study.base.yaml")
    contents.cycles = sorted(_cycles(contents), key=lambda one: one.entry.started_at or "")
    max_samples = max(60, MAX_SAMPLES // max(1, len(contents.cycles)))
    for cycle in sorted(contents.cycles, key=lambda one: (one.point, one.place)):
        _add(contents, directory, cycle, max_samples)
    return contents


def _shown(result: StudyResult) -> list[PointResult]:
    """Return the points that were selected or have results; if there are too many, those with results first."""
    planned = {entry.config_hash for entry in result.experiments if entry.status != "deselected"}
    points = [point for point in result.points if point.config_hash in planned or point.cycles]
    return sorted(points, key=lambda point: not point.cycles) if len(points) > MAX_POINTS else points


def _cycles(contents: Contents) -> Iterator[Cycle]:
    places = {
        (point.config_hash, cycle): (index, place)
        for index, point in enumerate(contents.points)
        for place, cycle in enumerate(point.cycles)
    }
    for entry in contents.result.experiments:
        found = places.get((entry.config_hash, entry.cycle))
        if entry.status == "completed" and found is not None:
            yield Cycle(entry, *found)


def _add(contents: Contents, directory: Path, cycle: Cycle, max_samples: int) -> None:
    text = stored_result(directory, cycle.entry)
    if text is None:
        return
    try:
        result = ExperimentResult.model_validate_json(text)
    except ValueError:  # written by another version
        return
    contents.provenance.add(result)
    assert cycle.entry.result_file is not None  # the result was read from it
    stem = directory / cycle.entry.result_file.removesuffix(".json")
    requests, power = (_text(stem.with_name(f"{stem.name}.{suffix}")) for suffix in ("requests.csv", "power.csv"))
    contents.latencies.setdefault(cycle.point, Latencies()).extend(read_latencies(requests or ""))
    if samples := read_power(power or "", max_samples):
        window = result.window.energy_seconds or result.window.window_seconds
        contents.power.setdefault(cycle.point, []).append(Power(cycle.entry.cycle, window, samples))


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    except OSError:
        return None
