"""What earlier sessions have measured of a study: a gate that is selected alone judges that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_llem.nodes import REFERENCE
from pytest_llem.results.models import PointResult, StudyResult


class Earlier:
    """Results of one design, the newest first. Each is read when it is needed, once.

    Args:
        directories: Their results directories.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._read: dict[Path, StudyResult | None] = {}

    def point(self, name: str, cycles: int) -> tuple[Path, PointResult] | None:
        """Return the newest result of a point that has so many cycles, else the newest one that has any.

        Args:
            name: Id of the point.
            cycles: As many as the study wants.

        Returns:
            Its results directory, and what that has of the point.
        """
        found = [(directory, one) for directory, one in self._points(name, cycles) if one.cycles]
        whole = [(directory, one) for directory, one in found if len(one.cycles) >= cycles]
        return next(iter([*whole, *found]), None)

    def result(self) -> StudyResult | None:
        """Return the newest result."""
        return next((one for directory in self._directories if (one := self._load(directory))), None)

    def reference(self) -> StudyResult | None:
        """Return the newest result of a reference that was measured in turns with the study."""
        found = (self._load(directory / REFERENCE) for directory in self._directories)
        return next((one for one in found if one is not None), None)

    def _points(self, name: str, cycles: int) -> Iterator[tuple[Path, PointResult]]:
        """Yield what there is of a point, up to the first that is whole."""
        for directory in self._directories:
            result = self._load(directory)
            for point in result.points if result else ():
                if point.id == name:
                    yield directory, point
                    if len(point.cycles) >= cycles:
                        return

    def _load(self, directory: Path) -> StudyResult | None:
        if directory not in self._read:
            try:
                self._read[directory] = StudyResult.load(directory)
            except (OSError, ValueError):  # of another version, or not whole
                self._read[directory] = None
        return self._read[directory]
