"""The reporter hook: writes down every step of every study, in the controller alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_llem._plugin.node_ids import PAYLOAD_ATTRIBUTE, REFERENCE, file_of, is_reference
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import STOPPED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.gates.saved import BaselineError, missing_results, save, unfit_results
from pytest_llem.recording.pages import page_files, write_page
from pytest_llem.recording.studies import experiments_by_run, selected_experiments, study_of
from pytest_llem.reporting.github import write_summary
from pytest_llem.reporting.terminal.summary import WARNING, summary_lines
from pytest_llem.results.environment import host_environment
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.models import ErrorRecord, StudyResult, StudyStatus
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.problems import StudyError

#: What somebody's hook may raise. pytest.fail and pytest.skip are no Exceptions; pytest.exit is one.
RAISED = (Exception, SystemExit, pytest.fail.Exception, pytest.skip.Exception)


class Recorder:
    """A pytest plugin, registered once the experiments that are to run are known.

    Under xdist the controller collects nothing: it knows node ids, and reads the studies again itself.
    """

    def __init__(self, config: pytest.Config, runs: Mapping[str, StudyRun]) -> None:
        self._config = config
        self._runs = runs
        self._by_node: dict[str, tuple[str, StudyRun, Experiment]] = {
            node_id: (key, run, experiment)
            for key, run in runs.items()
            for node_id, experiment in run.selected.items()
        }
        self._by_identity = {
            (key, experiment.id): (key, run, experiment)
            for key, run in runs.items()
            for experiment in run.study.experiments
        }
        self._interrupted = False
        #: Failures, by study.
        self._in_a_row: Counter[str] = Counter()
        self._lost: list[str] = []
        self._saved: list[str] = []

    @classmethod
    def start(
        cls,
        config: pytest.Config,
        node_ids: Iterable[str],
        ready: Callable[[Mapping[str, StudyConfig]], Mapping[str, Iterable[str]]],
    ) -> Recorder | None:
        """Open a results directory for each study that has experiments among *node_ids*.

        Args:
            config: The controller's.
            node_ids: Of all that is to run.
            ready: Called with the studies, by the key of their run, before anything is written. It returns the
                names of the results directories from which each is resumed.

        Raises:
            pytest.UsageError: A results directory cannot be made, a hook fails, or there will be nothing to save.
        """
        settings = Settings.from_config(config)
        selected = experiments_by_run(config, node_ids)
        if settings.save is not None and not selected:
            raise pytest.UsageError("--llem-save: no experiment is selected, so there is nothing to save")
        try:
            studies = {key: study_of(config, key) for key in selected}
        except StudyError as error:
            raise pytest.UsageError(str(error)) from error
        resumed = ready(studies) if studies else {}
        stamp = settings.run_id or datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        known = host_environment(config.rootpath) if studies else {}
        environments = {key: _environment(config, known) for key in studies if not is_reference(key)}
        runs: dict[str, StudyRun] = {}
        for key, study in studies.items():
            results_dir, name = settings.results_dir_of(study, config.rootpath), f"{study.name}_{stamp}"
            if is_reference(key):
                results_dir, name = runs[file_of(key)].directory, REFERENCE
            try:
                chosen = selected_experiments(study, selected[key])
                runs[key] = StudyRun.open(
                    study, chosen, results_dir, name, environments[file_of(key)], resumed.get(key, ())
                )
            except (OSError, UnicodeError) as error:  # UnicodeError: a name that the locale cannot spell
                for run in runs.values():
                    run.finish("aborted")
                raise pytest.UsageError(f"{results_dir}: no results can be written: {error}") from error
        return cls(config, runs) if runs else None

    @property
    def runs(self) -> Mapping[str, StudyRun]:
        """The runs, by their keys: of each study, and of its reference after it."""
        return self._runs

    @property
    def studies(self) -> dict[str, StudyConfig]:
        """The studies, by the key of their run."""
        return {key: run.study for key, run in self._runs.items()}

    @property
    def selected(self) -> dict[str, list[Experiment]]:
        """The experiments that are to run, by the key of their run."""
        return {key: list(run.selected.values()) for key, run in self._runs.items()}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self._by_node:
            _, run, experiment = self._by_node[nodeid]
            with suppress(OSError):  # what cannot be written now fails the experiment when its result comes
                run.started(experiment)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        payload: dict[str, Any] | None = vars(report).pop(PAYLOAD_ATTRIBUTE, None)
        found = self._by_node.get(report.nodeid) if payload is None else self._place(payload)
        if found is None:
            if payload is not None:
                _fail(report, "the recorder knows of no such experiment, so its result is not saved")
            return
        key, run, experiment = found
        if report.when == "teardown" and run.has_result(experiment):  # it was measured, whatever came after
            return
        try:
            if payload and payload["result"]:
                result = run.completed(experiment, payload)
                if payload["replayed_from"] is None:
                    self._in_a_row[key] = 0
                if not is_reference(key):
                    self._tell_finished(result, report)
            elif payload:
                error = ErrorRecord.model_validate(payload["error"])
                if report.skipped:  # as xfail has it
                    run.skipped(experiment, _skip_reason(report), error)
                else:
                    run.failed(experiment, error, payload["worker"])
                    self._count_failure(key, error, report)
            elif report.skipped:
                run.skipped(experiment, _skip_reason(report))
            elif report.failed:  # in set-up or tear-down, or its xdist worker died
                error = _outside(report)
                run.failed(experiment, error)
                self._count_failure(key, error, report)
        except (OSError, ValueError) as error:  # ValueError: no ExperimentResult, says pydantic
            # A measurement that could not be saved is no success, whatever the item came to.
            _fail(report, f"the result could not be saved: {error}")
            run.unsaved(experiment, str(error))

    def _count_failure(self, key: str, error: ErrorRecord, report: pytest.TestReport) -> None:
        """Stop the study where too many of its experiments failed in a row."""
        run = self._runs[key]
        limit = run.study.execution.max_consecutive_failures
        # One that will be run again has not failed yet, and what preflight knew says nothing of the others.
        if limit is None or report.outcome != "failed" or error.kind in ("preflight", "interrupted"):
            return
        self._in_a_row[key] += 1
        if self._in_a_row[key] == limit:
            run.stopped = f"{limit} experiments in a row failed (execution.max_consecutive_failures)"
            with suppress(OSError):  # then only this process knows
                self._config.stash[SHARED_STATE].put(key, STOPPED, run.stopped)

    def _place(self, payload: dict[str, Any]) -> tuple[str, StudyRun, Experiment] | None:
        """Return the experiment that a payload says it is from, whatever its item is called."""
        return self._by_identity.get((payload["run"], payload["experiment_id"]))

    def _tell_finished(self, result: ExperimentResult, report: pytest.TestReport) -> None:
        """Call the hook. What it raises fails the item, and neither the session nor the experiment."""
        try:
            self._config.hook.pytest_llem_experiment_finished(result=result)
        except pytest.exit.Exception:
            raise
        except RAISED as error:
            _fail(report, f"pytest_llem_experiment_finished: {_said(error)}")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # Under xdist, -x and --maxfail end here too, with an exception derived from this one.
        self._interrupted = excinfo.type is KeyboardInterrupt or excinfo.errisinstance(pytest.exit.Exception)
        for worker in self._config.stash[SHARED_STATE].worker_pids():  # xdist would give them ten seconds
            with suppress(OSError):
                os.kill(worker, signal.SIGINT)

    @pytest.hookimpl(tryfirst=True)  # not after what may take long, or has no terminal any more to write to
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        ending: StudyStatus = "interrupted" if self._interrupted else "aborted"
        pages = self._pages()
        for key, run in self._runs.items():
            whole = run.is_done() and run.stopped is None
            try:
                result = run.finish("completed" if whole else ending)
            except OSError as error:
                self._lost.append(f"{run.study.name}: the study's result could not be saved: {error}")
                _fail_session(session)
                continue
            if run.lost:
                self._lost += [f"{run.study.name}: {message}" for message in run.lost]
                _fail_session(session)
            if is_reference(key):
                continue
            self._save(result, session)
            if key in pages:
                self._write_page(run, result, pages[key], session)
            try:
                self._config.hook.pytest_llem_study_finished(study_result=result, directory=run.directory)
            except RAISED as error:
                self._lost.append(f"{run.study.name}: pytest_llem_study_finished: {_said(error)}")
                _fail_session(session)

        results = [run.result for key, run in self._runs.items() if run.result and not is_reference(key)]
        if (unwritten := write_summary(results, os.environ)) is not None:
            self._lost.append(unwritten)

    def _save(self, result: StudyResult, session: pytest.Session) -> None:
        """Keep *result* as a baseline, where that was asked for."""
        settings = Settings.from_config(self._config)
        if settings.save is None:
            return
        twins = sum(run.study.name == result.name for key, run in self._runs.items() if not is_reference(key))
        try:
            if twins > 1:
                raise BaselineError(f"{twins} studies of this run have that name, and a baseline holds one")
            path = save(
                result,
                settings.save,
                self._config.rootpath,
                partial=settings.save_partial,
                anyway=settings.save_force,
            )
        except (BaselineError, OSError) as error:
            options = [] if settings.save_partial or not missing_results(result) else ["--llem-save-partial"]
            unfit = unfit_results(result, settings.save, self._config.rootpath)
            options += [] if settings.save_force or not unfit else ["--llem-save-force"]
            instead = f" ({' '.join(options)} saves it all the same)" if options and twins == 1 else ""
            self._lost.append(f"{result.name}: --llem-save: {error}{instead}")
            _fail_session(session)
        else:
            self._saved.append(f"baseline: {os.path.relpath(path, self._config.invocation_params.dir)}")

    def _pages(self) -> dict[str, Path]:
        """Return where the page of each study goes, by the key of its run; nothing where none is wanted."""
        file, keys = Settings.from_config(self._config).html, [key for key in self._runs if not is_reference(key)]
        names = [self._runs[key].study.name for key in keys]
        return {} if file is None else dict(zip(keys, page_files(file, names), strict=True))

    def _write_page(self, run: StudyRun, result: StudyResult, file: Path, session: pytest.Session) -> None:
        problem = write_page(run.directory, file, result)
        if problem is None:
            run.page = file
            return
        self._lost.append(f"{run.study.name}: {problem}")
        _fail_session(session)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._tell_lost(terminalreporter)
        for key, run in self._runs.items():
            if is_reference(key):
                continue
            terminalreporter.write_sep("=", f"llem: {run.study.name}")
            where, width = self._config.invocation_params.dir, shutil.get_terminal_size().columns
            for line in summary_lines(run, where, width, ids=self._config.get_verbosity() > 0):
                terminalreporter.write_line(line, yellow=line.startswith(WARNING))
        for line in self._saved:
            terminalreporter.write_line(line)

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        # pytest has no summary where pytest.exit has named an exit status.
        if (reporter := config.pluginmanager.get_plugin("terminalreporter")) is not None:
            self._tell_lost(reporter)

    def _tell_lost(self, reporter: pytest.TerminalReporter) -> None:
        while self._lost:
            reporter.write_line(self._lost.pop(0), red=True)


def _fail(report: pytest.TestReport, why: str) -> None:
    report.outcome = "failed"
    report.longrepr = why
    vars(report).pop("wasxfail", None)  # pytest counts no failure of what is expected to fail


def _fail_session(session: pytest.Session) -> None:
    """Have pytest exit with 1, unless it exits with another status already, such as 2 after Ctrl-C."""
    if session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _environment(config: pytest.Config, known: dict[str, Any]) -> dict[str, Any]:
    """Return what is *known* of this machine and what hooks add to it.

    Raises:
        pytest.UsageError: A hook raises, or adds what is no JSON.
    """
    environment = copy.deepcopy(known)
    try:
        config.hook.pytest_llem_environment(environment=environment)
        added: dict[str, Any] = json.loads(json.dumps(environment, allow_nan=False))
    except pytest.exit.Exception:
        raise
    except RAISED as error:
        raise pytest.UsageError(f"pytest_llem_environment: {_said(error)}") from error
    return added


def _said(error: BaseException) -> str:
    return (
        str(error)
        if isinstance(error, pytest.fail.Exception | pytest.exit.Exception)
        else f"{type(error).__name__}: {error}"
    )


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail.removeprefix('reason: ')}"
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


def _outside(report: pytest.TestReport) -> ErrorRecord:
    """Return what went wrong outside the experiment's own process."""
    when: str = report.when  # xdist says "???" for the item that a dead worker was running
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines() or ["no reason was given"]
    message = lines[0] if crash else lines[-1]
    if "from pytest-timeout" in message:
        return ErrorRecord(kind="timeout", type="Timeout", message=message.removeprefix("Failed: "), phase=when)
    if when == "???":
        return ErrorRecord(kind="crash", type="WorkerCrash", message=message)
    return ErrorRecord(kind="exception", type="Error", message=message, phase=when)
