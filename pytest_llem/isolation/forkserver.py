"""A process that has imported what experiments need, and forks each of them: they do not import it again.

    python -m pytest_llem.isolation.forkserver CONTROL

CONTROL is a socket. Each message is a request, a JSON object: ``attempt`` is the folder that holds the job,
``watch_pids`` the processes that its supervisor watches, ``directory`` the current one. The file descriptors of
:class:`pytest_llem.isolation.starting.ChildPipes` come with it. The server imports what the job needs, unless it
has already, and forks a supervisor, which forks the experiment's process. From there on everything is as in an
interpreter that was started for it. When the socket is closed the server ends.

The server runs under a supervisor, which ends it, and all that it has forked, whatever it is importing. It opens
no device and has one thread: a process that is forked while there are others may find a lock that nobody lets go
of, and one that inherits a device cannot use it. What makes it otherwise is refused.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pytest_llem.isolation import supervisor, worker
from pytest_llem.isolation.starting import ChildPipes

#: Bytes of a request.
MOST = 1 << 16

#: What a device of NVIDIA's looks like among a process's open files.
_DEVICES = "/dev/nvidia"


class UnfitError(Exception):
    """What was imported keeps this process from being forked; the message says how, and what to do."""


class Begun(NamedTuple):
    """A process that is to be the experiment's: what :func:`pytest_llem.isolation.worker.main` is told."""

    attempt: str
    events: int
    cue: int


def serve(control: socket.socket) -> Begun | None:
    """Serve requests.

    Returns:
        In a process that it has forked, what that is to do. In the server None, once nobody is left to serve.
    """
    forked: set[int] = set()
    known: set[str] = set()
    woken, wake = supervisor.wake_on_child()
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            forked = {pid for pid in forked if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        if control.fileno() not in ready:
            continue
        if (request := _receive(control)) is None:
            return None
        told, ends = request
        try:
            _import(Path(told["attempt"]), ends, known)
        except UnfitError as error:
            refused = {"kind": "preflight", "type": "PreflightError", "message": str(error), "phase": "importing"}
            worker.leave(Path(told["attempt"], worker.ERROR), json.dumps(refused))
            return None
        pid = os.fork()
        if not pid:
            control.close()
            for fd in (woken, wake):
                os.close(fd)
            return _become(told, ends)
        forked.add(pid)
        for fd in ends:
            os.close(fd)


def _receive(control: socket.socket) -> tuple[dict[str, Any], ChildPipes] | None:
    message, fds, _, _ = socket.recv_fds(control, MOST, len(ChildPipes._fields), socket.MSG_CMSG_CLOEXEC)
    return (json.loads(message), ChildPipes(*fds)) if message else None


def _import(attempt: Path, ends: ChildPipes, known: set[str]) -> None:
    """Import what a job needs.

    Args:
        attempt: The folder that holds it.
        ends: What is said meanwhile is the experiment's output.
        known: What has been imported already, and now is.

    Raises:
        UnfitError: This process cannot be forked any more.
    """
    job = worker.read_job(attempt)
    config = job["config"]
    wanted = json.dumps([config["backend"], config["model"], config.get(config["backend"]), job["model_path"]])
    if wanted in known:
        return
    with _saying(ends.output), (attempt / worker.STACKS).open("w") as stacks:
        faulthandler.enable(file=2)  # whatever has become of sys.stderr
        faulthandler.register(supervisor.ASK_WHERE, file=stacks)
        try:
            worker.make_ready(job)
        except BaseException:
            pass  # the experiment's process imports it again, and tells
        finally:
            faulthandler.unregister(supervisor.ASK_WHERE)
            faulthandler.disable()
    if reason := _unfit():
        raise UnfitError(
            f"engine {config['backend']!r} cannot be forked: once it is imported, {reason}; "
            "leave execution.start_method at spawn"
        )
    known.add(wanted)


@contextmanager
def _saying(output: int) -> Iterator[None]:
    """Have what this process says be read from *output*."""
    try:
        for fd in (1, 2):
            os.dup2(output, fd)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # anyone may have put anything in their place
                stream.flush()
        _fall_silent()


def _fall_silent() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)


def _unfit() -> str | None:
    """Return what keeps this process from being forked, None where nothing does."""
    if _threads() > 1:
        _fork_once()
    if (threads := _threads()) > 1:
        return f"there are {threads} threads"
    if devices := sorted({device for device in _open_files() if device.startswith(_DEVICES)}):
        return f"{devices[0]} is open"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised"
    return None


def _fork_once() -> None:
    """Fork a process that ends at once: before any fork OpenBLAS, which numpy brings, ends its idle threads."""
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208
    except OSError:  # no Linux
        return 1


def _open_files() -> Iterator[str]:
    with suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with suppress(OSError):
                yield str(Path(f"/proc/self/fd/{fd}").readlink())


def _become(told: dict[str, Any], ends: ChildPipes) -> Begun:
    """Make this process, just forked, a supervisor, and return in the experiment's process, which that forks."""
    try:
        os.setsid()
        for end, fd in ((ends.orders, 0), (ends.reports, 1), (ends.output, 2)):
            os.dup2(end, fd)
            os.close(end)
        refusal = supervisor.guard(told["attempt"], ",".join(map(str, told["watch_pids"])))
        if refusal is None:
            os._exit(0)
        os.close(refusal)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as an interpreter has them that was started
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # then it is where the server was started
            os.chdir(told["directory"])
        sys.argv[:] = [worker.__file__]
        if "numpy" in sys.modules:  # Python's own generator sees to itself
            sys.modules["numpy"].random.seed()
    except BaseException:
        os._exit(127)
    return Begun(told["attempt"], ends.events, ends.cue)


def main(control: int) -> None:
    """Serve on the socket *control*; in a forked process, run its job."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
        score.write("0")  # where memory runs out an experiment goes
    sys.argv[1:] = []
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    _fall_silent()
    begun = serve(socket.socket(fileno=control))
    if begun is None:
        os._exit(0)  # whatever threads there are
    worker.main(*begun)


if __name__ == "__main__":
    main(int(sys.argv[1]))
