"""The experiment's own process: reads a job, runs it, leaves one file behind.

    python -m pytest_llem.isolation.worker ATTEMPT EVENTS CUE

ATTEMPT is the folder that holds the job, and gets the result; EVENTS the file descriptor on which each step is
announced, a JSON object a line; CUE the one on which it is told to begin, by a byte. Up to then it imports what
the job needs, and opens no device. Then it reads the job again: what was found out meanwhile is in it. Nothing of
pytest is imported here.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pytest_llem.isolation.supervisor import ASK_WHERE

#: Files of an attempt's directory. The last one gets, when the time is up, where each thread is.
JOB, RESULT, ERROR, STACKS = "job.json", "result.json", "error.json", "stacks.txt"

#: Those that go beside the result.
BESIDE = "*.csv"

#: The phases in which something may be downloaded.
FETCHING = ("fetching the dataset", "fetching the model")

#: The phase in which a process has left its file and has only to exit.
DONE = "done"

#: An exception's text crosses up to this many characters.
MESSAGE_CAP = 4_000
TRACEBACK_CAP = 20_000

#: What libraries that raise no MemoryError say where there was no memory.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def main(attempt: str, events: int, cue: int) -> None:
    """Run the job in the directory *attempt*.

    Args:
        attempt: Holds the job; the result goes there.
        events: Each step is announced here: a Progress as a line of JSON.
        cue: It begins once there is a byte; at the end of the file nobody wants it any more.
    """
    for fd in (events, cue):
        os.set_inheritable(fd, False)
    sys.argv[1:] = []  # what is imported may look at them
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a server has imported may have put another in its place
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    directory = Path(attempt)
    stacks = (directory / STACKS).open("w")  # it has to stay open
    faulthandler.enable(file=2)  # whatever has become of sys.stderr
    faulthandler.register(ASK_WHERE, file=stacks)

    latest = "starting"

    def announce(phase: str, **more: Any) -> None:
        nonlocal latest
        latest = phase
        try:
            os.write(events, json.dumps({"phase": phase, **more}).encode() + b"\n")
        except OSError:  # nobody listens any more; the result still counts
            return

    try:
        announce("importing")
        start = {"began_at": _now()}
        make_ready(read_job(directory))
        start["ready_at"] = _now()
        if not os.read(cue, 1):
            return
        run(read_job(directory), start, directory, announce, events)
    except SystemExit:
        raise  # the status tells
    except BaseException as error:
        leave(directory / ERROR, json.dumps(describe(error, latest)))
    _flush()  # what it has said is told before that it is done
    announce(DONE)
    finish()


def finish() -> NoReturn:
    """End as an interpreter does, but do not take its modules apart: with those of torch that takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    _flush()
    os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # anyone may have put anything in their place
            stream.flush()


def read_job(directory: Path) -> dict[str, Any]:
    """Return the job in *directory*."""
    job = json.loads((directory / JOB).read_text(encoding="utf-8"))
    assert isinstance(job, dict)
    return job


def make_ready(job: dict[str, Any]) -> None:
    """Import what *job* needs. What cannot be imported is told by whoever asks for it next."""
    if job["sys_path"] is not None:
        sys.path[:] = job["sys_path"]
    sys.path += [folder for folder in job["python_path"] if folder not in sys.path]
    from pytest_llem.measurement.importing import preload
    from pytest_llem.study.config import ExperimentConfig

    with suppress(Exception):
        preload(ExperimentConfig.model_validate(job["config"]), tuple(map(Path, job["model_path"])))


def run(
    job: dict[str, Any], start: dict[str, str], directory: Path, announce: Callable[..., None], events: int
) -> None:
    """Run *job* and leave its result in *directory*.

    Args:
        job: The job.
        start: When this process began, and when it had imported what it needs: fields of a StartRecord.
        directory: The attempt's.
        announce: Called with each step: the fields of a Progress.
        events: Where that is announced.
    """
    for name, value in job["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if job["hub_unreachable"] is not None:
        from pytest_llem.engines.hub import go_offline

        go_offline(job["hub_unreachable"])
    from pytest_llem.engines.protocol import EngineContext
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
    from pytest_llem.results.carbon import Carbon
    from pytest_llem.results.contention import ContendedRun
    from pytest_llem.results.experiment import GapRecord, Identity, IdlePowerRecord, StartRecord
    from pytest_llem.study.config import ExperimentConfig

    measured = ExperimentOrchestrator(
        config=ExperimentConfig.model_validate(job["config"]),
        identity=Identity.model_validate(job["identity"]),
        context=EngineContext(model_path=tuple(map(Path, job["model_path"]))),
        directory=Path(job["directory"]),
        root=Path(job["root"]) if job["root"] is not None else None,
        carbon=Carbon(**job["carbon"]) if job["carbon"] is not None else None,
        known_idle_power=IdlePowerRecord.model_validate(job["idle_power"]) if job["idle_power"] else None,
        harness=[*job["harness"], os.getppid()],  # the supervisor
        on_progress=lambda progress: announce(**progress.as_event()),
        telemetry_fd=events if job["watched"] else None,
    ).run()
    if measured.result.idle_power is not None:
        measured.result.idle_power = measured.result.idle_power.model_copy(update=job["no_context"])
    if job["repeats"] and measured.result.contention is not None:
        measured.result.contention.repeats = [ContendedRun.model_validate(one) for one in job["repeats"]]
    if job["gap"] is not None:
        measured.result.gap = GapRecord.model_validate(job["gap"])
    measured.result.start = StartRecord.model_validate(start | job["start"])
    for name, text in measured.files().items():
        leave(directory / name, text)
    leave(directory / RESULT, measured.result.model_dump_json(indent=1) + "\n")


def _now() -> str:
    """Return the time as results have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def leave(path: Path, text: str) -> None:
    """Write *text* so that *path* is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def describe(error: BaseException, phase: str) -> dict[str, Any]:
    """Return an exception as plain data: an ErrorRecord."""
    try:
        message = str(error)
    except BaseException:  # it is anyone's
        message = "(its message could not be read)"
    names = {kind.__name__ for kind in type(error).__mro__}
    kind = "exception"
    if "PreflightError" in names:
        kind = "preflight"
    elif not names.isdisjoint({"MemoryError", "OutOfMemoryError"}) or any(one in message for one in _NO_MEMORY):
        kind = "oom"
    text = None if kind == "preflight" else _traceback(error)
    return {
        "kind": kind,
        "type": type(error).__name__,
        "message": _sound(message[:MESSAGE_CAP]),
        "traceback": _sound(text) if text else None,
        "phase": phase,
    }


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException:  # it asks the exception for its message and more
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(text) <= TRACEBACK_CAP:
        return text
    half = TRACEBACK_CAP // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _sound(text: str) -> str:
    """Return *text* with what is no Unicode, such as the bytes of a file name, spelt out."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
