"""One experiment, one freshly spawned process: started, waited for, ended whole, and its outcome collected."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pytest_llem.isolation import worker
from pytest_llem.isolation.output import CappedOutput
from pytest_llem.results.models import ErrorRecord

#: How long a process may take to go once it has been killed. Only one stuck in the kernel takes this long.
REAP_SECONDS = 30.0

#: How long a process that has left its result may take to exit by itself.
GRACE_SECONDS = 10.0

#: The longest single sleep; poll(2) takes no more than some weeks.
LONGEST_WAIT = 86_400.0

#: Bytes of an unfinished announcement that are kept.
EVENT_CAP = 1 << 16

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """What an experiment's process is told.

    Attributes:
        identity: An Identity, as plain data.
        config: An ExperimentConfig, as plain data.
        directory: What a dataset's path is relative to.
        model_path: Folders that hold models by name.
        gap: A GapRecord, as plain data: the idle time before.
        python_path: Folders in which an engine or a meter of the user's may be found, looked in last.
    """

    identity: dict[str, Any]
    config: dict[str, Any]
    directory: str
    model_path: Sequence[str] = ()
    gap: dict[str, Any] | None = None
    python_path: Sequence[str] = ()


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
    job: Job, *, timeout: float | None = None, on_phase: Callable[[str], None] = lambda phase: None
) -> Outcome:
    """Run *job* in a process of its own and return what came of it. Sleeps meanwhile.

    Whatever happens, here or there, no process of the job's group is left when this returns or raises.

    Args:
        job: The experiment.
        timeout: End it after this many seconds; None for never.
        on_phase: Called with each phase as it begins there.
    """
    attempt = Path(tempfile.mkdtemp(prefix="llem-"))
    child = _Child(attempt)
    try:
        (attempt / worker.JOB).write_text(json.dumps(vars(job)), encoding="utf-8")
        try:
            child.start()
            timed_out = child.wait(timeout, on_phase)
        finally:
            exit_code = _insist(child.end)
        return _collect(attempt, child, exit_code, timeout if timed_out else None)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


class _Child:
    """A worker's process and the reading ends of its pipes."""

    def __init__(self, attempt: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._events, self._their_events = context.Pipe(duplex=False)
        self._output, self._their_output = context.Pipe(duplex=False)
        self.phase = "starting"
        self.output = CappedOutput()
        self._heard = b""
        self._process: SpawnProcess = context.Process(
            target=worker.main,
            args=(str(attempt), self._their_events, self._their_output, os.getpid()),
            name="llem-experiment",
        )
        self._ended: int | None = None

    def start(self) -> None:
        """Start the process."""
        with _bare_main():
            self._process.start()
        self._ended = _exit_handle(self._process)
        # Ours to close, or their ends would never be seen.
        self._their_events.close()
        self._their_output.close()
        for connection in (self._events, self._output):
            os.set_blocking(connection.fileno(), False)

    def wait(self, timeout: float | None, on_phase: Callable[[str], None]) -> bool:
        """Sleep until the process has ended, reading what it says. Return whether the time was up first.

        One that has left its result is given a little longer, and not left to hang in a thread or an exit handler.
        """
        assert self._ended is not None, "start first"
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        sources: list[int | Connection] = [self._ended, self._events, self._output]
        while True:
            left = min(deadline - time.monotonic(), LONGEST_WAIT)
            ready = wait(sources, max(0.0, left))
            if self._output in ready and not self._drain():
                sources.remove(self._output)
            if self._events in ready and not self._hear(on_phase):
                sources.remove(self._events)
            if self._ended in ready:
                return False
            if self.phase == worker.DONE:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= deadline:
                return self.phase != worker.DONE

    def end(self) -> int | None:
        """Kill the whole group, reap the process and return its exit code; None where it will not go."""
        pid = self._process.pid
        if pid is None:
            return None
        if self._ended is None:  # interrupted as it started
            self._ended = _exit_handle(self._process)
        # Before reaping: until then the id cannot be anybody else's.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have a group of its own yet
        wait([self._ended], REAP_SECONDS)
        self._drain()
        exit_code = self._process.exitcode
        for connection in (self._events, self._output):
            connection.close()
        if self._ended != self._process.sentinel:
            with suppress(OSError):
                os.close(self._ended)
        return exit_code

    def _drain(self) -> bool:
        """Take what output there is. Return whether more may come."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._output.fileno(), 1 << 16):
                self.output.write(chunk)
            return False
        return True

    def _hear(self, on_phase: Callable[[str], None]) -> bool:
        """Take what was announced, a JSON object a line. Return whether more may come."""
        try:
            chunk = os.read(self._events.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        *lines, rest = (self._heard + chunk).split(b"\n")
        self._heard = rest[-EVENT_CAP:]
        for line in lines:
            try:
                self.phase = str(json.loads(line)["phase"])
            except (ValueError, TypeError, KeyError):  # not one of ours: the result will tell
                continue
            on_phase(self.phase)
        return bool(chunk)


def _insist(cleanup: Callable[[], _T]) -> _T:
    """Run *cleanup* to its end, however often Ctrl-C is pressed meanwhile, and only then be interrupted.

    Args:
        cleanup: May be begun again.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            result = cleanup()
        except KeyboardInterrupt as again:
            interrupt = again
        else:
            break
    if interrupt is not None:
        raise interrupt
    return result


def _exit_handle(process: SpawnProcess) -> int:
    """Return what becomes readable when the process ends.

    multiprocessing's sentinel is a pipe that a forked grandchild keeps open, so a pidfd where there is one.
    """
    assert process.pid is not None
    with suppress(AttributeError, OSError):
        return os.pidfd_open(process.pid)
    return process.sentinel


@contextmanager
def _bare_main() -> Iterator[None]:
    """Hide ``__main__`` for a moment: spawn would run it again in the child, and ours is pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _collect(attempt: Path, child: _Child, exit_code: int | None, timeout: float | None) -> Outcome:
    output = child.output.text()
    result, error = attempt / worker.RESULT, attempt / worker.ERROR
    if result.is_file():  # whole, or it would not bear that name: it counts, however the process ended
        files = {worker.REQUESTS: (attempt / worker.REQUESTS).read_text(encoding="utf-8")}
        return Outcome(result.read_text(encoding="utf-8"), files, output=output)
    if error.is_file():
        record = ErrorRecord.model_validate_json(error.read_text(encoding="utf-8"))
    elif timeout is not None:
        record = ErrorRecord(
            kind="timeout", type="Timeout", message=f"not done after {timeout:g} s", phase=child.phase
        )
    else:
        name, message = _ending(exit_code)
        record = ErrorRecord(kind="crash", type=name, message=message, phase=child.phase)
    return Outcome(error=record, output=output)


def _ending(exit_code: int | None) -> tuple[str, str]:
    if exit_code is None:
        return "Unkillable", f"the process did not go within {REAP_SECONDS:g} s of SIGKILL"
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:  # a real-time signal has no name
            name = f"signal {-exit_code}"
        return name, f"the process was ended by {name}"
    return "Exit", f"the process ended with status {exit_code} and left no result"
