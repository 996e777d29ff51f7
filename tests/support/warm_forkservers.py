"""Forkservers that are forked from a process which has imported what each experiment needs.

    python -m tests.support.warm_forkservers DESCRIPTOR

forks a forkserver with its supervisor for each request on a socket, until the socket is closed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pytest_llem.isolation import forkserver, supervisor
from pytest_llem.isolation.forkserver_client import NO_THREADS, ForkServer, current_folder
from pytest_llem.measurement import orchestrator  # noqa: F401 (imported by each experiment)
from pytest_llem.results import code_state

ROOT = Path(__file__).parents[2]

#: Beginnings of the names of variables that the loader, the interpreter or the C library reads at its start.
_READ_AT_START = ("LD_", "PYTHON", "LC_", "LANG", "TZ", "GLIBC_", "MALLOC_")

_MAX_BYTES = 1 << 17


class _Process:
    """What a ForkServer uses of a ``Popen``."""

    def __init__(self, pidfd: int, stdin: int, stdout: int) -> None:
        self._pidfd = pidfd
        self.stdin, self.stdout = os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> None:
        select.select([self._pidfd], [], [])
        os.close(self._pidfd)


def launch(server: ForkServer, output: int, watch_pids: Sequence[int]) -> None:
    """Start a forkserver: in place of ``ForkServer._launch``."""
    environment = {**NO_THREADS, **server._environment}
    warm, started_with = _warm()
    if server._python != sys.executable or _read_at_start(environment) != started_with:
        _launch(server, output, watch_pids)
        return
    server._control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (orders, stdin), (stdout, reports) = os.pipe(), os.pipe()
    request = {
        "environment": environment,
        "directory": current_folder(),
        "folder": str(server.folder),
        "watch_pids": ",".join(map(str, watch_pids)),
    }
    fds = [orders, reports, output, server_end.fileno()]
    with server_end:
        socket.send_fds(warm, [json.dumps(request).encode()], fds)
        _, (pidfd,), _, _ = socket.recv_fds(warm, 1, 1)
    for fd in (orders, reports):
        os.close(fd)
    server._process = cast(Any, _Process(pidfd, stdin, stdout))


_launch = ForkServer._launch


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}
    found.pop("PYTHONPATH", None)  # an experiment's sys.path is part of its job
    return found


@functools.cache
def _warm() -> tuple[socket.socket, dict[str, str]]:
    """Start the process that forks forkservers; return its socket, and variables that it has read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {"PYTHONHASHSEED": "0", **os.environ}  # as the launcher has it
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours, _read_at_start(environment)


def _serve(requests: socket.socket) -> None:
    while True:
        message, fds, _, _ = socket.recv_fds(requests, _MAX_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if not message:
            return
        if pid := os.fork():
            pidfd = os.pidfd_open(pid)
            socket.send_fds(requests, [b"."], [pidfd])
            for fd in (pidfd, *fds):
                os.close(fd)
        else:
            requests.close()
            _become(json.loads(message), fds)


def _become(request: dict[str, Any], fds: Sequence[int]) -> None:
    """Turn this process into a forkserver's supervisor, which forks the forkserver."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for end, fd in enumerate(fds[:3]):
        os.dup2(fd, end)
        os.close(fd)
    refusal = supervisor.supervise(request["folder"], request["watch_pids"])
    if refusal is None:
        os._exit(0)
    os.close(refusal)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as at the start of an interpreter
        signal.signal(number, signal.SIG_IGN)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115 (of this output)
    code_state._BEGAN = time.time()
    sys.modules["__main__"] = forkserver
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    forkserver.main(fds[3])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
