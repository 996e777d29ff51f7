"""Gates: judged in the controller once everything has run, and reported as the test items that they are."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pytest

from pytest_llem._plugin.node_ids import REFERENCE, REGRESSION, Node, match_id, run_key
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import MARKED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.gate import Gate, budget_gates, regression_gates
from pytest_llem.gates.regression import Comparison, compare
from pytest_llem.gates.saved import BaselineError, load
from pytest_llem.judging.gate_inputs import GateInputs, InterleavedRuns, JudgedPoint
from pytest_llem.judging.gate_reports import Marks, gate_reports
from pytest_llem.judging.previous_results import PreviousResults
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.recording.recorder import Recorder
from pytest_llem.recording.studies import gates_by_file, study_of
from pytest_llem.reporting.github import workflow_commands
from pytest_llem.reporting.terminal.comparison import lines as comparison_lines
from pytest_llem.reporting.terminal.plan import counted
from pytest_llem.results.manifest import runs_of
from pytest_llem.results.models import StudyResult
from pytest_llem.results.verdicts import GateVerdict
from pytest_llem.study.design import StudyConfig


class InputsOf(Protocol):
    """Gives the code, the models and the datasets that a study, or its reference, would use now."""

    def __call__(self, study: StudyConfig, *, reference: bool) -> CurrentInputs: ...


class Judge:
    """Judges the gates of a session that were selected.

    A gate judges what this session has measured of its point; where nothing of that was selected, the newest
    result of the study's design.

    Args:
        config: The controller's.
        node_ids: Of all that was selected.
        recorder: Of the experiments among that; None where there are none.
        inputs: What gives the code, the models and the datasets that a study would use now.
    """

    def __init__(
        self, config: pytest.Config, node_ids: Iterable[str], recorder: Recorder | None, inputs: InputsOf
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._gates = gates_by_file(config, node_ids)
        self._recorder = recorder
        #: With the name of their study, and the ids of their gates that count.
        self._comparisons: list[tuple[str, Comparison, set[str]]] = []
        #: Of gates that count: neither skipped nor expected to fail.
        self._verdicts: list[GateVerdict] = []
        #: Results of earlier sessions, and how many gates were judged by each.
        self._sources: Counter[Path] = Counter()
        #: Gates that the session did not come to.
        self.left = sum(map(len, self._gates.values()))

    def judge(self, session: pytest.Session) -> None:
        """Judge them and report each; as pytest does, stop where ``-x`` or ``--maxfail`` says so.

        Raises:
            pytest.Session.Failed: Enough have failed.
            pytest.UsageError: What an item is to judge is not there any more.
        """
        for file, nodes in self._gates.items():
            bench = StudyGates(self._config, file, self._recorder, self._inputs)
            gates = {node_id: bench.gate(node_id, node) for node_id, node in nodes.items()}
            found = bench.verdicts({gate.id for gate in gates.values() if gate.kind == REGRESSION})
            counting: set[str] = set()
            if bench.comparison is not None:
                self._comparisons.append((bench.study.name, bench.comparison, counting))
            for node_id, gate in gates.items():
                verdict = found[gate.id] if gate.kind == REGRESSION else bench.budget(gate.id)
                judged = bench.judged(gate.kind, gate.point)
                if judged is not None and judged.source is not None:
                    self._sources[judged.source] += 1
                if self._report(node_id, gate, verdict):
                    self._verdicts.append(verdict)
                    bench.keep(verdict)
                    counting |= {verdict.id} if gate.kind == REGRESSION else set()  # a budget's may be the same
                self.left -= 1
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)

    @pytest.hookimpl(trylast=True)  # after the tables that they are about
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for command in workflow_commands(self._verdicts, self._config.rootpath, os.environ):
            terminalreporter.write_line(command)
        for study, comparison, counting in self._comparisons:
            terminalreporter.write_sep("=", f"llem: {study} against {comparison.record.reference}")
            for line in comparison_lines(comparison, shutil.get_terminal_size().columns, counting):
                terminalreporter.write_line(line)
        settings = Settings.from_config(self._config)
        reference = settings.baseline or settings.against
        if reference and not any(
            node.function == REGRESSION for nodes in self._gates.values() for node in nodes.values()
        ):
            terminalreporter.write_line(
                f"llem: nothing was compared with {reference}: no gate of the comparison is selected", yellow=True
            )
        for source, number in self._sources.items():
            shown = os.path.relpath(source, self._config.invocation_params.dir)
            terminalreporter.write_line(
                f"llem: {counted(number, 'gate')} judged by what was measured before: {shown}"
            )
        if self.left:
            gates = counted(self.left, "gate")
            terminalreporter.write_line(f"llem: {gates} not judged: the run was stopped before", yellow=True)

    def _report(self, node_id: str, gate: Gate, verdict: GateVerdict) -> bool:
        """Report a gate, and return whether what it says counts."""
        hook, location = self._config.hook, (verdict.file or "", gate.line - 1, f"{gate.kind}[{gate.id}]")
        marks = Marks.of(gate, self._config.stash[SHARED_STATE].read(node_id, MARKED) or {}, self._config)
        hook.pytest_runtest_logstart(nodeid=node_id, location=location)
        for report in gate_reports(node_id, location, verdict, marks, self._config.rootpath):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=node_id, location=location)
        return marks.skip is None and marks.xfail is None


class StudyGates:
    """One study's gates, and what they judge."""

    def __init__(self, config: pytest.Config, file: str, recorder: Recorder | None, inputs: InputsOf) -> None:
        self._config = config
        self._inputs = inputs
        self._file = file
        self._settings = Settings.from_config(config)
        runs = {} if recorder is None else recorder.runs
        self._run = runs.get(file)
        self.study: StudyConfig = study_of(config, file)
        self._sides = GateInputs(self.study, self._run, runs.get(run_key(file, REFERENCE)), self._earlier)
        self.comparison: Comparison | None = None

    @cached_property
    def gates(self) -> Mapping[tuple[str, str], Gate]:
        """Every gate of the study, by its function and the name in its brackets."""
        gates = budget_gates(self.study)
        if self._settings.baseline or self._settings.against:
            gates += regression_gates(self.study, self._baseline)
        return {(gate.kind, gate.id): gate for gate in gates}

    def gate(self, node_id: str, node: Node) -> Gate:
        """Return the gate that an item is of.

        Raises:
            pytest.UsageError: There is none: it must not pass for one that was judged.
        """
        name = match_id(node.name, {name for kind, name in self.gates if kind == node.function})
        if name is None:
            raise pytest.UsageError(f"{node_id}: the study, or what it is compared with, has no such gate")
        return self.gates[node.function, name]

    def judged(self, gate: str, point: str) -> JudgedPoint | None:
        """Return what a gate of that kind judges of a point; None for a point that the study does not have."""
        return (self._compared if gate == REGRESSION else self._sides.points).get(point)

    def verdicts(self, wanted: set[str]) -> dict[str, GateVerdict]:
        """Return those of the comparison by their ids, if any of them is *wanted*.

        Those of all points measured in this session are judged together, whichever were selected: Holm's procedure
        is over the family.
        """
        if not wanted:
            return {}
        candidate, reference = self._sides.own or self._earlier.result(), self._reference
        if reference is None or candidate is None:
            why = "the reference has no results" if candidate else "it has no results"
            return {one: self._unjudged(self.gates[REGRESSION, one], why) for one in wanted}
        measured = self._sides.measured or {name for name, one in self._compared.items() if one.point.cycles}
        self.comparison = compare(
            candidate.model_copy(update={"points": [one.point for one in self._compared.values()]}),
            reference,
            self.study.gates,
            name=self._name,
            paired=self._settings.against is not None,
            anyway=self._settings.compare_mismatch,
            points=measured | {self.gates[REGRESSION, one].point for one in wanted},
            unfit=self._sides.in_part,
            fail_on=self._settings.fail_on,
            file=self._file,
            line=self.study.gates_line,
        )
        if (result := self._sides.own) is not None:
            result.comparison = self.comparison.record
        return {verdict.id: self._placed(verdict) for verdict in self.comparison.verdicts}

    def budget(self, name: str) -> GateVerdict:
        """Return that of a budget."""
        budget = next(one for one in self.study.budgets if one.id == name)
        point, unfit = self._sides.points[budget.point].point, self._sides.in_part.get(budget.point)
        return self._placed(judge_budget(budget, point, unfit=unfit, file=self._file))

    def _placed(self, verdict: GateVerdict) -> GateVerdict:
        """Return a verdict that says when it is of an earlier session, or of a part of the cycles."""
        told = "; ".join(filter(None, (verdict.reason, self._note(verdict))))
        return verdict.model_copy(update={"reason": told or None})

    def _note(self, verdict: GateVerdict) -> str | None:
        judged = self.judged(verdict.gate, verdict.point)
        if judged is None:
            return None
        if verdict.point in self._sides.measured:
            if verdict.gate == REGRESSION and self._settings.against and verdict.point in self._sides.alone:
                return "its reference was not selected, and is measured in turns with it"
            measured, wanted = len(judged.point.cycles), self.study.n_cycles
            is_short = 0 < measured < wanted and verdict.point not in self._sides.in_part
            return f"{measured} of {wanted} cycles" if is_short else None
        if judged.source is None:
            return "nothing of it was selected, or measured before"
        return f"measured before, in {judged.source.name}"

    def keep(self, verdict: GateVerdict) -> None:
        """Put a verdict on the result of this session, where it is of that."""
        if self._sides.own is not None and verdict.point in self._sides.measured:
            next(one for one in self._sides.own.points if one.id == verdict.point).verdicts.append(verdict)

    def _unjudged(self, gate: Gate, reason: str) -> GateVerdict:
        return GateVerdict(
            gate="regression",
            id=gate.id,
            metric="",
            point=gate.point,
            verdict="NOT JUDGED",
            outcome="failed",
            reason=reason,
            unit="",
            file=self._file,
            line=gate.line,
        )

    @cached_property
    def _earlier(self) -> PreviousResults:
        results_dir = self._settings.results_dir_of(self.study, self._config.rootpath)
        run, digest = self._run, self.study.design_hash
        return PreviousResults(
            [
                directory
                for directory, manifest in runs_of(results_dir, self.study.name, digest)
                if manifest.study_design_hash == digest and (run is None or directory != run.directory)
            ],
            self._inputs(self.study, reference=False),
            self._inputs(study_of(self._config, run_key(self._file, REFERENCE)), reference=True)
            if self._settings.against
            else None,
        )

    @cached_property
    def _baseline(self) -> StudyResult | None:
        given = self._settings.baseline
        try:
            return load(given, self._config.rootpath, self.study.name) if given else None
        except BaselineError as error:  # it was there when the items were collected
            raise pytest.UsageError(f"--llem-baseline: {error}") from error

    @property
    def _name(self) -> str:
        """What is compared with."""
        return str(self._settings.against or self._settings.baseline)

    @cached_property
    def _turns(self) -> Mapping[str, InterleavedRuns]:
        return self._sides.in_turns(self._name)

    @cached_property
    def _compared(self) -> Mapping[str, JudgedPoint]:
        """Each point as it is held against the reference."""
        if self._settings.against is None:
            return self._sides.points
        return {name: turns.here for name, turns in self._turns.items()}

    @property
    def _reference(self) -> StudyResult | None:
        """What is compared with: a baseline, or of each point what was measured in turns with it."""
        if self._settings.against is None:
            return self._baseline
        own = self._sides.own_reference if self._sides.measured else None
        found = own or self._earlier.reference(self._name)
        points = [turns.there for turns in self._turns.values()]
        return found.model_copy(update={"points": points}) if found else None
