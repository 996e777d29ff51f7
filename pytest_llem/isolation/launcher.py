"""Run one experiment in a process of its own, end the process with all its descendants, and return the outcome."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llem.hardware.cgroups import oom_kills
from pytest_llem.isolation import worker
from pytest_llem.isolation.child import Child
from pytest_llem.isolation.forkserver_client import ForkServers, current_folder
from pytest_llem.isolation.outcome import Outcome, collect
from pytest_llem.isolation.starting import Starter, spawn_worker
from pytest_llem.measurement.progress import Watcher

#: Environment variables that would make another interpreter import this one's packages.
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME")

#: Environment variables that a process gets only when its job begins. Imports before that do not read them.
LATE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTEST_CURRENT_TEST")


@dataclass(frozen=True)
class Job:
    """Everything that an experiment's process needs, as plain data.

    Attributes:
        identity: Fields of an Identity.
        config: Fields of an ExperimentConfig.
        directory: Folder to which a dataset's path is relative.
        root: Folder whose git commit is recorded; None for the current folder.
        model_path: Folders that hold models by name.
        gap: Fields of a GapRecord: the idle time before the experiment; None if it was not recorded.
        python_path: Folders with a user's own engines and meters. They are searched last.
        python: The interpreter; None for this one, with this process's ``sys.path``.
        carbon: Fields of a Carbon: carbon intensity and PUE; None if the user has not given them.
        watch_pids: Processes, besides this one, whose end also ends the experiment.
        harness: The pytest processes, whose processor time counts as measurement overhead.
        idle_power: Fields of an IdlePowerRecord measured by an earlier experiment; None if there is none.
        idle_power_no_context: Fields of an IdlePowerRecord: idle power without a CUDA context, or why it was not
            measured.
        contended_runs: Fields of ContendedRuns: earlier, contended runs of this experiment.
        hub_unreachable_reason: Why the Hugging Face hub must not be asked; None if it may be.
        devices: Leased devices: the engine may use no other GPUs. Empty for any.
        variables: Environment variables that restrict CUDA to the leased devices.
        import_trees: The candidate's working tree, from which no module may be imported, and the reference's own.
            None unless the process imports the code of another git revision.
        turns: Fields of Turns, without ``next_turn``; None to measure without interruption.
        server: Fields of a ServerRecord: the server to measure; None for an experiment without one.
        max_load_seconds: Time limit of loading the engine, in s; None for none.
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
    idle_power_no_context: dict[str, Any] = field(default_factory=dict)
    contended_runs: Sequence[dict[str, Any]] = ()
    hub_unreachable_reason: str | None = None
    devices: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    import_trees: tuple[str, str] | None = None
    turns: dict[str, Any] | None = None
    server: dict[str, Any] | None = None
    max_load_seconds: float | None = None


class ExperimentProcess:
    """The process of one job. Once started, it imports what the job needs, and then waits for :meth:`run`.

    Args:
        job: The job, as far as it is known yet.
        forkservers: Forkservers to fork it from; None to start an interpreter.
        early: Whether it is started before its job is complete.
    """

    def __init__(self, job: Job, forkservers: ForkServers | None = None, *, early: bool = False) -> None:
        self._fixed = _fixed_values(job)
        self._forkservers = forkservers
        self._early = early
        self._attempt: Path | None = None
        self._child: Child | None = None
        self._killed_before: int | None = None
        self._on_output: Callable[[bytes], None] = lambda chunk: None
        self._job = job

    def start(
        self, watcher: Watcher | None = None, on_output: Callable[[bytes], None] = lambda chunk: None
    ) -> Child:
        """Start the process, unless it was started early, and return it.

        Args:
            watcher: Notified of progress from now on; None for no notification.
            on_output: Called with output of the process as it arrives from now on.

        Raises:
            OSError: Its files cannot be written, or the system cannot start a process.
        """
        self._on_output = on_output
        if self._child is None:
            starter, self._attempt = _starter(self._job, self._forkservers)
            self._write_job(self._job)
            self._killed_before = oom_kills()
            self._child = Child(lambda chunk: self._on_output(chunk))
            self._child.start(starter, self._attempt, self._job.watch_pids)
        self._child.watcher = watcher
        return self._child

    @property
    def has_exited(self) -> bool:
        """Whether the process and all its descendants have ended."""
        return self._child is not None and self._child.is_over()

    @classmethod
    def for_job(
        cls, job: Job, forkservers: ForkServers | None, early: ExperimentProcess | None
    ) -> ExperimentProcess:
        """Return a process that was started *early* if it can run *job*, else end it and return a new one."""
        if early is not None and early._forkservers is forkservers and early._fixed == _fixed_values(job):
            return early
        if early is not None:
            early.end()
        return cls(job, forkservers)

    def run(
        self,
        job: Job,
        timeout: float | None,
        watcher: Watcher | None,
        on_output: Callable[[bytes], None],
    ) -> Outcome:
        """Run *job* and return its outcome. If there is a result, the process may not have exited yet.

        Args:
            job: The complete job.
            timeout: Time limit in s, without downloads; None for none.
            watcher: Notified of progress; None for no notification.
            on_output: Called with output of the process as it arrives.

        Raises:
            OSError: Its files cannot be written, or the system cannot start a process.
        """
        child = self.start(watcher, on_output)
        self.begin(job, watched=watcher is not None)
        timed_out = child.wait(timeout, until=lambda: child.phase == worker.DONE)
        return self.outcome(timeout if timed_out else None)

    def begin(self, job: Job, *, watched: bool) -> None:
        """Make the started process begin *job*.

        Args:
            job: The complete job.
            watched: Whether meters report the current power, too.

        Raises:
            OSError: The job cannot be written.
        """
        assert self._child is not None
        if job.max_load_seconds is not None:
            self._child.max_load_seconds = job.max_load_seconds
        self._write_job(job, watched=watched)
        self._child.send()

    def outcome(self, missed_deadline: float | None) -> Outcome:
        """Return the outcome of a process that is done, has ended, or took longer than *missed_deadline* s."""
        assert self._attempt is not None
        assert self._child is not None
        self._child.watcher = None  # later events are not progress
        if not (self._attempt / worker.RESULT).is_file():
            if missed_deadline is None:
                self._child.wait(None)
            run_uninterrupted(self._child.end)
        return collect(self._attempt, self._child, missed_deadline, self._killed_before)

    def shut_down(self) -> None:
        """Wait a limited time for the process to exit, and kill what is left. May be called again."""
        try:
            if self._child is not None:
                self._child.wait(0.0)
        finally:
            self.end()

    def end(self) -> None:
        """Kill the process and all its descendants, and remove its files. May be called again."""
        if self._child is not None:
            run_uninterrupted(self._child.end)
        if self._attempt is not None:
            run_uninterrupted(functools.partial(shutil.rmtree, self._attempt, ignore_errors=True))

    def _write_job(self, job: Job, *, watched: bool = False) -> None:
        assert self._attempt is not None
        start = {"method": "spawn" if self._forkservers is None else "forkserver", "early": self._early}
        worker.write_whole(
            self._attempt / worker.JOB, json.dumps(_job_fields(job) | {"start": start, "watched": watched})
        )


