"""``n_cycles: auto``: end the cycles of a point once its gates are decided.

The controller looks at the results so far whenever a point has completed one of the rule's numbers of cycles on
all sides. The point's later experiments are skipped; verdicts and intervals allow for the looks.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import takewhile

import pytest

from pytest_llem._plugin.node_ids import REFERENCE, REGRESSION, parse, run_key
from pytest_llem._plugin.shared_state import DECIDED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.execution.live_line import print_line
from pytest_llem.gates.sequential import Schedule, is_precise
from pytest_llem.judging.judge import InputsOf, StudyGates
from pytest_llem.recording.recorder import Recorder
from pytest_llem.results.study_run import StudyRun
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.design import Point

#: Verdicts after which a gate needs no more cycles. What cannot be judged now cannot be judged later.
_DECIDED = ("REGRESSION", "IMPROVEMENT", "SAME", "NOT JUDGED")


class UntilDecided:
    """A plugin of pytest's controller, registered if a study has ``n_cycles: auto``.

    Args:
        config: The controller's configuration.
        recorder: The recorder of the session.
        inputs: Returns the code, the models and the datasets that a study would use now.
    """

    def __init__(self, config: pytest.Config, recorder: Recorder, inputs: InputsOf) -> None:
        self._config = config
        self._recorder = recorder
        self._inputs = inputs
        self._looked: dict[tuple[str, str], int] = {}

    @pytest.hookimpl(trylast=True)  # after the recorder
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = parse(report.nodeid)
        if node is None or report.when != "teardown":
            return
        run = self._recorder.runs.get(node.file)
        if run is not None and run.study.execution.until_decided:
            for point, n in self._due(node.file, run):
                self._look(node.file, run, point, n)

    def _due(self, file: str, run: StudyRun) -> list[tuple[Point, int]]:
        """Return the points that have completed a number of cycles at which they are looked at."""
        execution = run.study.execution
        sides = [run, self._recorder.runs.get(run_key(file, REFERENCE))]
        sizes = Schedule(execution.min_cycles, execution.max_cycles).sizes
        due = []
        for point in run.study.points:
            n = min(_completed(side, point) for side in sides if side is not None)
            last = self._looked.get((file, point.id), 0)
            if n > last and n in sizes:
                self._looked[file, point.id] = n
                due.append((point, n))
        return due

    def _look(self, file: str, run: StudyRun, point: Point, n: int) -> None:
        """Look at a point after *n* cycles, and end its cycles if it is decided."""
        gates = StudyGates(self._config, file, self._recorder, self._inputs)
        wanted = {gate.id for gate in gates.gates.values() if gate.kind == REGRESSION and gate.point == point.id}
        if wanted:
            found = gates.verdicts(wanted)
            verdicts = [found[one] for one in sorted(wanted)]
            is_decided = all(one.verdict in _DECIDED for one in verdicts)
            text = "; ".join(map(_text, verdicts))
        else:
            open_metrics = self._open_metrics(run, point)
            is_decided = not open_metrics
            text = f"not yet within {run.study.execution.half_width:.1%}: {', '.join(open_metrics)}"
        if is_decided:
            reason = f"decided after {n} cycles"
            with suppress(OSError):  # if it cannot be written, xdist's workers go on
                self._config.stash[SHARED_STATE].put(file, f"{DECIDED}-{point.config_hash}", [n, reason])
            text = f"decided: {text}" if wanted else "decided"
        if n < run.study.n_cycles or not is_decided:
            print_line(self._config, f"{point.id} after {n} cycles, {text}")

    def _open_metrics(self, run: StudyRun, point: Point) -> list[str]:
        """Return the metrics whose intervals are not narrow yet, of a point without comparison."""
        study = run.study
        budgets = {budget.metric for budget in study.budgets if budget.point == point.id}
        result = next(one for one in run.summarise().points if one.id == point.id)
        names = budgets or set(study.gates.family)
        summaries = {name: result.metrics[name] for name in sorted(names) if result.metrics[name].n}
        return [
            name
            for name, summary in summaries.items()
            if not is_precise([one for one in summary.values if one is not None], study.execution.half_width)
        ]


def _completed(run: StudyRun, point: Point) -> int:
    """Return the number of a point's completed cycles before the first that has not ended."""
    entries = sorted(
        (one for one in run.entries if one.config_hash == point.config_hash), key=lambda one: one.cycle
    )
    ended = takewhile(lambda one: one.status not in ("pending", "running"), entries)
    return sum(one.status == "completed" for one in ended)


def _text(verdict: GateVerdict) -> str:
    if verdict.ratio is None or verdict.interval is None:
        return f"{verdict.metric} {verdict.verdict}"
    low, high = verdict.interval
    word = "open" if verdict.verdict == "INCONCLUSIVE" else verdict.verdict
    return f"{verdict.metric} {verdict.ratio:.3f} ({low:.3f}–{high:.3f}) {word}"
