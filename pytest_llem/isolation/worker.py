"""The experiment's own process: reads a job, runs it, leaves one file behind.

Nothing of pytest is imported here, and nothing heavy before the orchestrator asks for its engine.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Files of an attempt's directory.
JOB, RESULT, ERROR, REQUESTS = "job.json", "result.json", "error.json", "requests.csv"

#: The phase in which a process has left its file and has only to exit.
DONE = "done"

#: An exception's text crosses up to this many characters.
MESSAGE_CAP = 4_000
TRACEBACK_CAP = 20_000

_PR_SET_PDEATHSIG = 1


def main(attempt: str, events: Connection, output: Connection, parent: int) -> None:
    """Run the job in the directory *attempt*.

    Args:
        attempt: Holds the job; the result goes there.
        events: Each phase is announced here, a JSON object a line.
        output: Takes the place of standard output and standard error.
        parent: Process id of whom to die with.
    """
    os.setsid()  # a group of its own, so that it can be ended whole and a terminal's Ctrl-C stays with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    output.close()
    faulthandler.enable(file=2)

    directory = Path(attempt)
    phase = "starting"

    def announce(new_phase: str) -> None:
        nonlocal phase
        phase = new_phase
        try:
            os.write(events.fileno(), json.dumps({"phase": phase}).encode() + b"\n")
        except OSError:  # nobody listens any more; the result still counts
            return

    try:
        job = json.loads((directory / JOB).read_text(encoding="utf-8"))
        run(job, directory, announce)
    except SystemExit:
        raise  # the status tells
    except BaseException as error:
        leave(directory / ERROR, json.dumps(describe(error, phase)))
        announce(DONE)
    else:
        announce(DONE)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def run(job: dict[str, Any], directory: Path, announce: Callable[[str], None]) -> None:
    """Run *job* and leave its result in *directory*."""
    announce("importing")
    sys.path += [folder for folder in job["python_path"] if folder not in sys.path]
    from pytest_llem.backends.protocol import EngineContext
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
    from pytest_llem.results.models import GapRecord, Identity
    from pytest_llem.study.config import ExperimentConfig

    measured = ExperimentOrchestrator(
        config=ExperimentConfig.model_validate(job["config"]),
        identity=Identity.model_validate(job["identity"]),
        context=EngineContext(model_path=tuple(map(Path, job["model_path"]))),
        directory=Path(job["directory"]),
        on_phase=announce,
    ).run()
    if job["gap"] is not None:
        measured.result.gap = GapRecord.model_validate(job["gap"])
    leave(directory / REQUESTS, measured.requests.to_csv())
    leave(directory / RESULT, measured.result.model_dump_json(indent=1) + "\n")


def leave(path: Path, text: str) -> None:
    """Write *text* so that *path* is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def describe(error: BaseException, phase: str) -> dict[str, Any]:
    """Return an exception as plain data: an ErrorRecord."""
    try:
        message = str(error)
    except Exception:
        message = "(its message could not be read)"
    names = {kind.__name__ for kind in type(error).__mro__}
    kind = "exception"
    if "PreflightError" in names:
        kind = "preflight"
    elif not names.isdisjoint({"MemoryError", "OutOfMemoryError"}):
        kind = "oom"
    text = None
    if kind != "preflight":
        text = "".join(traceback.format_exception(error))[-TRACEBACK_CAP:]
    return {
        "kind": kind,
        "type": type(error).__name__,
        "message": _sound(message[:MESSAGE_CAP]),
        "traceback": _sound(text) if text else None,
        "phase": phase,
    }


def _sound(text: str) -> str:
    """Return *text* with what is no Unicode, such as the bytes of a file name, spelt out."""
    return text.encode(errors="backslashreplace").decode()


def die_with(parent: int) -> None:
    """End this process's whole group as soon as *parent* is gone, however it went."""

    def end() -> None:
        os.killpg(0, signal.SIGKILL)

    def watch(pidfd: int) -> None:
        multiprocessing.connection.wait([pidfd])
        end()

    with suppress(OSError, AttributeError):  # not Linux: the watcher below has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        watched = os.pidfd_open(parent)
    except (ProcessLookupError, AttributeError):
        watched = None
    if os.getppid() != parent:
        end()
    if watched is not None:
        threading.Thread(target=watch, args=(watched,), daemon=True, name="llem-parent").start()
