"""``n_cycles: auto``: end the cycles of a point once its gates are decided.

The controller judges the results so far whenever points have completed one of the numbers of cycles that
:class:`~pytest_llem.gates.sequential.Schedule` fixes, on all sides. The point's later experiments are skipped;
verdicts and intervals allow for the looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

import pytest

from pytest_llem._plugin.node_ids import REFERENCE, REGRESSION, parse, run_key
from pytest_llem._plugin.shared_state import DECIDED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.terminal_output import print_line
from pytest_llem.gates.sequential import Schedule, is_precise
from pytest_llem.gates.verdict_text import ratio_text
from pytest_llem.judging.judge import StudyGates
from pytest_llem.recording.recorder import Recorder
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.study_run import StudyRun
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.design import Point

#: Why a point gets no more cycles.
_DECIDED, _NOT_JUDGED = "decided", "cannot be judged"


class UntilDecided:
    """A plugin of pytest's controller, registered if a study has ``n_cycles: auto``.

    Args:
        config: The controller's configuration.
        recorder: The recorder of the session.
    """

    def __init__(self, config: pytest.Config, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder
        #: Number of cycles at the last look at a point, by file and the point's id.
        self._looked: dict[tuple[str, str], int] = {}

    @pytest.hookimpl(trylast=True)  # after the recorder
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = parse(report.nodeid)
        if node is None or report.when != "teardown":
            return
        run = self._recorder.runs.get(node.file)
        if run is not None and run.study.execution.until_decided and (due := self._due(node.file, run)):
            self._look(node.file, run, due)

    def _due(self, file: str, run: StudyRun) -> dict[str, int]:
        """Return the points to look at now, and after how many cycles, by their ids.

        Points are looked at together, as soon as all have ended that many cycles, so that results are read once in
        a cycle. With ``cycle_order: sequential`` each is looked at alone.
        """
        sides = [run, self._recorder.runs.get(run_key(file, REFERENCE))]
        cycles = [_cycles(side) for side in sides if side is not None]
        open_points = [
            point.id
            for point in run.study.points
            if all(point.id in side for side in cycles) and not self._is_decided(file, point)
        ]
        execution = run.study.execution
        completed = {name: min(side[name].completed for side in cycles) for name in open_points}
        if execution.cycle_order != "sequential":  # other workers may be ahead with some points
            ended_by_all = min((side[name].ended for side in cycles for name in open_points), default=0)
            completed = {name: min(number, ended_by_all) for name, number in completed.items()}
        sizes = Schedule(execution.min_cycles, execution.max_cycles).sizes
        due = {}
        for name, number in completed.items():
            n = max((size for size in sizes if size <= number), default=0)
            if n > self._looked.get((file, name), 0):
                due[name] = self._looked[file, name] = n
        return due

    def _is_decided(self, file: str, point: Point) -> bool:
        return self._config.stash[SHARED_STATE].read(file, f"{DECIDED}-{point.config_hash}") is not None

    def _look(self, file: str, run: StudyRun, due: Mapping[str, int]) -> None:
        """Judge the points that are *due*, by number of cycles, and end the cycles of those that are decided."""
        gates = StudyGates(self._config, file, self._recorder)
        points = {gate.id: gate.point for gate in gates.gates.values() if gate.kind == REGRESSION}
        found = gates.verdicts({name for name, point in points.items() if point in due})
        for point in run.study.points:
            if (n := due.get(point.id)) is None:
                continue
            if verdicts := [found[gate] for gate, name in points.items() if name == point.id]:
                why = _by_verdicts(verdicts)
                text = ": ".join(filter(None, (why, "; ".join(map(_text, verdicts)))))
            else:
                why, text = _by_precision(run, point)
            if why is not None:
                content = [n, f"{why} after {n} cycles"]
                with suppress(OSError):  # if it cannot be written, xdist's workers go on
                    self._config.stash[SHARED_STATE].put(file, f"{DECIDED}-{point.config_hash}", content)
            print_line(self._config, f"{point.id} after {n} cycles, {text}")


def _by_verdicts(verdicts: Sequence[GateVerdict]) -> str | None:
    """Return why a point with these verdicts needs no more cycles; None if it does."""
    found = {one.verdict for one in verdicts}
    if "INCONCLUSIVE" in found:
        return None
    # What cannot be judged now cannot be judged later.
    return _NOT_JUDGED if found == {"NOT JUDGED"} else _DECIDED


def _by_precision(run: StudyRun, point: Point) -> tuple[str | None, str]:
    """Return why a point without comparison needs no more cycles, None if it does; and a text for the user."""
    study = run.study
    budgets = {budget.metric for budget in study.budgets if budget.point == point.id}
    result = next(one for one in run.summarise().points if one.id == point.id)
    names = budgets or set(study.compared_metrics(point))
    values = {name: [one for one in result.metrics[name].values if one is not None] for name in sorted(names)}
    known = {name: found for name, found in values.items() if found}
    if not known:
        return _NOT_JUDGED, f"{_NOT_JUDGED}: no value of {', '.join(values)}"
    half_width = study.execution.half_width
    too_wide = [name for name, found in known.items() if not is_precise(found, half_width)]
    if too_wide:
        return None, f"not yet within {100 * half_width:g}%: {', '.join(too_wide)}"
    return _DECIDED, _DECIDED


class _Cycles(NamedTuple):
    """How many cycles of a point have ended, and how many of these are completed."""

    ended: int
    completed: int


def _cycles(run: StudyRun) -> dict[str, _Cycles]:
    """Return the cycles of each selected point before the first that has not ended, by the point's id."""
    by_point: dict[str, list[ManifestEntry]] = {}
    for entry in run.entries:
        if entry.status != "deselected":
            by_point.setdefault(entry.config_summary, []).append(entry)
    found = {}
    for name, entries in by_point.items():
        entries.sort(key=lambda one: one.cycle)
        ended = [*takewhile(lambda one: one.status not in ("pending", "running"), entries)]
        found[name] = _Cycles(len(ended), sum(one.status == "completed" for one in ended))
    return found


def _text(verdict: GateVerdict) -> str:
    if verdict.ratio is None or verdict.interval is None:
        return f"{verdict.metric} {verdict.verdict}"
    low, high = verdict.interval
    return f"{verdict.metric} {ratio_text(verdict.ratio)} ({ratio_text(low)}–{ratio_text(high)}) {verdict.verdict}"
