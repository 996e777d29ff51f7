"""Import once what experiments need, and fork a process for each experiment.

    python -m pytest_llem.isolation.forkserver CONTROL

CONTROL is a socket. Each message is a request, a JSON object: ``attempt`` is the folder that holds the job,
``watch_pids`` are the processes that its supervisor watches, and ``directory`` is the current folder. The file
descriptors of :class:`pytest_llem.isolation.starting.ChildPipes` are sent along. The server imports what the job
needs, unless it already has, and forks a supervisor, which forks the experiment's process. From there on, the
process works as in an interpreter of its own. The server ends when the socket is closed.

The server runs under a supervisor of its own, which can end it and all that it has forked at any time, also during
imports. It has one thread and opens no device: a lock that another thread holds during a fork is never released in
the child, and a child cannot use an inherited device. An engine whose import breaks either rule is refused.
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
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pytest_llem.isolation import supervisor, worker
from pytest_llem.isolation.starting import ChildPipes

#: Maximum size of a request in bytes.
MAX_REQUEST_BYTES = 1 << 16

#: Prefix of the device files of NVIDIA GPUs.
_DEVICES = "/dev/nvidia"


class UnfitError(Exception):
    """An import has made this process unfit for forking. The message says why and what to do."""


class WorkerArguments(NamedTuple):
    """Arguments of :func:`pytest_llem.isolation.worker.main` in a forked process."""

    attempt: str
    events: int
    start: int


def serve(control: socket.socket) -> WorkerArguments | None:
    """Serve requests until the socket is closed.

    Returns:
        In a forked process, the arguments of its job. In the server, None once the socket is closed or an
        import has made it unfit for forking.
    """
    forked: set[int] = set()
    imported: set[str] = set()
    woken, wake = supervisor.wake_on_child()
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            forked = {pid for pid in forked if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        if control.fileno() not in ready:
            continue
        if (received := _receive(control)) is None:
            return None
        request, pipes = received
        try:
            _import(Path(request["attempt"]), pipes, imported)
        except UnfitError as error:
            refused = {"kind": "preflight", "type": "PreflightError", "message": str(error), "phase": "importing"}
            worker.write_whole(Path(request["attempt"], worker.ERROR), json.dumps(refused))
            return None
        pid = os.fork()
        if not pid:
            control.close()
            for fd in (woken, wake):
                os.close(fd)
            return _become_supervisor(request, pipes)
        forked.add(pid)
        for fd in pipes:
            os.close(fd)


def _receive(control: socket.socket) -> tuple[dict[str, Any], ChildPipes] | None:
    message, fds, _, _ = socket.recv_fds(
        control, MAX_REQUEST_BYTES, len(ChildPipes._fields), socket.MSG_CMSG_CLOEXEC
    )
    return (json.loads(message), ChildPipes(*fds)) if message else None


def _import(attempt: Path, pipes: ChildPipes, imported: set[str]) -> None:
    """Import what a job needs.

    Args:
        attempt: The folder that holds the job.
        pipes: Pipes of the experiment, which gets the output of the import.
        imported: Keys of what has been imported; updated.

    Raises:
        UnfitError: The import has made this process unfit for forking.
    """
    job = worker.read_job(attempt)
    config = job["config"]
    key = json.dumps([config["backend"], config["model"], config.get(config["backend"]), job["model_path"]])
    if key in imported:
        return
    with _output_to(pipes.output), (attempt / worker.STACKS).open("w") as stacks:
        faulthandler.enable(file=2)  # sys.stderr may have been replaced
        faulthandler.register(supervisor.DUMP_STACKS, file=stacks)
        try:
            worker.import_needed(job)
        except BaseException:
            pass  # the experiment's process imports it again and reports the error
        finally:
            faulthandler.unregister(supervisor.DUMP_STACKS)
            faulthandler.disable()
    if reason := _unfit():
        raise UnfitError(
            f"engine {config['backend']!r} cannot be forked: once it is imported, {reason}; "
            "leave execution.start_method at spawn"
        )
    imported.add(key)


@contextmanager
def _output_to(output: int) -> Iterator[None]:
    """Redirect this process's output to the file descriptor *output*."""
    try:
        for fd in (1, 2):
            os.dup2(output, fd)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # an engine may have replaced the stream by any object
                stream.flush()
        _discard_output()


def _discard_output() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)


def _unfit() -> str | None:
    """Return why this process is unfit for forking; None if it is fit."""
    if _threads() > 1:
        _fork_once()
    if (threads := _threads()) > 1:
        known = ", ".join(one.name for one in threading.enumerate() if one is not threading.main_thread())
        return f"there are {threads} threads" + (f" ({known})" if known else "")
    if devices := sorted({device for device in _open_files() if device.startswith(_DEVICES)}):
        return f"{devices[0]} is open"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised"
    return None


def _fork_once() -> None:
    """Fork a process that ends at once. Before any fork, OpenBLAS, which numpy loads, ends its idle threads."""
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208
    except OSError:  # not Linux
        return 1


def _open_files() -> Iterator[str]:
    with suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with suppress(OSError):
                yield str(Path(f"/proc/self/fd/{fd}").readlink())


def _become_supervisor(request: dict[str, Any], pipes: ChildPipes) -> WorkerArguments:
    """Turn this process into a supervisor, which forks the experiment's process. Return only in the latter."""
    try:
        os.setsid()
        for end, fd in ((pipes.orders, 0), (pipes.reports, 1), (pipes.output, 2)):
            os.dup2(end, fd)
            os.close(end)
        report_fd = supervisor.supervise(request["attempt"], ",".join(map(str, request["watch_pids"])))
        if report_fd is None:
            os._exit(0)
        os.close(report_fd)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as at the start of an interpreter
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # the server's folder then stays the current one
            os.chdir(request["directory"])
        sys.argv[:] = [worker.__file__]
        if "numpy" in sys.modules:  # Python reseeds its own generator after a fork, numpy does not
            sys.modules["numpy"].random.seed()
    except BaseException:
        os._exit(127)
    return WorkerArguments(request["attempt"], pipes.events, pipes.start)


def main(control: int) -> None:
    """Serve on the socket *control*. In a forked process, run its job."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
        score.write("0")  # if memory runs out, the kernel kills an experiment and not the server
    sys.argv[1:] = []
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    _discard_output()
    arguments = serve(socket.socket(fileno=control))
    if arguments is None:
        os._exit(0)  # do not wait for threads
    worker.main(*arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]))