def run_isolated(
    job: Job,
    *,
    forkservers: ForkServers | None = None,
    started: ExperimentProcess | None = None,
    timeout: float | None = None,
    watcher: Watcher | None = None,
    on_output: Callable[[bytes], None] = lambda chunk: None,
    on_result: Callable[[ExperimentProcess], None] | None = None,
) -> Outcome:
    """Run *job* in a process of its own and return its outcome. Sleeps meanwhile if there is no *watcher*.

    When this returns or raises, no descendant of the process is left. The exception is a process with a result
    that *on_result* has taken over.

    Args:
        job: The experiment.
        forkservers: Forkservers to fork it from; None to start an interpreter.
        started: A process that was started early. It is ended if it does not fit the job any more.
        timeout: Time limit in s, without downloads of its dataset and model; None for none.
        watcher: Notified of progress; None for no notification.
        on_output: Called with standard output and standard error of the process as they arrive.
        on_result: Takes over a process that has written its result but has not exited, and has to shut it down.
            None to wait for its exit here.

    Example:
        >>> outcome = run_isolated(job, timeout=600)
        >>> outcome.error is None
        True
    """
    process = ExperimentProcess.for_job(job, forkservers, started)
    try:
        try:
            outcome = process.run(job, timeout, watcher, on_output)
            if outcome.result is not None:
                (on_result or ExperimentProcess.shut_down)(process)
        except BaseException:
            process.end()
            raise
        if outcome.result is None:
            process.end()
    except OSError as error:  # its files cannot be written, or the system cannot start a process
        return Outcome.of_failed_start(error)
    return outcome


def _starter(job: Job, forkservers: ForkServers | None) -> tuple[Starter, Path]:
    """Return the starter of a job's process, and a new folder for the job."""
    environment = _environment(job)
    if forkservers is None:
        start = functools.partial(spawn_worker, job.python or sys.executable, environment)
        return start, Path(tempfile.mkdtemp(prefix="llem-"))
    early = {name: value for name, value in environment.items() if name not in LATE_VARIABLES}
    forkserver = forkservers.get(job.python, early, [_path(job), job.python_path])
    return forkserver.start, Path(tempfile.mkdtemp(dir=forkserver.folder))


def _fixed_values(job: Job) -> list[object]:
    """Return the values of *job* that are fixed once its process has started."""
    environment = {name: value for name, value in _environment(job).items() if name not in LATE_VARIABLES}
    known = [job.config, job.model_path, job.python_path, job.watch_pids, job.python]
    return [environment, _path(job), current_folder(), *known]


def _job_fields(job: Job) -> dict[str, Any]:
    """Return the job file's content."""
    environment = _environment(job)
    late = {name: environment.get(name) for name in LATE_VARIABLES}
    return vars(job) | {"sys_path": _path(job), "environment": late}


def _path(job: Job) -> list[str] | None:
    """Return this process's ``sys.path``; None if the job runs in another interpreter."""
    # sys.path may hold Path objects.
    return None if job.python else [os.fspath(one) for one in sys.path if isinstance(one, str | os.PathLike)]


def _environment(job: Job) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not (job.python and name in PYTHON_VARIABLES)
    }
    # Sets of strings then have the same order in every process, unless the user has set another seed.
    return {"PYTHONHASHSEED": "0", **inherited, **job.variables}


def run_uninterrupted(cleanup: Callable[[], None]) -> None:
    """Run *cleanup* to its end, also if Ctrl-C is pressed meanwhile, and raise the interrupt afterwards.

    Args:
        cleanup: Called again after each interrupt.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            cleanup()
        except Exception:
            raise
        except BaseException as again:  # also a plugin's time limit, which a signal handler raises
            interrupt = again
        else:
            break
    if interrupt is not None:
        raise interrupt
