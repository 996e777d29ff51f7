"""What the gates of a study are judged by: this session's results, and earlier ones of what it did not select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pytest_llem.judging.previous_results import PreviousResults
from pytest_llem.results.models import PointResult, StudyResult
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import StudyConfig


class JudgedPoint(NamedTuple):
    """A point as it was measured.

    Attributes:
        point: What was found; without metrics where it was never measured.
        source: The results directory, where that is an earlier session's.
    """

    point: PointResult
    source: Path | None = None


class InterleavedRuns(NamedTuple):
    """A point as it was measured in turns with a reference, in one session: cycles of two are no pairs."""

    here: JudgedPoint
    there: PointResult


class GateInputs:
    """Results of a study, point by point. A point is this session's where an experiment of it was selected.

    Args:
        study: The study.
        run: Of it, in this session; None where nothing of it was selected.
        reference: The run of the reference, likewise.
        earlier: Results of earlier sessions.
    """

    def __init__(
        self, study: StudyConfig, run: StudyRun | None, reference: StudyRun | None, earlier: PreviousResults
    ) -> None:
        self._study = study
        self._run, self._reference = run, reference
        self._earlier = earlier

    @cached_property
    def own(self) -> StudyResult | None:
        """What this session has measured of the study."""
        return self._run.summarise() if self._run is not None and self._run.selected else None

    @cached_property
    def own_reference(self) -> StudyResult | None:
        """What this session has measured of the reference."""
        run = self._reference
        return run.summarise() if run is not None and run.selected else None

    @cached_property
    def measured(self) -> set[str]:
        """The points of which this session has an experiment."""
        return _selected(self._run)

    @cached_property
    def alone(self) -> set[str]:
        """Those of them of whose reference it has none."""
        return self.measured - _selected(self._reference)

    @cached_property
    def in_part(self) -> Mapping[str, str]:
        """Why no gate may judge a point of which some cycles were selected and some were not.

        ``--lf`` would select a cycle that failed with the gates that did, and fewer cycles decide less.
        """
        found = {}
        for run in filter(None, (self._run, self._reference)):
            for name, cycles in Counter(one.point.id for one in run.selected.values()).items():
                if cycles < self._study.n_cycles:
                    found[name] = (
                        f"{cycles} of {self._study.n_cycles} cycles selected: select all of them, "
                        "or take the others from before with --llem-resume"
                    )
        return found

    @cached_property
    def points(self) -> Mapping[str, JudgedPoint]:
        """Each point as this session has measured it, else as it was measured last."""
        own, cycles = _by_id(self.own), self._study.n_cycles
        found = {}
        for name, blank in self._blank.items():
            if name in self.measured:
                found[name] = JudgedPoint(own[name])
            elif (last := self._earlier.point(name, cycles)) is not None:
                found[name] = JudgedPoint(last.point, last.directory)
            else:
                found[name] = JudgedPoint(blank)
        return found

    def in_turns(self, interpreter: str) -> Mapping[str, InterleavedRuns]:
        """Return each point and its reference, as this session or else the last one that has both measured them.

        Args:
            interpreter: The reference's, as a comparison with it calls it.
        """
        own, theirs, cycles = _by_id(self.own), _by_id(self.own_reference), self._study.n_cycles
        found = {}
        for name, blank in self._blank.items():
            if name in self.measured:
                found[name] = InterleavedRuns(JudgedPoint(own[name]), theirs.get(name, blank))
            elif (last := self._earlier.pair(name, cycles, interpreter)) is not None:
                found[name] = InterleavedRuns(JudgedPoint(last.point, last.directory), last.reference)
            else:
                found[name] = InterleavedRuns(JudgedPoint(blank), blank)
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
