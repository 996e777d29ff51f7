"""Results that a study's gates judge: this session's, and earlier ones of points that it did not select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from pytest_llem.judging.previous_results import InterleavedRuns, JudgedPoint, PreviousResults
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import StudyConfig


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
