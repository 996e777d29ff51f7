"""Results of earlier sessions, which a gate judges if the experiments of its point are not selected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pytest_llem._plugin.node_ids import REFERENCE
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult


class JudgedPoint(NamedTuple):
    """The result of a point that a gate judges.

    Attributes:
        point: The result; without metrics if the point was never measured.
        source: Results directory of an earlier session; None for this session.
    """

    point: PointResult
    source: Path | None = None


class InterleavedRuns(NamedTuple):
    """A point and its reference, interleaved in one session: cycles of two sessions cannot be paired."""

    candidate: JudgedPoint
    reference: PointResult


class PreviousResults:
    """Results of one study design, the newest first, each of which is read once when it is needed.

    If the code, model or dataset of a point has changed since, its ``replay_mismatch`` says what.

    Args:
        directories: Results directories, the newest first.
        inputs: The code, the models and the datasets that the study would use now.
        reference_inputs: The same for the reference; None if there is no reference interpreter.
    """

    def __init__(
        self, directories: Sequence[Path], inputs: CurrentInputs, reference_inputs: CurrentInputs | None = None
    ) -> None:
        self._directories = directories
        self._inputs, self._reference_inputs = inputs, reference_inputs
        self._read: dict[Path, StudyResult | None] = {}

    def point(self, name: str, cycles: int) -> JudgedPoint | None:
        """Return the newest result of a point with at least *cycles* ended cycles, else the newest with one.

        A failed cycle has ended too: a newer run with failures takes precedence over an older one without.

        Args:
            name: Id of the point.
            cycles: Number of cycles in the study.
        """
        incomplete: JudgedPoint | None = None
        for directory, result in self._results():
            point = _point_of(result, name)
            if point is not None and len(_ended(result, point)) >= cycles:
                return JudgedPoint(self._checked(directory, point), directory)
            if incomplete is None and point is not None and point.cycles:
                incomplete = JudgedPoint(self._checked(directory, point), directory)
        return incomplete

    def pair(self, name: str, cycles: int, reference_name: str) -> InterleavedRuns | None:
        """Return the newest result of a point with *cycles* or more ended on both sides, else the newest with one.

        Args:
            name: Id of the point.
            cycles: Number of cycles in the study.
            reference_name: Name of the reference.
        """
        incomplete: InterleavedRuns | None = None
        for directory, result, other in self._interleaved(reference_name):
            point, reference = _point_of(result, name), _point_of(other, name)
            if point is None or reference is None:
                continue
            is_complete = len(_ended(result, point) & _ended(other, reference)) >= cycles
            if not is_complete and (incomplete is not None or not set(point.cycles) & set(reference.cycles)):
                continue
            candidate = JudgedPoint(self._checked(directory, point), directory)
            found = InterleavedRuns(candidate, self._checked(directory / REFERENCE, reference))
            if is_complete:
                return found
            incomplete = found
        return incomplete

    def result(self) -> StudyResult | None:
        """Return the newest result of the study; None if there is none."""
        return next((result for _, result in self._results()), None)

    def reference(self, name: str) -> StudyResult | None:
        """Return the newest result of the reference *name*, interleaved with the study; None if there is none."""
        return next((reference for _, _, reference in self._interleaved(name)), None)

    def _checked(self, directory: Path, point: PointResult) -> PointResult:
        """Return *point* with ``replay_mismatch`` set to what has changed since it was measured."""
        inputs = (self._reference_inputs if directory.name == REFERENCE else None) or self._inputs
        changes = inputs.changes_since(directory, point)
        return point.model_copy(update={"replay_mismatch": "; ".join(changes) or point.replay_mismatch})

    def _interleaved(self, name: str) -> Iterator[tuple[Path, StudyResult, StudyResult]]:
        """Yield results that were interleaved with the reference *name*, with its results."""
        for directory, result in self._results():
            reference = self._load(directory / REFERENCE)
            if reference is not None and reference.measurement_protocol.get("reference") == name:
                yield directory, result, reference

    def _results(self) -> Iterator[tuple[Path, StudyResult]]:
        for directory in self._directories:
            if (result := self._load(directory)) is not None:
                yield directory, result

    def _load(self, directory: Path) -> StudyResult | None:
        if directory not in self._read:
            try:
                self._read[directory] = StudyResult.load(directory)
            except (OSError, ValueError):  # of another version, or incomplete
                self._read[directory] = None
        return self._read[directory]


def _point_of(result: StudyResult, name: str) -> PointResult | None:
    return next((point for point in result.points if point.id == name), None)


def _ended(result: StudyResult, point: PointResult) -> set[int]:
    """Return the numbers of the cycles of *point* that were completed or failed."""
    ended = ("completed", "failed")
    return {
        one.cycle for one in result.experiments if one.config_hash == point.config_hash and one.status in ended
    }
