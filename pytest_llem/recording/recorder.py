"""The plugin that records each step of the studies in their results directories, in pytest's controller only."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_llem._plugin.node_ids import PAYLOAD_ATTRIBUTE, REFERENCE, file_of, is_reference
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import STOPPED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem._plugin.terminal_width import fitted
from pytest_llem.execution.plans import check_both_sides
from pytest_llem.execution.replay import publish_replays, replays_of
from pytest_llem.gates.baselines import BaselineError
from pytest_llem.gates.saving import missing_results, save, unsuitable_reason
from pytest_llem.recording.pytest_items import (
    HOOK_ERRORS,
    experiments_by_run,
    fail_item,
    message_of,
    outside_error,
    selected_experiments,
    skip_reason,
    study_of,
)
from pytest_llem.reporting.github import write_summary
from pytest_llem.reporting.terminal.summary import WARNING, summary_lines
from pytest_llem.results.environment import host_environment
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord, StudyStatus
from pytest_llem.results.study_result import StudyResult
from pytest_llem.results.study_run import StudyRun
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.problems import StudyError


class Recorder:
    """A pytest plugin, registered once the selected experiments are known.

    Under xdist the controller collects nothing: it has the node ids, and reads the studies again.
    """

    def __init__(self, config: pytest.Config, runs: dict[str, StudyRun]) -> None:
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
        #: Number of consecutive failures, by the key of the run.
        self._consecutive_failures: Counter[str] = Counter()
        self._errors: list[str] = []
        self._saved: list[str] = []

    @classmethod
    def start(cls, config: pytest.Config, node_ids: Iterable[str]) -> Recorder | None:
        """Create a results directory for each study with experiments among *node_ids*, and return the recorder.

        Args:
            config: The controller's configuration.
            node_ids: Node ids of all selected items.

        Returns:
            The recorder; None if no experiment is selected.

        Raises:
            pytest.UsageError: A results directory cannot be created, a hook fails, an interpreter of a comparison
                cannot be used, an earlier run cannot be resumed, or ``--llem-save`` has nothing to save.
        """
        by_run = experiments_by_run(config, node_ids)
        if not by_run and Settings.from_config(config).save is not None:
            raise pytest.UsageError("--llem-save: no experiment is selected, so there is nothing to save")
        if not by_run:
            return None
        try:
            studies = {key: study_of(config, key) for key in by_run}
        except StudyError as error:
            raise pytest.UsageError(str(error)) from error
        selected = {key: selected_experiments(study, by_run[key]) for key, study in studies.items()}
        check_both_sides(config, studies, {key: found.values() for key, found in selected.items()})
        return cls(config, _open_runs(config, studies, selected))

    @property
    def runs(self) -> Mapping[str, StudyRun]:
        """The runs by their keys, those of references after those of all studies."""
        return self._runs

    @property
    def _study_runs(self) -> dict[str, StudyRun]:
        """The runs without those of references."""
        return {key: run for key, run in self._runs.items() if not is_reference(key)}

    @property
    def studies(self) -> dict[str, StudyConfig]:
        """The studies, by the key of their run."""
        return {key: run.study for key, run in self._runs.items()}

    @property
    def selected(self) -> dict[str, list[Experiment]]:
        """The selected experiments, by the key of their run."""
        return {key: list(run.selected.values()) for key, run in self._runs.items()}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self._by_node:
            _, run, experiment = self._by_node[nodeid]
            with suppress(OSError):  # if it still cannot be written, saving the result fails the experiment
                run.started(experiment)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        payload: dict[str, Any] | None = vars(report).pop(PAYLOAD_ATTRIBUTE, None)
        if payload is None:
            found = self._by_node.get(report.nodeid)
        else:  # the payload names the experiment, whatever the item's id
            found = self._by_identity.get((payload["run"], payload["experiment_id"]))
        if found is None:
            if payload is not None:
                fail_item(
                    report, "this experiment is not part of any study of the run, so its result is not saved"
                )
            return
        key, run, experiment = found
        if payload is None and run.has_ended(experiment):  # tear-down failed, or killed the xdist worker
            return
        try:
            self._record(key, experiment, payload, report)
        except (OSError, ValueError) as error:  # ValueError: not an ExperimentResult
            # A measurement that could not be saved fails, whatever the item's outcome.
            fail_item(report, f"the result could not be saved: {error}")
            run.unsaved(experiment, str(error))

    def _record(
        self, key: str, experiment: Experiment, payload: dict[str, Any] | None, report: pytest.TestReport
    ) -> None:
        """Record the result of an experiment, its error, or why it did not run."""
        run = self._runs[key]
        if payload and payload["result"]:
            result = run.completed(experiment, payload)
            if payload["replayed_from"] is None:
                self._consecutive_failures[key] = 0
            if not is_reference(key):
                self._call_finished_hook(result, report)
            return
        error = None
        if payload:
            error = ErrorRecord.model_validate(payload["error"])
        elif report.failed:  # in set-up or tear-down, or because its xdist worker died
            error = outside_error(report)
        if report.skipped:  # with an error, it failed as xfail expects
            run.skipped(experiment, skip_reason(report), error)
        elif error is not None:
            files, worker = (payload["files"], payload["worker"]) if payload else (None, None)
            run.failed(experiment, error, files, worker)
            self._count_failure(key, error, report)

    def _count_failure(self, key: str, error: ErrorRecord, report: pytest.TestReport) -> None:
        """Stop the study if too many consecutive experiments have failed."""
        run = self._runs[key]
        limit = run.study.execution.max_consecutive_failures
        # An interrupted experiment may run again, and a preflight failure says nothing about other experiments.
        if limit is None or report.outcome != "failed" or error.kind in ("preflight", "interrupted"):
            return
        self._consecutive_failures[key] += 1
        if self._consecutive_failures[key] == limit:
            run.stopped = f"{limit} experiments in a row failed (execution.max_consecutive_failures)"
            with suppress(OSError):  # if this fails, xdist workers go on
                self._config.stash[SHARED_STATE].put(key, STOPPED, run.stopped)

    def _call_finished_hook(self, result: ExperimentResult, report: pytest.TestReport) -> None:
        """Call ``pytest_llem_experiment_finished``.

        An exception fails the item, but neither the session nor the experiment.
        """
        try:
            self._config.hook.pytest_llem_experiment_finished(result=result)
        except pytest.exit.Exception:
            raise
        except HOOK_ERRORS as error:
            fail_item(report, f"pytest_llem_experiment_finished: {message_of(error)}")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # Under xdist, -x and --maxfail call this hook too, with an exception derived from KeyboardInterrupt.
        self._interrupted = excinfo.type is KeyboardInterrupt or excinfo.errisinstance(pytest.exit.Exception)
        for worker in self._config.stash[SHARED_STATE].worker_pids():  # xdist would kill them after ten seconds
            with suppress(OSError):
                os.kill(worker, signal.SIGINT)

    @pytest.hookimpl(tryfirst=True)  # before hooks that may take long, or fail because the terminal is gone
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        ending: StudyStatus = "interrupted" if self._interrupted else "aborted"
        if session.shouldfail or session.shouldstop:
            self._discard_untouched()
        pages = self._pages()
        for key, run in self._runs.items():
            complete = run.is_done() and run.stopped is None
            try:
                result = run.finish("completed" if complete else ending)
            except OSError as error:
                self._fail(session, run, f"the study's result could not be saved: {error}")
                continue
            for message in run.lost:
                self._fail(session, run, message)
            if is_reference(key):
                continue
            self._save(run, result, session)
            if key in pages:
                self._write_page(run, result, pages[key], session)
            try:
                self._config.hook.pytest_llem_study_finished(study_result=result, directory=run.directory)
            except HOOK_ERRORS as error:
                self._fail(session, run, f"pytest_llem_study_finished: {message_of(error)}")

        results = [run.result for run in self._study_runs.values() if run.result]
        if (problem := write_summary(results, os.environ)) is not None:
            self._errors.append(problem)

    def _fail(self, session: pytest.Session, run: StudyRun, message: str) -> None:
        """Report an error of a run at the end, and let pytest exit with status 1, unless it has another status."""
        self._errors.append(f"{run.study.name}: {message}")
        if session.exitstatus == pytest.ExitCode.OK:  # after Ctrl-C it is 2
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _discard_untouched(self) -> None:
        """Discard the runs of studies that had not begun when a failed test ended pytest, as with ``-x``."""
        touched = {file_of(key) for key, run in self._runs.items() if not run.is_untouched()}
        for key in [key for key in self._runs if file_of(key) not in touched][::-1]:  # references are inside
            run = self._runs.pop(key)
            run.discard()
            if not is_reference(key):
                self._errors.append(f"{run.study.name}: not started, so there are no results")

    def _save(self, run: StudyRun, result: StudyResult, session: pytest.Session) -> None:
        """Save *result* as a baseline if ``--llem-save`` is given."""
        settings = Settings.from_config(self._config)
        if settings.save is None:
            return
        same_name = sum(other.study.name == result.name for other in self._study_runs.values())
        if same_name > 1:
            why = f"{same_name} studies have this name, but a baseline holds only one"
            self._fail(session, run, f"--llem-save: {why}")
            return
        try:
            path = save(
                result,
                settings.save,
                settings.baseline_dir,
                partial=settings.save_partial,
                force=settings.save_force,
            )
        except (BaselineError, OSError) as error:
            options = []
            if not settings.save_partial and missing_results(result):
                options.append("--llem-save-partial")
            if not settings.save_force and unsuitable_reason(result, settings.save, settings.baseline_dir):
                options.append("--llem-save-force")
            hint = f" ({' '.join(options)} saves it despite this)" if options else ""
            self._fail(session, run, f"--llem-save: {error}{hint}")
        else:
            self._saved.append(f"baseline: {os.path.relpath(path, self._config.invocation_params.dir)}")

    def _pages(self) -> dict[str, Path]:
        """Return the file of each study's page, by the key of its run; empty without ``--llem-html``."""
        file, runs = Settings.from_config(self._config).html, self._study_runs
        names = [run.study.name for run in runs.values()]
        return {} if file is None else dict(zip(runs, page_files(file, names), strict=True))

    def _write_page(self, run: StudyRun, result: StudyResult, file: Path, session: pytest.Session) -> None:
        """Write a study's page. Any exception is reported, since the results are saved already."""
        from pytest_llem.reporting.html import write_report

        try:
            write_report(run.directory, file, result)
        except Exception as error:
            reason = error if isinstance(error, OSError) else message_of(error)
            self._fail(session, run, f"--llem-html: {file}: {reason}")
        else:
            run.page = file

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for run in self._study_runs.values():
            terminalreporter.write_sep("=", f"llem: {run.study.name}")
            where, width = self._config.invocation_params.dir, shutil.get_terminal_size().columns
            for line in summary_lines(run, where, width, ids=self._config.get_verbosity() > 0):
                for part in fitted([line]):
                    terminalreporter.write_line(part, yellow=line.startswith(WARNING))
        for line in self._saved:
            terminalreporter.write_line(line)
        self._write_errors(terminalreporter)  # last: they may be the only reason of the exit status

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        # pytest prints no summary after a pytest.exit with an exit status.
        if (reporter := config.pluginmanager.get_plugin("terminalreporter")) is not None:
            self._write_errors(reporter)

    def _write_errors(self, reporter: pytest.TerminalReporter) -> None:
        while self._errors:
            for part in fitted([self._errors.pop(0)]):
                reporter.write_line(part, red=True)


