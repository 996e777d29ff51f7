"""Collect the outcome of an experiment's process: its result, or why there is none."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_llem.hardware.cgroups import oom_kills
from pytest_llem.isolation import worker
from pytest_llem.isolation.child import FETCH_SECONDS, Child
from pytest_llem.isolation.supervisor import REAP_SECONDS
from pytest_llem.results.manifest_records import ErrorRecord


@dataclass(frozen=True)
class Outcome:
    """The outcome of an experiment: a result or an error.

    Attributes:
        result: An ExperimentResult as JSON text; None if there is an error.
        files: Text of the files beside the result, by suffix (``requests.csv``).
        error: Why there is no result; None if there is one.
        output: Head and tail of what the process wrote to standard output and standard error.
    """

    result: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    error: ErrorRecord | None = None
    output: str = ""

    @classmethod
    def refused(cls, message: str) -> Outcome:
        """Return the outcome of an experiment that was not started, because it cannot succeed."""
        return cls(error=ErrorRecord(kind="preflight", type="PreflightError", message=message))

    @classmethod
    def of_failed_start(cls, reason: object, what: str = "process") -> Outcome:
        """Return the outcome of an experiment whose process, or server, could not be started."""
        message = f"the {what} could not be started: {reason}"
        return cls(error=ErrorRecord(kind="crash", type="NotStarted", message=message))

    def to_plain(self) -> dict[str, Any]:
        """Return the outcome as JSON-compatible data."""
        error = None if self.error is None else self.error.model_dump(mode="json")
        return {"result": self.result, "files": self.files, "error": error, "output": self.output}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Outcome:
        """Return the outcome of which :meth:`to_plain` returned *content*."""
        error = content["error"]
        return cls(**{**content, "error": None if error is None else ErrorRecord.model_validate(error)})

    @cached_property
    def data(self) -> dict[str, Any]:
        """The result as plain data, parsed once; empty if there is none."""
        found: dict[str, Any] = json.loads(self.result) if self.result is not None else {}
        return found


def collect(attempt: Path, child: Child, timeout: float | None, killed_before: int | None) -> Outcome:
    """Return the result of a process, or why there is none.

    Args:
        attempt: The folder of the job.
        child: The process, which has ended or has written its result.
        timeout: The deadline that the process missed, in s; None if it missed none.
        killed_before: What :func:`oom_kills` returned before the start.
    """
    output = child.output.text()
    try:
        if (result := attempt / worker.RESULT).is_file():  # it is whole, as it is renamed only once written
            # Bytes, since reading text would replace the carriage returns in generated text.
            files = {file.name: file.read_bytes().decode() for file in attempt.glob(worker.EXTRA_FILES)}
            return Outcome(result.read_bytes().decode(), files, output=output)
        if (error := attempt / worker.ERROR).is_file():
            record = ErrorRecord.model_validate_json(error.read_text(encoding="utf-8"))
            return Outcome(error=record, output=output)
    except ValueError as error:
        record = ErrorRecord(kind="crash", type="Unreadable", message=f"its result cannot be read: {error}")
    else:
        record = _failure(child, killed_before) if timeout is None else _timeout(attempt, child, timeout)
    record.phase = child.phase
    return Outcome(error=record, output=output)


def _timeout(attempt: Path, child: Child, timeout: float) -> ErrorRecord:
    limit, done = (FETCH_SECONDS if child.phase in worker.FETCHING else timeout), "finished"
    if child.is_loading_too_long:
        limit, done = child.max_load_seconds, "loaded"
    stacks = attempt / worker.STACKS
    dump = stacks.read_text(errors="replace")[: worker.TRACEBACK_CAP] if stacks.is_file() else ""
    message = f"not {done} after {limit:g} s"
    return ErrorRecord(kind="timeout", type="Timeout", message=message, traceback=dump or None)


def _failure(child: Child, killed_before: int | None) -> ErrorRecord:
    status = child.status
    if child.refused is not None:
        message = f"the process could not be started: {child.refused}"
        return ErrorRecord(kind="crash", type="NotStarted", message=message)
    if status is None:
        message = (
            f"{child.supervisor_name} was killed, or the process did not end {REAP_SECONDS:g} s after SIGKILL"
        )
        return ErrorRecord(kind="crash", type="Unknown", message=message)
    if status >= 0:
        message = f"the process ended with status {status} and left no result"
        return ErrorRecord(kind="crash", type="Exit", message=message)
    if status == -signal.SIGKILL and oom_kills() != killed_before:
        message = "the kernel killed the process: out of memory"
        return ErrorRecord(kind="oom", type="SIGKILL", message=message)
    return ended_by_signal(-status, "process")


def ended_by_signal(number: int, what: str) -> ErrorRecord:
    """Return the error of a process that a signal has ended; *what* is the process in the message."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {number}"
    return ErrorRecord(kind="crash", type=name, message=f"the {what} was ended by {name}")
