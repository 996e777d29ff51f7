"""Forkservers as the pytest process sees them."""

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

#: How long a server may take to go once it has been told to, in seconds.
END_SECONDS = supervisor.REAP_SECONDS + 5


def current_folder() -> str:
    """Return the current folder, or the root where it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return "/"


#: Keeps libraries from starting threads as they are imported, which a fork would not take along: pyarrow, which
#: pandas and scikit-learn bring, has an allocator that does.
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Server:
    """One forkserver: a :class:`pytest_llem.isolation.starting.Starter`. It is started with its first experiment.

    Args:
        python: The interpreter.
        environment: Its environment variables.

    Attributes:
        folder: Where its experiments' folders go: its supervisor removes it where nobody else is left.
    """

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._python = python
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._said = b""
        self._is_over = False
        self.folder = Path(tempfile.mkdtemp(prefix="llem-"))

    def start(self, ends: ChildPipes, attempt: Path, watch_pids: Sequence[int]) -> SupervisorHandle:
        if self._control is None:
            self._launch(ends.output, watch_pids)
        assert self._control is not None
        told = {"attempt": str(attempt), "watch_pids": list(watch_pids), "directory": current_folder()}
        socket.send_fds(self._control, [json.dumps(told).encode()], ends)
        return _Forked(self)

    def _launch(self, output: int, watch_pids: Sequence[int]) -> None:
        """Start the server. Up to where it serves, what it says is its first experiment's *output*."""
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as undone, theirs:
            undone.callback(control.close)
            command = [self._python, "-P", "-m", forkserver.__name__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                supervisor.supervised(command, str(self.folder), watch_pids),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env={**NO_THREADS, **self._environment},
                start_new_session=True,
            )
            undone.pop_all()
        self._control = control

    @property
    def has_ended(self) -> bool:
        """Whether it can serve no more."""
        if self._process is None:
            return self._is_over
        return not self._listen(0.0) or "status" in self._told()

    def _listen(self, seconds: float) -> bool:
        """Take in what its supervisor tells, for so many seconds at most. Return whether it may yet tell more."""
        assert self._process is not None
        assert self._process.stdout is not None
        give_up = time.monotonic() + seconds
        while select.select([self._process.stdout], [], [], max(0.0, give_up - time.monotonic()))[0]:
            chunk = os.read(self._process.stdout.fileno(), 1 << 12)
            self._said += chunk
            if not chunk:
                return False
        return True

    def _told(self) -> dict[str, Any]:
        """Return what its supervisor has told of it so far."""
        told: dict[str, Any] = {}
        for line in self._said.splitlines():
            with suppress(ValueError):
                told |= json.loads(line)
        return told

    def order(self, order: bytes) -> None:
        """Pass on an order to its supervisor: it and all that it has forked end."""
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), order)

    def end(self) -> None:
        """End it, and all that it has forked, and leave nothing of it. May be called again."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> tuple[int | None, str | None]:
        """End it, and all that it has forked; what these have left stays. May be called again.

        Returns:
            How it ended, as subprocess has it, and why it could not be started; None where neither is known.
        """
        self.order(supervisor.END)
        self._is_over = True
        if (process := self._process) is not None:
            self._listen(END_SECONDS)
            process.kill()
            process.wait()
            self._process = None
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
        if self._control is not None:
            self._control.close()
        told = self._told()
        return told.get("status"), told.get("refused")


class _Forked:
    """A supervisor that a server has been asked to fork."""

    name = "its supervisor or its forkserver"

    def __init__(self, server: Server) -> None:
        self._server = server

    def order(self, order: bytes) -> None:
        self._server.order(order)

    def give_up(self) -> tuple[int | None, str | None]:
        return self._server.stop()

    def kill(self, supervisor: int | None) -> None:
        if supervisor is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(supervisor, signal.SIGKILL)


class Servers:
    """The forkservers of one study: one for each interpreter.

    A new one takes the place of one that has ended, or was started with other environment variables or another
    path to modules.
    """

    def __init__(self) -> None:
        #: Each with what it was started with, by its interpreter; None for this one.
        self._servers: dict[str | None, tuple[str, Server]] = {}
        self._study: str | None = None

    def of(self, study: str) -> Servers:
        """Return them for an experiment of *study*; those of another one are ended first."""
        if study != self._study:
            self.end()
            self._study = study
        return self

    def get(self, python: str | None, environment: Mapping[str, str], path: Sequence[object]) -> Server:
        """Return the server of an interpreter.

        Args:
            python: The interpreter; None for this one.
            environment: Its environment variables.
            path: What leads it to modules, as JSON has it.
        """
        wanted = json.dumps([dict(environment), path], sort_keys=True)
        if python in self._servers:
            had, server = self._servers[python]
            if had == wanted and not server.has_ended:
                return server
            self._end(python)
        server = Server(python or sys.executable, environment)
        self._servers[python] = wanted, server
        return server

    def end(self) -> None:
        """End them all. May be called again, and they may be used again after it."""
        for python in list(self._servers):
            self._end(python)

    def _end(self, python: str | None) -> None:
        self._servers[python][1].end()
        del self._servers[python]
