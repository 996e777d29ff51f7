"""Start, use and end forkservers from the pytest process."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pytest_llem.isolation import forkserver, supervisor
from pytest_llem.isolation.starting import ChildPipes, SupervisorHandle

#: Time that a forkserver may take to end after the order to end, in s.
END_SECONDS = supervisor.REAP_SECONDS + 5

#: Keeps libraries from starting threads on import, which would not survive a fork: pandas and scikit-learn import
#: pyarrow, whose allocator starts one.
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


def current_folder() -> str:
    """Return the current folder; ``/`` if it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return "/"


class ForkServer:
    """One forkserver. It is started with its first experiment.

    Args:
        python: The interpreter.
        environment: Its environment variables.

    Attributes:
        folder: Holds the experiments' folders. The server's supervisor removes it if the pytest process is killed.
    """

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._python = python
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._output = b""
        self._was_stopped = False
        self.folder = Path(tempfile.mkdtemp(prefix="llem-"))

    def start(self, pipes: ChildPipes, attempt: Path, watch_pids: Sequence[int]) -> SupervisorHandle:
        """Have the server fork an experiment's supervisor: a :data:`pytest_llem.isolation.starting.Starter`."""
        if self._control is None:
            self._launch(pipes.output, watch_pids)
        assert self._control is not None
        request = {"attempt": str(attempt), "watch_pids": list(watch_pids), "directory": current_folder()}
        socket.send_fds(self._control, [json.dumps(request).encode()], pipes)
        return _Forked(self)

    def _launch(self, output: int, watch_pids: Sequence[int]) -> None:
        """Start the server. Until it serves, it writes to the *output* of its first experiment."""
        control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as on_error, server_end:
            on_error.callback(control.close)
            command = [self._python, "-P", "-m", forkserver.__name__, str(server_end.fileno())]
            self._process = subprocess.Popen(
                supervisor.supervisor_command(command, str(self.folder), watch_pids),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=[server_end.fileno()],
                env={**NO_THREADS, **self._environment},
                start_new_session=True,
            )
            on_error.pop_all()
        self._control = control

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended and can serve no more."""
        if self._process is None:
            return self._was_stopped
        return not self._read_reports(0.0) or "status" in self._reports()

    def _read_reports(self, seconds: float) -> bool:
        """Read the reports of the server's supervisor for at most *seconds*. Return whether more may follow."""
        assert self._process is not None
        assert self._process.stdout is not None
        give_up = time.monotonic() + seconds
        while select.select([self._process.stdout], [], [], max(0.0, give_up - time.monotonic()))[0]:
            chunk = os.read(self._process.stdout.fileno(), 1 << 12)
            self._output += chunk
            if not chunk:
                return False
        return True

    def _reports(self) -> dict[str, Any]:
        """Return all fields that the server's supervisor has reported so far."""
        reports: dict[str, Any] = {}
        for line in self._output.splitlines():
            with suppress(ValueError):
                reports |= json.loads(line)
        return reports

    def order(self, order: bytes) -> None:
        """Send an order to the server's supervisor, which ends the server and all that it has forked."""
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), order)

    def end(self) -> None:
        """End the server and all that it has forked, and remove its folder. May be called again."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> tuple[int | None, str | None]:
        """End the server and all that it has forked, and keep its folder. May be called again.

        Returns:
            Its status, as ``Popen.returncode``, and why it could not be started; None for what is unknown.
        """
        self.order(supervisor.END)
        self._was_stopped = True
        if (process := self._process) is not None:
            self._read_reports(END_SECONDS)
            process.kill()
            process.wait()
            self._process = None
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
        if self._control is not None:
            self._control.close()
        reports = self._reports()
        return reports.get("status"), reports.get("refused")


class _Forked:
    """Handle of a supervisor that a server was asked to fork."""

    name = "its supervisor or its forkserver"

    def __init__(self, server: ForkServer) -> None:
        self._server = server

    def order(self, order: bytes) -> None:
        self._server.order(order)

    def give_up(self) -> tuple[int | None, str | None]:
        return self._server.stop()

    def kill(self, supervisor: int | None) -> None:
        if supervisor is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(supervisor, signal.SIGKILL)


class ForkServers:
    """The forkservers of one study: one for each interpreter.

    A server is replaced if it has ended, or if environment variables or ``sys.path`` have changed since its start.
    """

    def __init__(self) -> None:
        #: Start parameters and server by interpreter; the key None is this interpreter.
        self._forkservers: dict[str | None, tuple[str, ForkServer]] = {}
        self._study: str | None = None

    def of(self, study: str) -> ForkServers:
        """Return the servers for *study*, and end those of another study first."""
        if study != self._study:
            self.end()
            self._study = study
        return self

    def get(self, python: str | None, environment: Mapping[str, str], path: Sequence[object]) -> ForkServer:
        """Return the server of an interpreter.

        Args:
            python: The interpreter; None for this one.
            environment: Its environment variables.
            path: Where it finds modules, as JSON values.
        """
        wanted = json.dumps([dict(environment), path], sort_keys=True)
        if python in self._forkservers:
            started_with, server = self._forkservers[python]
            if started_with == wanted and not server.has_ended:
                return server
            self._end(python)
        server = ForkServer(python or sys.executable, environment)
        self._forkservers[python] = wanted, server
        return server

    def end(self) -> None:
        """End all forkservers. May be called again; :meth:`get` starts new ones."""
        for python in list(self._forkservers):
            self._end(python)

    def _end(self, python: str | None) -> None:
        self._forkservers[python][1].end()
        del self._forkservers[python]
