"""Implement the pytest hooks of a session that has, or may have, studies; ``plugin`` registers them."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

import pytest

from pytest_llem._plugin.stash import RESULTS, RUN_EXPERIMENT, SELECTED_AXES, SHARED_STATE, STUDIES

if TYPE_CHECKING:
    from execnet import XSpec
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from pytest_llem.isolation.interrupts import Interrupts
    from pytest_llem.planning.forecast import Forecast
    from pytest_llem.planning.plan import Plan
    from pytest_llem.recording.recorder import Recorder
    from pytest_llem.reporting.terminal.experiment_lines import Lines
    from pytest_llem.study.design import StudyConfig

#: Names under which plugins are registered. ``_SESSION_HOOKS`` is this module.
_SESSION_HOOKS, _RECORDER, _LINES = "llem-session", "llem-recorder", "llem-lines"
_RUN_EXPERIMENTS, _DEFER_GATES, _JUDGE = "llem-run-experiments", "llem-defer-gates", "llem-judge"
_UNTIL_DECIDED, _REMOTE_WORKERS = "llem-until-decided", "llem-remote-workers"

#: Options to warn of if no study was collected.
_STUDY_OPTIONS = "plan", "html", "save", "baseline", "against", "resume", "resume-from", "shard"

_INTERRUPTS: pytest.StashKey[Interrupts] = pytest.StashKey()

#: Unique name of a pytest-xdist session, which its processes share.
_SESSION: pytest.StashKey[str] = pytest.StashKey()


def register(config: pytest.Config) -> None:
    """Register this module's hooks, unless they are registered already."""
    if not config.pluginmanager.has_plugin(_SESSION_HOOKS):
        config.pluginmanager.register(sys.modules[__name__], _SESSION_HOOKS)


def configure(config: pytest.Config, expression: str) -> None:
    """Check the options and ini values, and rewrite the axes in the ``-k`` *expression*.

    Raises:
        pytest.UsageError: An option or an ini value is invalid.
    """
    from pytest_llem._plugin.options import Settings
    from pytest_llem._plugin.overwriting import check_html

    register(config)
    settings = Settings.from_config(config)
    if settings.html is not None and not hasattr(config, "workerinput"):
        check_html(settings.html)
    if settings.resume_from is not None and not settings.resume_from.exists():
        raise pytest.UsageError(f"--llem-resume-from: {settings.resume_from}: no such file or folder")
    if "=" in expression:
        from pytest_llem.collection.selection import rewrite

        config.option.keyword, config.stash[SELECTED_AXES] = rewrite(expression)


def identify_worker(node: WorkerController) -> None:
    """Pass an xdist worker facts of its session; the controller's process id only if it runs on this machine."""
    from pytest_llem._plugin.options import WORKTREE
    from pytest_llem.execution.scheduling import distributes_one_at_a_time
    from pytest_llem.execution.stopping import elapsed_seconds

    if (worktree := node.config.stash.get(WORKTREE, None)) is not None:
        given = worktree.folder, worktree.repository, worktree.revision, worktree.commit
        node.workerinput["llem_worktree"] = [str(one) for one in given]
    # xdist's --testrunuid may be set by the user, and so be the same for two sessions.
    node.workerinput["llem_session"] = node.config.stash.setdefault(_SESSION, uuid.uuid4().hex)
    node.workerinput["llem_elapsed"] = elapsed_seconds(node.config)
    if node.gateway.spec.popen and not node.gateway.spec.via:
        node.workerinput["llem_controller"] = os.getpid()
    node.workerinput["llem_one_at_a_time"] = distributes_one_at_a_time(node.config)


def prepare_remote_workers(config: pytest.Config, specs: Sequence[XSpec]) -> None:
    """Prepare workers on other hosts, if pytest's arguments have studies.

    Raises:
        pytest.UsageError: A host cannot be reached, or does not have what the studies need.
    """
    from pytest_llem.execution.remote_workers import RemoteWorkers, study_files

    if studies := study_files(config):
        config.pluginmanager.register(RemoteWorkers(config, specs, studies), _REMOTE_WORKERS)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("llem_plan") and not session.testsfailed and not _is_xdist(config):
        from pytest_llem.execution.plans import plans_of, write_plan

        write_plan(config, plans_of(config, session.items))


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if not _studies(config) or config.get_verbosity() < 0 or _is_xdist(config):
        return []  # under xdist, the controller prints the plan
    from pytest_llem.execution.plans import plans_of

    return _plan_lines(config, plans_of(config, items))


