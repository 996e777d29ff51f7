"""What a page is made of: a results directory, read an experiment at a time and reduced to what is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.reporting.html.provenance import Provenance
from pytest_llem.reporting.html.samples import Latencies, Power, read_latencies, read_power
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import stored_result
from pytest_llem.results.models import ManifestEntry, PointResult, StudyResult

#: Points on a page, the rest being told of: nobody reads more, and browsers take their time.
MAX_POINTS = 1000

#: Samples of power on a page; each experiment gets its share.
MAX_SAMPLES = 120_000


@dataclass(frozen=True)
class Cycle:
    """One experiment that is completed.

    Attributes:
        entry: Of the manifest.
        point: Index of its point among those shown.
        place: Among the point's completed cycles: where its values are.
    """

    entry: ManifestEntry
    point: int
    place: int


@dataclass
class Contents:
    """All that a page shows.

    Attributes:
        result: What the study came to.
        points: Those that are shown.
        left_out: How many are not.
        cycles: Of those points, in the order in which they ran.
        power: By index of the point, what was sampled in each cycle, in their order.
        latencies: By index of the point, over the requests of all its cycles.
        provenance: How the figures were obtained.
        study_text: The study file as it was run; null where it is not there.
        base_text: The file that it starts from; likewise.
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
    """Read what belongs to *result* in its *directory*. What is not there, or is not ours, is left out."""
    shown = _shown(result)
    contents = Contents(result, shown[:MAX_POINTS], max(0, len(shown) - MAX_POINTS))
    contents.study_text = _text(directory / "study.yaml")
    contents.base_text = _text(directory / "study.base.yaml")
    contents.cycles = sorted(_cycles(contents), key=lambda one: one.entry.started_at or "")
    most = max(60, MAX_SAMPLES // max(1, len(contents.cycles)))
    for cycle in sorted(contents.cycles, key=lambda one: (one.point, one.place)):
        _add(contents, directory, cycle, most)
    return contents


def _shown(result: StudyResult) -> list[PointResult]:
    """Return the points of which anything was to run; of many, those that have results first."""
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


def _add(contents: Contents, directory: Path, cycle: Cycle, most: int) -> None:
    text = stored_result(directory, cycle.entry)
    if text is None:
        return
    try:
        result = ExperimentResult.model_validate_json(text)
    except ValueError:  # of another version
        return
    contents.provenance.add(result)
    assert cycle.entry.result_file is not None  # which was read
    stem = directory / cycle.entry.result_file.removesuffix(".json")
    requests, power = (_text(stem.with_name(f"{stem.name}.{suffix}")) for suffix in ("requests.csv", "power.csv"))
    contents.latencies.setdefault(cycle.point, Latencies()).extend(read_latencies(requests or ""))
    if samples := read_power(power or "", most):
        window = result.window.energy_seconds or result.window.window_seconds
        contents.power.setdefault(cycle.point, []).append(Power(cycle.entry.cycle, window, samples))


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    except OSError:
        return None
