"""One experiment, one process: started, waited for, ended whole, and its outcome collected."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llem.hardware.cgroups import oom_kills
from pytest_llem.isolation import worker
from pytest_llem.isolation.child import Child
from pytest_llem.isolation.outcome import Outcome, collect
from pytest_llem.isolation.server import Servers, current_folder
from pytest_llem.isolation.starting import Spawn, Starter
from pytest_llem.measurement.progress import Watcher
from pytest_llem.results.models import ErrorRecord

#: What would lead another interpreter to this one's packages.
OURS_ALONE = ("PYTHONPATH", "PYTHONHOME")

#: Environment variables that a process is told once it begins: what was imported before has not looked at them.
TOLD_LATE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTEST_CURRENT_TEST")


@dataclass(frozen=True)
class Job:
    """What an experiment's process is told.

    Attributes:
        identity: An Identity, as plain data.
        config: An ExperimentConfig, as plain data.
        directory: What a dataset's path is relative to.
        root: The git commit of this directory is told; None for the current one.
        model_path: Folders that hold models by name.
        gap: A GapRecord, as plain data: the idle time before.
        python_path: Folders in which an engine or a meter of the user's may be found, looked in last.
        python: The interpreter; None for this one, whose ``sys.path`` then holds there as well.
        carbon: A Carbon, as plain data: what electricity emits here, where that is stated.
        watch_pids: Processes, beside this one, whose end is the experiment's end.
        harness: The pytest processes, whose processor time is that of measuring.
        idle_power: A IdlePowerRecord, as plain data: what an earlier cycle has found of the idle machine.
        no_context: Fields of a IdlePowerRecord, as plain data: the machine before the session's first experiment.
        repeats: ContendedRuns, as plain data: measurements of the same that were contended.
        hub_unreachable: Why the Hugging Face hub is not to be asked: it did not answer before; None where it is.
    """

    identity: dict[str, Any]
    config: dict[str, Any]
    directory: str
    root: str | None = None
    model_path: Sequence[str] = ()
    gap: dict[str, Any] | None = None
    python_path: Sequence[str] = ()
    python: str | None = None
    carbon: dict[str, float] | None = None
    watch_pids: Sequence[int] = ()
    harness: Sequence[int] = ()
    idle_power: dict[str, Any] | None = None
    no_context: dict[str, Any] = field(default_factory=dict)
    repeats: Sequence[dict[str, Any]] = ()
    hub_unreachable: str | None = None


class ExperimentProcess:
    """A job's process, from its start to the last of it: it imports what the job needs, and waits for its cue.

    Args:
        job: The experiment, as far as it is known yet.
        servers: Fork it from one of these; None to start an interpreter for it.
        early: It is started before its turn.
    """

    def __init__(self, job: Job, servers: Servers | None = None, *, early: bool = False) -> None:
        self._needs = _needs(job)
        self._servers = servers
        self._early = early
        self._attempt: Path | None = None
        self._child: Child | None = None
        self._killed_before: int | None = None
        self._on_output: Callable[[bytes], None] = lambda chunk: None
        self._job = job

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: There is no room for its files, or no process to be had.
        """
        starter, self._attempt = _starter(self._job, self._servers)
        self._tell(self._job)
        self._killed_before = oom_kills()
        self._child = Child(lambda chunk: self._on_output(chunk))
        self._child.start(starter, self._attempt, self._job.watch_pids)

    @property
    def has_exited(self) -> bool:
        """Whether nothing of it is left, as its supervisor says."""
        return self._child is not None and self._child.is_over()

    def fits(self, job: Job, servers: Servers | None) -> bool:
        """Whether it is what would be started for *job* now."""
        return servers is self._servers and _needs(job) == self._needs

    def run(
        self,
        job: Job,
        timeout: float | None,
        watcher: Watcher | None,
        on_output: Callable[[bytes], None],
    ) -> Outcome:
        """Have it do *job*, and return what came of it: with a result, that may be before it has exited.

        Raises:
            OSError: There is no room for its files.
        """
        assert self._attempt is not None
        assert self._child is not None
        self._child.watcher, self._on_output = watcher, on_output
        self._tell(job, watched=watcher is not None)
        self._child.signal_start()
        timed_out = self._child.wait(timeout, until_done=True)
        self._child.watcher = None  # whatever it still has to say is no progress
        if not (self._attempt / worker.RESULT).is_file():
            timed_out = timed_out or self._child.wait(timeout)
            run_uninterrupted(self._child.end)
        return collect(self._attempt, self._child, timeout if timed_out else None, self._killed_before)

    def shut_down(self) -> None:
        """Let it exit, if not for ever, and end what is left of it. May be called again."""
        try:
            if self._child is not None:
                self._child.wait(0.0)
        finally:
            self.end()

    def end(self) -> None:
        """End it at once, and leave nothing of it. May be called again."""
        if self._child is not None:
            run_uninterrupted(self._child.end)
        if self._attempt is not None:
            run_uninterrupted(functools.partial(shutil.rmtree, self._attempt, ignore_errors=True))

    def _tell(self, job: Job, *, watched: bool = False) -> None:
        assert self._attempt is not None
        start = {"method": "spawn" if self._servers is None else "forkserver", "early": self._early}
        worker.leave(self._attempt / worker.JOB, json.dumps(_told(job) | {"start": start, "watched": watched}))


