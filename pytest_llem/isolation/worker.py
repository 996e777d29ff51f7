"""Run one experiment in its own process: read a job and write its result or error to a file.

    python -m pytest_llem.isolation.worker ATTEMPT EVENTS START

ATTEMPT is the folder that holds the job and receives the result. EVENTS is the file descriptor on which each phase
is announced, one JSON object a line. START is the file descriptor from which the worker reads a line before it
begins. Before that line it imports what the job needs and opens no device. After it, it reads the job again, which
may have new values by then. If the job is interleaved with another one, each further line gives it a turn. Nothing
of pytest is imported here.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pytest_llem.isolation.supervisor import DUMP_STACKS
from pytest_llem.times import now

if TYPE_CHECKING:
    from pytest_llem.measurement.progress import Progress
    from pytest_llem.measurement.turns import Turn

#: Files in the attempt's folder. STACKS receives the stacks of all threads when the time is up.
JOB, RESULT, ERROR, STACKS = "job.json", "result.json", "error.json", "stacks.txt"

#: Pattern of the files that are kept beside the result.
EXTRA_FILES = "*.csv"

#: Phases while packages are imported, and once they are.
IMPORTING, READY = "importing", "ready"

#: Phases that may download.
FETCHING = ("fetching the dataset", "fetching the model")

#: Phases in which the engine begins to load its model, and has loaded it.
LOADING, LOADED = "loading", "preparing"

#: The phase in which the file is written and the process only has to exit.
DONE = "done"

#: Characters of an exception's message and traceback that are kept.
MESSAGE_CAP = 4_000
TRACEBACK_CAP = 20_000

#: Out-of-memory messages of libraries that raise other errors than MemoryError.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def main(attempt: str, events: int, start_fd: int) -> None:
    """Run the job in the folder *attempt*.

    Args:
        attempt: The folder that holds the job and receives the result.
        events: File descriptor on which each phase is announced: a Progress as a line of JSON.
        start_fd: File descriptor to read a line from before the job begins.
    """
    for fd in (events, start_fd):
        os.set_inheritable(fd, False)
    sys.argv[1:] = []  # an imported module may parse them
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a module that the forkserver imported may have replaced it
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    directory = Path(attempt)
    stacks = (directory / STACKS).open("w")  # faulthandler needs it open
    faulthandler.enable(file=2)  # sys.stderr may have been replaced
    faulthandler.register(DUMP_STACKS, file=stacks)

    latest = "starting"

    def announce(phase: str, **more: Any) -> None:
        nonlocal latest
        latest = phase
        try:
            os.write(events, json.dumps({"phase": phase, **more}).encode() + b"\n")
        except OSError:  # the reader is gone; the result still counts
            return

    try:
        announce(IMPORTING)
        start = {"began_at": now()}
        import_needed(read_job(directory))
        start["ready_at"] = now()
        announce(READY)
        read_line(start_fd)
        announce(IMPORTING)  # run raises now what could not be imported
        run(read_job(directory), start, directory, announce, events, start_fd)
    except SystemExit:
        raise  # the exit status is reported
    except BaseException as error:
        write_whole(directory / ERROR, json.dumps(describe(error, latest)))
    _flush()  # the output has to arrive before the event DONE
    announce(DONE)
    finish()


def finish() -> NoReturn:
    """Exit as an interpreter does, without finalizing modules: with torch that takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    _flush()
    os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # an engine may have replaced the stream by any object
            stream.flush()


def read_job(directory: Path) -> dict[str, Any]:
    """Return the job in *directory*."""
    job = json.loads((directory / JOB).read_text(encoding="utf-8"))
    assert isinstance(job, dict)
    return job


def read_line(fd: int) -> bytes:
    """Return the next line of a pipe, with its line break.

    End of file means that pytest has ended. This process then waits until the supervisor kills it: if it ended by
    itself, the supervisor would not remove its folder.
    """
    line = b""
    while not line.endswith(b"\n"):
        while not (byte := os.read(fd, 1)):
            signal.pause()
        line += byte
    return line


def import_needed(job: dict[str, Any]) -> None:
    """Import what *job* needs. An import error is ignored here: the run imports again and reports it."""
    if job["sys_path"] is not None:
        sys.path[:] = job["sys_path"]
    sys.path += [folder for folder in job["python_path"] if folder not in sys.path]
    from pytest_llem.measurement.engine_imports import preload
    from pytest_llem.study.config import ExperimentConfig

    with suppress(Exception):
        preload(ExperimentConfig.model_validate(job["config"]), tuple(map(Path, job["model_path"])))


