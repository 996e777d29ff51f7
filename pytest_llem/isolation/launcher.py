"""One experiment, one fresh process: started, waited for, ended whole, and its outcome collected."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llem.isolation import worker
from pytest_llem.isolation.child import FETCH_SECONDS, REAP_SECONDS, Child
from pytest_llem.isolation.oom import oom_kills
from pytest_llem.results.models import ErrorRecord

#: What would lead another interpreter to this one's packages.
OURS_ALONE = ("PYTHONPATH", "PYTHONHOME")


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
        lives_with: Processes, beside this one, whose end is the experiment's end.
        harness: The pytest processes, whose processor time is that of measuring.
        baseline: A BaselineRecord, as plain data: what an earlier cycle has found of the idle machine.
        idle_bare: Fields of a BaselineRecord, as plain data: the machine before the session's first experiment.
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
    lives_with: Sequence[int] = ()
    harness: Sequence[int] = ()
    baseline: dict[str, Any] | None = None
    idle_bare: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came back: a result, or an error.

    Attributes:
        result: An ExperimentResult as JSON text, or None.
        files: What goes beside the result, text by suffix (``requests.csv``).
        error: Why there is no result, or None.
        output: What the process wrote to standard output and standard error, head and tail.
    """

    result: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    error: ErrorRecord | None = None
    output: str = ""


def run_isolated(
    job: Job,
    *,
    timeout: float | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_output: Callable[[bytes], None] = lambda chunk: None,
) -> Outcome:
    """Run *job* in a process of its own and return what came of it. Sleeps meanwhile.

    Whatever happens, here or there, no process that descends from the job's is left when this returns or raises.

    Args:
        job: The experiment.
        timeout: End it after this many seconds, those of fetching its dataset and its model not counted; None
            for never.
        on_phase: Called with each phase as it begins there.
        on_output: Called with what it writes to standard output and standard error, as that comes.
    """
    attempt = None
    try:
        attempt = Path(tempfile.mkdtemp(prefix="llem-"))
        (attempt / worker.JOB).write_text(json.dumps(_told(job)), encoding="utf-8")
        killed_before = oom_kills()
        child = Child(on_phase, on_output)
        try:
            child.start(job.python or sys.executable, attempt, _environment(job), job.lives_with)
            timed_out = child.wait(timeout)
        finally:
            _insist(child.end)
        return _collect(attempt, child, timeout if timed_out else None, killed_before)
    except OSError as error:  # no room for its files, or no process to be had
        return Outcome(error=ErrorRecord(kind="crash", type="NotStarted", message=f"no process: {error}"))
    finally:
        if attempt is not None:
            _insist(functools.partial(shutil.rmtree, attempt, ignore_errors=True))


def _told(job: Job) -> dict[str, Any]:
    """Return what the worker reads: the job, and the whole path to modules where it is the same interpreter's."""
    path = [os.fspath(one) for one in sys.path if isinstance(one, str | os.PathLike)]  # people put Paths there
    return vars(job) | {"sys_path": None if job.python else path}


def _environment(job: Job) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not (job.python and name in OURS_ALONE)}
    # Where nobody has said otherwise, sets of strings have the same order in every process.
    return {"PYTHONHASHSEED": "0", **inherited}


def _insist(cleanup: Callable[[], None]) -> None:
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


def _collect(attempt: Path, child: Child, timeout: float | None, killed_before: int | None) -> Outcome:
    output = child.output.text()
    try:
        if (result := attempt / worker.RESULT).is_file():  # whole, or it would not bear that name: it counts
            files = {file.name: file.read_text(encoding="utf-8") for file in attempt.glob(worker.BESIDE)}
            return Outcome(result.read_text(encoding="utf-8"), files, output=output)
        if (error := attempt / worker.ERROR).is_file():
            record = ErrorRecord.model_validate_json(error.read_text(encoding="utf-8"))
            return Outcome(error=record, output=output)
    except ValueError as error:
        record = ErrorRecord(kind="crash", type="Unreadable", message=f"what it left cannot be read: {error}")
    else:
        record = _failure(child, killed_before) if timeout is None else _timeout(attempt, child, timeout)
    record.phase = child.phase
    return Outcome(error=record, output=output)


def _timeout(attempt: Path, child: Child, timeout: float) -> ErrorRecord:
    limit = FETCH_SECONDS if child.phase in worker.FETCHING else timeout
    stacks = attempt / worker.STACKS
    where = stacks.read_text(errors="replace")[: worker.TRACEBACK_CAP] if stacks.is_file() else ""
    message = f"not done after {limit:g} s"
    return ErrorRecord(kind="timeout", type="Timeout", message=message, traceback=where or None)


def _failure(child: Child, killed_before: int | None) -> ErrorRecord:
    status = child.status
    if child.refused is not None:
        return ErrorRecord(kind="crash", type="NotStarted", message=f"no process: {child.refused}")
    if status is None:
        message = f"its guardian was killed, or it did not go within {REAP_SECONDS:g} s of SIGKILL"
        return ErrorRecord(kind="crash", type="Unknown", message=message)
    if status >= 0:
        message = f"the process ended with status {status} and left no result"
        return ErrorRecord(kind="crash", type="Exit", message=message)
    if status == -signal.SIGKILL and oom_kills() != killed_before:
        message = "the kernel killed the process: there was no memory left"
        return ErrorRecord(kind="oom", type="SIGKILL", message=message)
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-status}"
    return ErrorRecord(kind="crash", type=name, message=f"the process was ended by {name}")
