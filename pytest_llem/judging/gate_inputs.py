"""Results that a study's gates judge: this session's, and earlier ones of points that it did not select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pytest_llem._plugin.node_ids import REFERENCE
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import StudyConfig


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
        reference_inputs: The same for the reference; None without a reference interpreter.
    """

    def __init__(
        self, directories: Sequence[Path], inputs: CurrentInputs, reference_inputs: CurrentInputs | None = None
    ) -> None:
        self._directories = directories
        self._inputs, self._reference_inputs = inputs, reference_inputs
        self._read: dict[Path, StudyResult | None] = {}

    def point(self, name: str, cycles: int) -> JudgedPoint | None:
        """Return the newest result of a point with at least *cycles* ended cycles, else with a completed one.

        A failed cycle has ended too: a newer run with failures takes precedence over an older one without.

        Args:
            name: Id of the point.
            cycles: Number of cycles that every point of the study has at least.
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
        """Return the newest result of a point with *cycles* ended cycles or more on both sides.

        If there is none, return the newest with one that both sides completed.

        Args:
            name: Id of the point.
            cycles: Number of cycles that every point of the study has at least.
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


class GateInputs:
    """Results of a study's points. A point's result is this session's if an experiment of it was selected.

    Args:
        study: The study.
        run: The study's run in this session; None if no experiment of it was selected.
        reference: The reference's run in this session; None if no experiment of it was selected.
        previous: Results of earlier sessions.
        is_interleaved: Whether the session compares interleaved sides, which cannot be resumed.
    """

    def __init__(
        self,
        study: StudyConfig,
        run: StudyRun | None,
        reference: StudyRun | None,
        previous: PreviousResults,
        *,
        is_interleaved: bool,
    ) -> None:
        self._study = study
        self._run, self._reference = run, reference
        self._previous = previous
        self._is_interleaved = is_interleaved

    @cached_property
    def own(self) -> StudyResult | None:
        """This session's result of the study; None if nothing was selected."""
        return self._run.summarise() if self._run is not None and self._run.selected else None

    @cached_property
    def own_reference(self) -> StudyResult | None:
        """This session's result of the reference; None if nothing was selected."""
        run = self._reference
        return run.summarise() if run is not None and run.selected else None

    @cached_property
    def measured(self) -> set[str]:
        """Ids of the points of which this session has an experiment."""
        return _selected(self._run)

    @cached_property
    def without_reference(self) -> set[str]:
        """Ids of the points of which this session has an experiment but none of the reference."""
        return self.measured - _selected(self._reference)

    @cached_property
    def partly_selected(self) -> Mapping[str, str]:
        """Why no gate may judge a point of which only some cycles were selected, by the point's id.

        ``--lf`` selects failed cycles together with failed gates, and fewer cycles decide less.
        """
        found = {}
        others = "" if self._is_interleaved else ", or take the others from an earlier run with --llem-resume"
        for run in filter(None, (self._run, self._reference)):
            for name, cycles in Counter(one.point.id for one in run.selected.values()).items():
                if cycles < self._study.n_cycles:
                    found[name] = f"{cycles} of {self._study.n_cycles} cycles selected: select all of them{others}"
        return found

    def skip_reason(self, point: str) -> str | None:
        """Return why this session skipped an experiment of a point; None if it skipped none."""
        entries = self._run.entries if self._run is not None else ()
        skipped = (one for one in entries if one.config_summary == point and one.status == "skipped")
        return next((one.reason for one in skipped), None)

    @cached_property
    def points(self) -> Mapping[str, JudgedPoint]:
        """Each point's result from this session, else from the last session that measured it."""
        own, cycles = _by_id(self.own), self._study.min_cycles
        found = {}
        for name, blank in self._blank.items():
            if name in self.measured:
                found[name] = JudgedPoint(own[name])
            else:
                found[name] = self._previous.point(name, cycles) or JudgedPoint(blank)
        return found

    def interleaved(self, reference_name: str) -> Mapping[str, InterleavedRuns]:
        """Return each point and its reference from this session, else from the last session that measured both.

        Args:
            reference_name: Name of the reference.
        """
        own, references, cycles = _by_id(self.own), _by_id(self.own_reference), self._study.min_cycles
        found = {}
        for name, blank in self._blank.items():
            if name in self.measured:
                found[name] = InterleavedRuns(JudgedPoint(own[name]), references.get(name, blank))
            else:
                last = self._previous.pair(name, cycles, reference_name)
                found[name] = last or InterleavedRuns(JudgedPoint(blank), blank)
        return found

    @cached_property
    def _blank(self) -> Mapping[str, PointResult]:
        """Each point of the study without a result."""
        return {
            point.id: PointResult(
                id=point.id,
                axes=point.axes,
                config=point.config.model_dump(mode="json"),
                config_hash=point.config_hash,
                metrics={},
            )
            for point in self._study.points
        }


def _selected(run: StudyRun | None) -> set[str]:
    return {one.point.id for one in run.selected.values()} if run is not None else set()


def _by_id(result: StudyResult | None) -> Mapping[str, PointResult]:
    return {point.id: point for point in result.points} if result is not None else {}
