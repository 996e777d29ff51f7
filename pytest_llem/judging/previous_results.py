"""What earlier sessions have measured of a study: a gate that is selected alone judges that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pytest_llem._plugin.node_ids import REFERENCE
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results.models import PointResult, StudyResult


class Measured(NamedTuple):
    """A point's result, and the results directory that has it."""

    directory: Path
    point: PointResult


class MeasuredInterleaved(NamedTuple):
    """Likewise, and the same point of the reference that it was measured in turns with."""

    directory: Path
    point: PointResult
    reference: PointResult


class PreviousResults:
    """Results of one design, the newest first. Each is read when it is needed, once.

    A point whose code, model or dataset has changed since says so in its ``replay_mismatch``.

    Args:
        directories: Their results directories.
        inputs: The code, the models and the datasets that the study would use now, …
        reference_inputs: … and those of its reference, where there is one.
    """

    def __init__(
        self, directories: Sequence[Path], inputs: CurrentInputs, reference_inputs: CurrentInputs | None = None
    ) -> None:
        self._directories = directories
        self._inputs, self._reference_inputs = inputs, reference_inputs
        self._read: dict[Path, StudyResult | None] = {}

    def point(self, name: str, cycles: int) -> Measured | None:
        """Return the newest result of a point of which so many cycles ended, else the newest one that has any.

        A cycle that failed has ended too: an older run in which none did is not what was measured last.

        Args:
            name: Id of the point.
            cycles: As many as the study wants.
        """
        part: Measured | None = None
        for directory, result in self._results():
            point = _point_of(result, name)
            if point is not None and len(_ended(result, point)) >= cycles:
                return Measured(directory, self._checked(directory, point))
            if part is None and point is not None and point.cycles:
                part = Measured(directory, self._checked(directory, point))
        return part

    def pair(self, name: str, cycles: int, interpreter: str) -> MeasuredInterleaved | None:
        """Return the newest result of a point of which so many cycles ended on both sides, else any.

        Args:
            name: Id of the point.
            cycles: As many as the study wants.
            interpreter: The reference's.
        """
        part: MeasuredInterleaved | None = None
        for directory, result, other in self._turns(interpreter):
            point, reference = _point_of(result, name), _point_of(other, name)
            if point is None or reference is None:
                continue
            is_whole = len(_ended(result, point) & _ended(other, reference)) >= cycles
            if not is_whole and (part is not None or not set(point.cycles) & set(reference.cycles)):
                continue
            found = MeasuredInterleaved(
                directory,
                self._checked(directory, point),
                self._checked(directory / REFERENCE, reference),
            )
            if is_whole:
                return found
            part = found
        return part

    def result(self) -> StudyResult | None:
        """Return the newest result."""
        return next((result for _, result in self._results()), None)

    def reference(self, interpreter: str) -> StudyResult | None:
        """Return the newest result of a reference that was measured in turns with the study."""
        return next((reference for _, _, reference in self._turns(interpreter)), None)

    def _checked(self, directory: Path, point: PointResult) -> PointResult:
        """Return *point* with what has changed since it was measured."""
        inputs = (self._reference_inputs if directory.name == REFERENCE else None) or self._inputs
        changes = inputs.changes_since(directory, point)
        return point.model_copy(update={"replay_mismatch": "; ".join(changes) or point.replay_mismatch})

    def _turns(self, interpreter: str) -> Iterator[tuple[Path, StudyResult, StudyResult]]:
        """Yield results with their references, but for those that say that they were compared with another one."""
        for directory, result in self._results():
            if result.comparison is not None and result.comparison.reference != interpreter:
                continue
            if (reference := self._load(directory / REFERENCE)) is not None:
                yield directory, result, reference

    def _results(self) -> Iterator[tuple[Path, StudyResult]]:
        for directory in self._directories:
            if (result := self._load(directory)) is not None:
                yield directory, result

    def _load(self, directory: Path) -> StudyResult | None:
        if directory not in self._read:
            try:
                self._read[directory] = StudyResult.load(directory)
            except (OSError, ValueError):  # of another version, or not whole
                self._read[directory] = None
        return self._read[directory]


def _point_of(result: StudyResult, name: str) -> PointResult | None:
    return next((point for point in result.points if point.id == name), None)


def _ended(result: StudyResult, point: PointResult) -> set[int]:
    """Return the cycles of *point* that were completed or failed."""
    ended = ("completed", "failed")
    return {
        one.cycle for one in result.experiments if one.config_hash == point.config_hash and one.status in ended
    }