def _open_runs(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, dict[str, Experiment]]
) -> dict[str, StudyRun]:
    """Create a results directory for each study, and within it one for the reference that it is compared with.

    Raises:
        pytest.UsageError: A directory cannot be created, a hook fails, or an earlier run cannot be resumed.
    """
    settings = Settings.from_config(config)
    resumed = publish_replays(config, replays_of(config, studies))
    suffix = settings.run_id or datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    if settings.shard is not None:
        suffix += f"_shard-{settings.shard.number}-of-{settings.shard.count}"
    known = host_environment(config.rootpath)
    environments = {key: _environment(config, known) for key in studies if not is_reference(key)}
    runs: dict[str, StudyRun] = {}
    for key, study in studies.items():
        if is_reference(key):
            results_dir, name = runs[file_of(key)].directory, REFERENCE
        else:
            results_dir, name = settings.results_dir_of(study, config.rootpath), f"{study.name}_{suffix}"
        try:
            runs[key] = StudyRun.open(
                study,
                selected[key],
                results_dir,
                name,
                environments[file_of(key)],
                resumed.get(key, ()),
                str(settings.shard) if settings.shard else None,
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that the locale cannot encode
            # --llem-resume would find these runs, which have no results, instead of earlier ones.
            for run in reversed(runs.values()):  # references are inside
                run.discard()
            raise pytest.UsageError(f"{results_dir}: results cannot be written: {error}") from error
    return runs


def page_files(file: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the studies' pages: *file* for one study; files beside it with the names of several.

    Args:
        file: The value of ``--llem-html``.
        names: Names of the studies, which need not be unique.
    """
    if len(names) == 1:
        return [file]
    found: list[Path] = []
    for name in names:
        numbered = (name, *(f"{name}-{number}" for number in range(2, len(names) + 1)))
        pages = (file.with_name(f"{file.stem}-{one}{file.suffix}") for one in numbered)
        found.append(next(page for page in pages if page not in found))
    return found


def _environment(config: pytest.Config, known: dict[str, Any]) -> dict[str, Any]:
    """Return the *known* facts of this machine and those that hooks add.

    Raises:
        pytest.UsageError: A hook raises, or adds a value that cannot be written as JSON.
    """
    environment = copy.deepcopy(known)
    try:
        config.hook.pytest_llem_environment(environment=environment)
        added: dict[str, Any] = json.loads(json.dumps(environment, allow_nan=False))
    except pytest.exit.Exception:
        raise
    except HOOK_ERRORS as error:
        raise pytest.UsageError(f"pytest_llem_environment: {message_of(error)}") from error
    return added
