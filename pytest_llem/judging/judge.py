"""Judgement of the selected gates in pytest's controller, once all experiments have run."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import pytest

from pytest_llem._plugin.baseline import baseline_of
from pytest_llem._plugin.node_ids import REFERENCE, REGRESSION, Node, match_id, run_key
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import MARKED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem._plugin.terminal_width import fitted
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.execution.replay import current_inputs
from pytest_llem.gates.baselines import BaselineError
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.gate import Gate, budget_gates, regression_gates
from pytest_llem.gates.regression import Comparison, compare
from pytest_llem.judging.gate_inputs import GateInputs, InterleavedRuns, JudgedPoint, PreviousResults
from pytest_llem.judging.gate_reports import Marks, gate_reports
from pytest_llem.recording.pytest_items import gates_by_file, study_of
from pytest_llem.recording.recorder import Recorder
from pytest_llem.reporting.github import workflow_commands
from pytest_llem.reporting.terminal.comparison import lines as comparison_lines
from pytest_llem.reporting.text import counted
from pytest_llem.results.manifest import runs_of
from pytest_llem.results.points import testbed_of
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.verdicts import GateVerdict, Outcome
from pytest_llem.study.design import StudyConfig


class Judge:
    """Judges the selected gates of a session.

    A gate judges this session's result of its point; if no experiment of the point was selected, the newest result
    of the study's design.

    Args:
        config: The controller's configuration.
        node_ids: Node ids of all selected items.
        recorder: Recorder of the selected experiments; None if there are none.
    """

    def __init__(self, config: pytest.Config, node_ids: Iterable[str], recorder: Recorder | None) -> None:
        self._config = config
        self._gates = gates_by_file(config, node_ids)
        self._recorder = recorder
        #: Name of the study, its comparison, and the ids of its gates that count: those that are neither skipped
        #: nor expected to fail.
        self._comparisons: list[tuple[str, Comparison, set[str]]] = []
        #: Verdicts of the gates that count.
        self._verdicts: list[GateVerdict] = []
        #: Number of gates that count and judged a result of an earlier session, by its directory.
        self._sources: Counter[Path] = Counter()
        #: Number of gates that have not been judged yet.
        self.left = sum(map(len, self._gates.values()))

    def judge(self, session: pytest.Session) -> None:
        """Judge and report the gates; stop at ``-x`` or ``--maxfail`` as pytest does.

        Raises:
            pytest.Session.Failed: As many items have failed as ``--maxfail`` allows.
            pytest.UsageError: An item's gate or baseline no longer exists.
        """
        for file, nodes in self._gates.items():
            study_gates = StudyGates(self._config, file, self._recorder)
            gates = {node_id: study_gates.gate(node_id, node) for node_id, node in nodes.items()}
            found = study_gates.verdicts({gate.id for gate in gates.values() if gate.kind == REGRESSION})
            counting: set[str] = set()
            if study_gates.comparison is not None:
                self._comparisons.append((study_gates.study.name, study_gates.comparison, counting))
            for node_id, gate in gates.items():
                verdict = found[gate.id] if gate.kind == REGRESSION else study_gates.budget(gate.id)
                if self._report(node_id, gate, verdict):
                    judged = study_gates.judged(gate.kind, gate.point)
                    if judged is not None and judged.source is not None:
                        self._sources[judged.source] += 1
                    self._verdicts.append(verdict)
                    study_gates.add_to_result(verdict)
                    counting |= {verdict.id} if gate.kind == REGRESSION else set()  # a budget may have the same id
                self.left -= 1
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)

    @pytest.hookimpl(trylast=True)  # after the studies' tables
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for command in workflow_commands(self._verdicts, self._config.rootpath, os.environ):
            terminalreporter.write_line(command)
        for study, comparison, counting in self._comparisons:
            terminalreporter.write_sep("=", f"llem: {study} against {comparison.record.reference}")
            for line in fitted(comparison_lines(comparison, shutil.get_terminal_size().columns, counting)):
                terminalreporter.write_line(line)
        settings = Settings.from_config(self._config)
        reference = settings.baseline or settings.against_name
        if reference and not any(
            node.function == REGRESSION for nodes in self._gates.values() for node in nodes.values()
        ):
            terminalreporter.write_line(
                f"llem: nothing was compared with {reference}: no gate of the comparison is selected", yellow=True
            )
        for source, number in self._sources.items():
            shown = os.path.relpath(source, self._config.invocation_params.dir)
            terminalreporter.write_line(
                f"llem: {counted(number, 'gate')} judged results of an earlier run: {shown}"
            )
        if self.left:
            gates = counted(self.left, "gate")
            terminalreporter.write_line(f"llem: {gates} not judged: the run was stopped first", yellow=True)

    def _report(self, node_id: str, gate: Gate, verdict: GateVerdict) -> bool:
        """Report a gate, and return whether its verdict counts."""
        hook, location = self._config.hook, (verdict.file or "", gate.line - 1, f"{gate.kind}[{gate.id}]")
        marks = Marks.of(gate, self._config.stash[SHARED_STATE].read(node_id, MARKED) or {}, self._config)
        hook.pytest_runtest_logstart(nodeid=node_id, location=location)
        for report in gate_reports(node_id, location, verdict, marks, self._config.rootpath):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=node_id, location=location)
        return marks.skip is None and marks.xfail is None


class StudyGates:
    """The gates of one study, and the results that they judge."""

    def __init__(self, config: pytest.Config, file: str, recorder: Recorder | None) -> None:
        self._config = config
        self._file = file
        self._settings = Settings.from_config(config)
        runs = {} if recorder is None else recorder.runs
        self._run = runs.get(file)
        self.study: StudyConfig = study_of(config, file)
        self._results = GateInputs(
            self.study,
            self._run,
            runs.get(run_key(file, REFERENCE)),
            self._previous,
            is_interleaved=self._settings.against is not None,
        )
        self.comparison: Comparison | None = None

    @cached_property
    def gates(self) -> Mapping[tuple[str, str], Gate]:
        """All gates of the study, by test function and id."""
        gates = budget_gates(self.study)
        if self._settings.baseline or self._settings.against:
            gates += regression_gates(self.study, self._baseline)
            gates += regression_gates(self.study, self._collected_baseline)
        return {(gate.kind, gate.id): gate for gate in gates}

    def gate(self, node_id: str, node: Node) -> Gate:
        """Return the gate of an item.

        Raises:
            pytest.UsageError: The study has no such gate; without the error the item would seem to be judged.
        """
        name = match_id(node.name, {name for kind, name in self.gates if kind == node.function})
        if name is None:
            raise pytest.UsageError(f"{node_id}: neither the study nor its reference has such a gate")
        return self.gates[node.function, name]

    def judged(self, gate: str, point: str) -> JudgedPoint | None:
        """Return the result of a point that a gate of that kind judges; None if the study has no such point."""
        return (self._compared if gate == REGRESSION else self._results.points).get(point)

    def verdicts(self, wanted: set[str]) -> dict[str, GateVerdict]:
        """Return the verdicts of the comparison by the ids of their gates; empty if no gate is *wanted*.

        All points of this session are judged together, whichever gates were selected, since Holm's procedure needs
        the whole family.
        """
        if not wanted:
            return {}
        candidate, reference = self._results.own or self._previous.result(), self._reference
        if reference is None or candidate is None:
            why = f"the {'reference' if candidate else 'candidate'} has no results"
            return {one: self._unjudged(self.gates[REGRESSION, one], why) for one in wanted}
        measured = self._results.measured or {name for name, one in self._compared.items() if one.point.cycles}
        self.comparison = compare(
            candidate.model_copy(update={"points": [one.point for one in self._compared.values()]}),
            reference,
            self.study.gates,
            name=self._name,
            paired=self._settings.against is not None,
            allow_mismatch=self._settings.compare_mismatch,
            points=measured | {self.gates[REGRESSION, one].point for one in wanted},
            not_judged=self._results.partly_selected,
            fail_on=self._settings.fail_on,
        )
        if (result := self._results.own) is not None:
            result.comparison = self.comparison.record
        place = {"file": self._file, "line": self.study.gates_line}
        found = {one.id: self._with_note(one.model_copy(update=place)) for one in self.comparison.verdicts}
        for one in wanted - found.keys():
            why = "only the baseline of other devices has this point"
            found[one] = self._unjudged(self.gates[REGRESSION, one], why, outcome="skipped")
        return found

    def budget(self, name: str) -> GateVerdict:
        """Return the verdict of a budget, given its id."""
        budget = next(one for one in self.study.budgets if one.id == name)
        point = self._results.points[budget.point].point
        not_judged = self._results.partly_selected.get(budget.point)
        return self._with_note(judge_budget(budget, point, not_judged=not_judged, file=self._file))

    def _with_note(self, verdict: GateVerdict) -> GateVerdict:
        """Return a verdict whose reason mentions an earlier session, or missing cycles."""
        reason = "; ".join(filter(None, (verdict.reason, self._note(verdict))))
        return verdict.model_copy(update={"reason": reason or None})

    def _note(self, verdict: GateVerdict) -> str | None:
        judged = self.judged(verdict.gate, verdict.point)
        if judged is None:
            return None
        if verdict.point in self._results.measured:
            if (
                verdict.gate == REGRESSION
                and self._settings.against
                and verdict.point in self._results.without_reference
            ):
                return "its reference was not selected, but both have to be interleaved"
            measured, wanted = len(judged.point.cycles), self.study.min_cycles
            if not measured:
                return self._results.skip_reason(verdict.point)
            is_short = measured < wanted and verdict.point not in self._results.partly_selected
            return f"{measured} of {wanted} cycles" if is_short else None
        if judged.source is None:
            return "no experiment of the point was selected, nor measured in an earlier run"
        return f"measured in an earlier run, {judged.source.name}"

    def add_to_result(self, verdict: GateVerdict) -> None:
        """Add a verdict to this session's result, if this session measured the point."""
        if self._results.own is not None and verdict.point in self._results.measured:
            next(one for one in self._results.own.points if one.id == verdict.point).verdicts.append(verdict)

    def _unjudged(self, gate: Gate, reason: str, outcome: Outcome = "failed") -> GateVerdict:
        return GateVerdict(
            gate="regression",
            id=gate.id,
            metric=gate.metric,
            point=gate.point,
            verdict="NOT JUDGED",
            outcome=outcome,
            reason=reason,
            unit=CATALOGUE[gate.metric].unit if gate.metric else "",
            file=self._file,
            line=gate.line,
        )

    @cached_property
    def _previous(self) -> PreviousResults:
        results_dir = self._settings.results_dir_of(self.study, self._config.rootpath)
        run, digest = self._run, self.study.design_hash
        return PreviousResults(
            [
                directory
                for directory, manifest in runs_of(results_dir, self.study.name, digest)
                if manifest.study_design_hash == digest and (run is None or directory != run.directory)
            ],
            current_inputs(self._config, self.study),
            current_inputs(self._config, study_of(self._config, run_key(self._file, REFERENCE)), reference=True)
            if self._settings.against
            else None,
        )

    @cached_property
    def _baseline(self) -> StudyResult | None:
        try:
            return baseline_of(self._config, self.study, self._testbeds())
        except BaselineError as error:  # it existed when the items were collected
            raise pytest.UsageError(f"--llem-baseline: {error}") from error

    @cached_property
    def _collected_baseline(self) -> StudyResult | None:
        """The baseline by which items were collected, when it was not known which devices the engine would use."""
        try:
            return baseline_of(self._config, self.study)
        except BaselineError:  # workers on other hosts found theirs
            return self._baseline

    def _testbeds(self) -> list[str]:
        """Return the keys of the results' testbeds: that of all points together, then those of most points."""
        points = [judged.point for judged in self._results.points.values()]
        found = Counter(one.key for point in points if (one := testbed_of([point])) is not None)
        whole = testbed_of(points)
        return [*([] if whole is None else [whole.key]), *(key for key, _ in found.most_common())]

    @property
    def _name(self) -> str:
        """Name of the reference."""
        return str(self._settings.against_name or self._settings.baseline)

    @cached_property
    def _interleaved(self) -> Mapping[str, InterleavedRuns]:
        return self._results.interleaved(self._name)

    @cached_property
    def _compared(self) -> Mapping[str, JudgedPoint]:
        """The result of each point that is compared with the reference."""
        if self._settings.against is None:
            return self._results.points
        return {name: runs.candidate for name, runs in self._interleaved.items()}

    @property
    def _reference(self) -> StudyResult | None:
        """The reference: a baseline, or the results that were interleaved with the candidate's."""
        if self._settings.against is None:
            return self._baseline
        own = self._results.own_reference if self._results.measured else None
        found = own or self._previous.reference(self._name)
        points = [runs.reference for runs in self._interleaved.values()]
        return found.model_copy(update={"points": points}) if found else None
