"""The reporter hook: writes down every step of every study, in the controller alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.options import STUDIES, Settings
from pytest_llem.reporting.study_run import StudyRun
from pytest_llem.reporting.terminal import summary_lines
from pytest_llem.results.models import ErrorRecord, ExperimentResult, StudyStatus
from pytest_llem.study.loading import Experiment, StudyConfig, load_study

#: Attribute of a call report that carries an experiment's outcome.
PAYLOAD_ATTRIBUTE = "llem"


class Recorder:
    """A pytest plugin, registered once the experiments that are to run are known.

    Under xdist the controller collects nothing: it knows node ids, and reads the studies again itself.
    """

    def __init__(self, config: pytest.Config, runs: Sequence[StudyRun]) -> None:
        self._config = config
        self.runs = runs
        self._by_node: dict[str, tuple[StudyRun, Experiment]] = {
            node_id: (run, experiment) for run in runs for node_id, experiment in run.selected.items()
        }
        self._interrupted = False
        self._lost: list[str] = []

    @classmethod
    def start(cls, config: pytest.Config, node_ids: Iterable[str]) -> Recorder | None:
        """Open a results directory for each study that has experiments among *node_ids*.

        Raises:
            pytest.UsageError: A results directory cannot be made.
        """
        by_file: dict[str, list[str]] = {}
        for node_id in node_ids:
            file, _, name = node_id.partition("::")
            if name.startswith("experiment["):
                by_file.setdefault(file, []).append(node_id)
        settings = Settings.from_config(config)
        stamp = settings.run_id or datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        collected = config.stash.get(STUDIES, {})
        runs = []
        for file, ids in by_file.items():
            if file not in collected and not (config.rootpath / file).is_file():
                # pytest gives such a file's items ids without a path: nobody could tell what they are.
                raise pytest.UsageError(
                    "under xdist a study has to be below rootdir "
                    f"({config.rootpath}): use --rootdir, or run without -n"
                )
            study = collected.get(file) or load_study(config.rootpath / file)
            try:
                runs.append(StudyRun.open(study, file, ids, settings.results_dir, stamp))
            except OSError as error:
                raise pytest.UsageError(f"{settings.results_dir}: no results can be written: {error}") from error
        return cls(config, runs) if runs else None

    @property
    def studies(self) -> list[StudyConfig]:
        """The studies that are recorded."""
        return [run.study for run in self.runs]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self._by_node:
            run, experiment = self._by_node[nodeid]
            with suppress(OSError):  # what cannot be written now fails the experiment when its result comes
                run.started(experiment)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._by_node:
            return
        run, experiment = self._by_node[report.nodeid]
        payload: dict[str, Any] | None = vars(report).pop(PAYLOAD_ATTRIBUTE, None)
        try:
            if payload and payload["result"]:
                result = run.completed(experiment, payload)
                self._tell_finished(result, report)
            elif payload:
                run.failed(experiment, ErrorRecord.model_validate(payload["error"]), payload["worker"])
            elif report.skipped:
                run.skipped(experiment)
            elif report.failed:  # in set-up or tear-down, or its xdist worker died
                run.failed(experiment, _outside(report))
        except OSError as error:
            # A measurement that could not be saved is no success, whatever the item came to.
            report.outcome = "failed"
            report.longrepr = f"the result could not be saved: {error}"
            run.unsaved(experiment, str(error))

    def _tell_finished(self, result: ExperimentResult, report: pytest.TestReport) -> None:
        """Call the hook. What it raises fails the item, and neither the session nor the experiment."""
        try:
            self._config.hook.pytest_llem_experiment_finished(result=result)
        except (Exception, pytest.fail.Exception) as error:
            report.outcome = "failed"
            report.longrepr = f"pytest_llem_experiment_finished: {_said(error)}"

    def pytest_keyboard_interrupt(self) -> None:
        self._interrupted = True

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        interrupted = self._interrupted or exitstatus == pytest.ExitCode.INTERRUPTED
        ending: StudyStatus = "interrupted" if interrupted else "aborted"
        for run in self.runs:
            try:
                result = run.finish("completed" if run.is_done() else ending)
            except OSError as error:
                self._lost.append(f"{run.study.name}: the study's result could not be saved: {error}")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
                continue
            try:
                self._config.hook.pytest_llem_study_finished(study_result=result, directory=run.directory)
            except (Exception, pytest.fail.Exception) as error:
                self._lost.append(f"{run.study.name}: pytest_llem_study_finished: {_said(error)}")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for message in self._lost:
            terminalreporter.write_line(message, red=True)
        for run in self.runs:
            terminalreporter.write_sep("=", f"llem: {run.study.name}")
            for line in summary_lines(run, Path.cwd(), shutil.get_terminal_size().columns):
                terminalreporter.write_line(line)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, pytest.fail.Exception) else f"{type(error).__name__}: {error}"


def _outside(report: pytest.TestReport) -> ErrorRecord:
    when: str = report.when  # xdist says "???" for the item that a dead worker was running
    last = report.longreprtext.strip().splitlines()[-1:] or ["no reason was given"]
    if when == "???":
        return ErrorRecord(kind="crash", type="WorkerCrash", message=last[0])
    return ErrorRecord(kind="exception", type="Error", message=last[0], phase=when)