def run_isolated(
    job: Job,
    *,
    servers: Servers | None = None,
    started: ExperimentProcess | None = None,
    timeout: float | None = None,
    watcher: Watcher | None = None,
    on_output: Callable[[bytes], None] = lambda chunk: None,
    on_result: Callable[[ExperimentProcess], None] | None = None,
) -> Outcome:
    """Run *job* in a process of its own and return what came of it. Sleeps meanwhile, unless somebody looks on.

    Whatever happens, here or there, no process that descends from the job's is left when this returns or raises:
    but for one with a result that *on_result* has taken over.

    Args:
        job: The experiment.
        servers: Fork it from one of these; None to start an interpreter for it.
        started: Has been started for it ahead. It is ended where it does not fit any more.
        timeout: End it after this many seconds, those of fetching its dataset and its model not counted; None
            for never.
        watcher: Who is told how far it is; None where nobody looks.
        on_output: Called with what it writes to standard output and standard error, as that comes.
        on_result: Called with a process that has left its result, and has yet to exit: whoever is called winds it
            up. None to wait for that.
    """
    if started is not None and not started.fits(job, servers):
        started.end()
        started = None
    try:
        process = started or ExperimentProcess(job, servers)
        try:
            if started is None:
                process.start()
            outcome = process.run(job, timeout, watcher, on_output)
            if outcome.result is not None:
                (on_result or ExperimentProcess.shut_down)(process)
        except BaseException:
            process.end()
            raise
        if outcome.result is None:
            process.end()
    except OSError as error:  # no room for its files, or no process to be had
        return Outcome(error=ErrorRecord(kind="crash", type="NotStarted", message=f"no process: {error}"))
    return outcome


def _starter(job: Job, servers: Servers | None) -> tuple[Starter, Path]:
    """Return what starts a job's process, and a new folder for it."""
    environment = _environment(job)
    if servers is None:
        return Spawn(job.python or sys.executable, environment), Path(tempfile.mkdtemp(prefix="llem-"))
    early = {name: value for name, value in environment.items() if name not in TOLD_LATE}
    server = servers.get(job.python, early, [_path(job), job.python_path])
    return server, Path(tempfile.mkdtemp(dir=server.folder))


def _needs(job: Job) -> list[object]:
    """Return what a process of *job* cannot be told any more once it has started."""
    environment = {name: value for name, value in _environment(job).items() if name not in TOLD_LATE}
    known = [job.config, job.model_path, job.python_path, job.watch_pids, job.python]
    return [environment, _path(job), current_folder(), *known]


def _told(job: Job) -> dict[str, Any]:
    """Return what the worker reads."""
    environment = _environment(job)
    late = {name: environment.get(name) for name in TOLD_LATE}
    return vars(job) | {"sys_path": _path(job), "environment": late}


def _path(job: Job) -> list[str] | None:
    """Return the whole path to modules, None where it is another interpreter's."""
    # People put Paths there.
    return None if job.python else [os.fspath(one) for one in sys.path if isinstance(one, str | os.PathLike)]


def _environment(job: Job) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not (job.python and name in OURS_ALONE)}
    # Where nobody has said otherwise, sets of strings have the same order in every process.
    return {"PYTHONHASHSEED": "0", **inherited}


def run_uninterrupted(cleanup: Callable[[], None]) -> None:
    """Run *cleanup* to its end, however often Ctrl-C is pressed meanwhile, and only then be interrupted.

    Args:
        cleanup: May be begun again.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            cleanup()
        except Exception:
            raise
        except BaseException as again:  # a plugin's time limit, too, is raised by a signal's handler
            interrupt = again
        else:
            break
    if interrupt is not None:
        raise interrupt