@pytest.hookimpl(wrapper=True, trylast=True)  # inside the terminal reporter, which then ends its progress line
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    config = session.config
    if getattr(config, "workerinput", {}).get("llem_one_at_a_time"):
        from pytest_llem.execution.item_hooks import WaitInPause

        config.pluginmanager.register(WaitInPause(session))
    if _studies(config):
        if hasattr(config, "workerinput"):  # a worker runs what the controller sends, despite collection errors
            _prepare(config, config.workerinput["llem_session"])
        elif not session.testsfailed or config.option.continue_on_collection_errors:  # otherwise nothing runs
            _record(config, [item.nodeid for item in session.items])
    done = yield
    if (judge := config.pluginmanager.get_plugin(_JUDGE)) is not None:
        judge.judge(session)
    return done


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: WorkerController, ids: list[str]) -> None:
    from pytest_llem._plugin.node_ids import FUNCTIONS

    config = node.config
    if any(f"::{name}[" in one for name in FUNCTIONS for one in ids) and SHARED_STATE not in config.stash:
        recorder = _record(config, ids, config.stash[_SESSION])
        if recorder is None:
            return
        from pytest_llem.execution.plans import make_plans, write_plan

        plans = make_plans(config, recorder.studies, recorder.selected)
        write_plan(config, plans)
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter and config.get_verbosity() >= 0:
            reporter.write_line("")  # xdist does not end the line on which it counts its workers
            for line in _plan_lines(config, plans):
                reporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> object:
    from pytest_llem.execution.scheduling import make_scheduler

    def studies() -> Mapping[str, StudyConfig]:
        recorder: Recorder | None = config.pluginmanager.get_plugin(_RECORDER)
        return {} if recorder is None else recorder.studies

    return make_scheduler(config, log, studies)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    if config.getoption("llem_budgets") and RESULTS not in config.stash and not _is_xdist(config):
        message = "llem: no result file was named, so that --llem-budgets had no effect: pytest RESULT.json …"
        terminalreporter.write_line(message, yellow=True)
    if SHARED_STATE in config.stash or _studies(config) or _runs_nothing(config):
        return
    errors = terminalreporter.stats.get("error", ())
    if exitstatus == pytest.ExitCode.INTERRUPTED or any(isinstance(one, pytest.CollectReport) for one in errors):
        return  # a study may not have been collected yet, or could not be
    if unused := [f"--llem-{name}" for name in _STUDY_OPTIONS if config.getoption(f"--llem-{name}")]:
        terminalreporter.write_line(
            f"llem: no study was collected: {', '.join(unused)} had no effect", yellow=True
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    if _INTERRUPTS in session.config.stash:
        session.config.stash[_INTERRUPTS].ignore()  # so that results are written completely
    yield


def pytest_unconfigure(config: pytest.Config) -> None:
    if _INTERRUPTS in config.stash:
        config.stash[_INTERRUPTS].restore()
    if SHARED_STATE in config.stash and not hasattr(config, "workerinput"):
        config.stash[SHARED_STATE].close()


def _studies(config: pytest.Config) -> dict[str, StudyConfig]:
    """Return the studies collected so far by the key of their run; always empty in xdist's controller."""
    return config.stash.get(STUDIES, {})


def _is_xdist(config: pytest.Config) -> bool:
    """Return whether this process is an xdist worker or controller."""
    return hasattr(config, "workerinput") or config.pluginmanager.has_plugin("dsession")


def _plan_lines(config: pytest.Config, plans: Sequence[Plan]) -> list[str]:
    from pytest_llem._plugin.options import Settings
    from pytest_llem._plugin.terminal_width import fitted
    from pytest_llem.execution.plans import lock_notes
    from pytest_llem.reporting.terminal.plan import plan_lines

    lines = [line for plan in plans for line in plan_lines(plan, config.invocation_params.dir)]
    if (shard := Settings.from_config(config).shard) is not None:
        is_empty = not any(plan.experiments for plan in plans)
        text = "has no experiment: there are fewer points than shards, or none of the shard's is selected"
        merge = "llem merge judges the gates, on the results of all shards"
        lines.append(f"llem: shard {shard} {text}" if is_empty else f"llem: shard {shard}: {merge}")
    lines += [f"llem: {note}" for note in lock_notes(config, [plan.study for plan in plans])]
    lines += [f"llem: warning: {busy}" for busy in {plan.host_load_warning for plan in plans} if busy is not None]
    return list(fitted(lines))


def _runs_nothing(config: pytest.Config) -> bool:
    option = config.option
    return any(getattr(option, name, False) for name in ("collectonly", "setuponly", "setupplan"))


def _prepare(config: pytest.Config, session: str | None) -> None:
    """Set up a process that runs or records experiments.

    Args:
        config: pytest's configuration.
        session: Name of the session under xdist, else None.
    """
    from pytest_llem._plugin.shared_state import RemoteSharedState, SharedState
    from pytest_llem.execution.experiment import run_item
    from pytest_llem.execution.item_hooks import DeferGates, RunExperiments
    from pytest_llem.execution.stopping import begin_time_budget
    from pytest_llem.isolation.interrupts import Interrupts

    channel = getattr(config, "workerinput", {}).get("llem_channel")
    config.stash[SHARED_STATE] = SharedState(session) if channel is None else RemoteSharedState(channel)
    begin_time_budget(config)
    if not _runs_nothing(config):  # a worker gets here with --setup-plan, too
        config.pluginmanager.register(RunExperiments(), _RUN_EXPERIMENTS)
        config.stash[RUN_EXPERIMENT] = run_item
    config.pluginmanager.register(DeferGates(), _DEFER_GATES)
    config.stash[_INTERRUPTS] = Interrupts()
    has_debugger = getattr(config.option, "usepdb", False)  # Ctrl-C is to leave the debugger
    config.stash[_INTERRUPTS].install(keyboard=not has_debugger)


def _record(config: pytest.Config, node_ids: list[str], session: str | None = None) -> Recorder | None:
    """Start recording and return the recorder; None if nothing will run or nothing is to be recorded."""
    if _runs_nothing(config):
        return None
    _prepare(config, session)
    from pytest_llem.judging.judge import Judge
    from pytest_llem.recording.recorder import Recorder

    recorder = Recorder.start(config, node_ids)
    if recorder is not None:
        config.pluginmanager.register(recorder, _RECORDER)
        if (lines := _lines(config, recorder)) is not None:
            config.pluginmanager.register(lines, _LINES)
        if any(study.execution.until_decided for study in recorder.studies.values()):
            from pytest_llem.judging.until_decided import UntilDecided

            config.pluginmanager.register(UntilDecided(config, recorder), _UNTIL_DECIDED)
    config.pluginmanager.register(Judge(config, node_ids, recorder), _JUDGE)
    return recorder


def _lines(config: pytest.Config, recorder: Recorder) -> Lines | None:
    """Return the plugin that writes a line for each finished experiment; None if the output needs no lines."""
    from pytest_llem._plugin.node_ids import file_of
    from pytest_llem.execution.plans import make_forecast
    from pytest_llem.execution.terminal_output import is_live
    from pytest_llem.reporting.terminal.experiment_lines import Lines

    reporter = config.pluginmanager.get_plugin("terminalreporter")
    verbosity = config.get_verbosity()
    if reporter is None or verbosity < 0 or (is_live(config) and not verbosity and not _is_xdist(config)):
        return None

    def forecast_of(file: str) -> Forecast:
        keys = [key for key in recorder.runs if file_of(key) == file]
        return make_forecast(config, recorder.studies, {key: recorder.selected[key] for key in keys})

    return Lines(reporter, recorder.runs, forecast_of)