def run(
    job: dict[str, Any],
    start: dict[str, str],
    directory: Path,
    announce: Callable[..., None],
    events: int,
    orders: int,
) -> None:
    """Run *job* and write its result to *directory*.

    Args:
        job: The job.
        start: When this process began, and when its imports were done: fields of a StartRecord.
        directory: The attempt's folder.
        announce: Called with the fields of a Progress at each phase.
        events: File descriptor on which the phases are announced.
        orders: File descriptor from which the orders to take a turn are read, one a line.
    """
    for name, value in job["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if job["hub_unreachable_reason"] is not None:
        from pytest_llem.engines.hub import go_offline

        go_offline(job["hub_unreachable_reason"])
    from pytest_llem.engines.protocol import EngineContext, PreflightError
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
    from pytest_llem.measurement.turns import Turns, parse_turn
    from pytest_llem.results import code_state
    from pytest_llem.results.carbon import Carbon
    from pytest_llem.results.contention import ContendedRun
    from pytest_llem.results.experiment import GapRecord, Identity, IdlePowerRecord, StartRecord
    from pytest_llem.results.serving import ServerRecord
    from pytest_llem.study.config import ExperimentConfig

    def report(progress: Progress) -> None:
        announce(**progress.as_event())

    def next_turn(progress: Progress) -> Turn | None:
        report(progress)
        return parse_turn(read_line(orders))

    measured = ExperimentOrchestrator(
        config=ExperimentConfig.model_validate(job["config"]),
        identity=Identity.model_validate(job["identity"]),
        context=EngineContext(
            model_path=tuple(map(Path, job["model_path"])),
            server=ServerRecord.model_validate(job["server"]) if job["server"] else None,
        ),
        directory=Path(job["directory"]),
        root=Path(job["root"]) if job["root"] is not None else None,
        carbon=Carbon(**job["carbon"]) if job["carbon"] is not None else None,
        known_idle_power=IdlePowerRecord.model_validate(job["idle_power"]) if job["idle_power"] else None,
        harness=[*job["harness"], os.getppid()],  # the supervisor
        on_progress=report,
        telemetry_fd=events if job["watched"] else None,
        devices=job["devices"],
        turns=None if job["turns"] is None else Turns(**job["turns"], next_turn=next_turn),
    ).run()
    if job["import_trees"] is not None and (found := code_state.imported_from(*job["import_trees"])):
        raise PreflightError(
            f"the reference imported {found[0]} from the working tree, not from its revision: does that have it?"
        )
    if measured.result.idle_power is not None:
        measured.result.idle_power = measured.result.idle_power.model_copy(update=job["idle_power_no_context"])
    if job["contended_runs"] and measured.result.contention is not None:
        measured.result.contention.repeats = [ContendedRun.model_validate(one) for one in job["contended_runs"]]
    if job["gap"] is not None:
        measured.result.gap = GapRecord.model_validate(job["gap"])
    measured.result.start = StartRecord.model_validate(start | job["start"])
    for name, text in measured.files.items():
        write_whole(directory / name, text)
    write_whole(directory / RESULT, measured.result.model_dump_json(indent=1) + "\n")


class UnwritableError(OSError):
    """A file of the attempt could not be written, as on a full disk."""


def write_whole(path: Path, text: str) -> None:
    """Write *text* to *path* so that the file is either whole or missing. Lone surrogates are escaped.

    Raises:
        UnwritableError: The file could not be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # makes room for the error, which is shorter than a result
        raise UnwritableError(error.errno, error.strerror, str(path)) from error


def describe(error: BaseException, phase: str) -> dict[str, Any]:
    """Return an exception as an ErrorRecord in plain data."""
    try:
        message = str(error)
    except BaseException:  # __str__ of a third-party exception may raise anything
        message = "(its message could not be read)"
    names = {kind.__name__ for kind in type(error).__mro__}
    kind = "exception"
    if "PreflightError" in names:
        kind = "preflight"
    elif not names.isdisjoint({"MemoryError", "OutOfMemoryError"}) or any(one in message for one in _NO_MEMORY):
        kind = "oom"
    elif not names.isdisjoint({"EngineCrashError", "UnwritableError"}):
        kind = "crash"
    elif "LoadError" in names:
        kind = "load"
    own_phase = getattr(error, "phase", None) if kind == "load" else None
    is_explained = kind in ("preflight", "load") or isinstance(error, UnwritableError)
    text = None if is_explained else _traceback(error)
    return {
        "kind": kind,
        "type": type(error).__name__,
        "message": _escaped(message[:MESSAGE_CAP]),
        "traceback": _escaped(text) if text else None,
        "phase": own_phase or phase,
    }


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException:  # format_exception calls methods of the exception, which may raise anything
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(text) <= TRACEBACK_CAP:
        return text
    half = TRACEBACK_CAP // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _escaped(text: str) -> str:
    """Return *text* with lone surrogates, such as from undecodable file names, as escapes."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
