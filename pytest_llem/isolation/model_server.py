"""Start a model server under a supervisor, wait until it is ready, and stop it with all its descendants."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pytest_llem.isolation import supervisor
from pytest_llem.isolation.child import HEAD_BYTES, TAIL_BYTES, Child
from pytest_llem.isolation.launcher import run_uninterrupted
from pytest_llem.isolation.outcome import ended_by_signal
from pytest_llem.isolation.starting import ChildPipes, Spawned, SupervisorHandle
from pytest_llem.results.manifest_records import ErrorRecord

#: Interval between two checks of a server that starts or stops, in s.
_POLL_SECONDS = 0.1

#: Time limit of one request that checks whether the server is ready, in s.
_REQUEST_SECONDS = 5.0

#: Maximum time from the failure of a server's client to the report that the server has ended, in s.
_END_SECONDS = 5.0

_STARTING = "starting the server"

#: Type of the error that another process listens on the server's port.
PORT_TAKEN = "PortTaken"

#: Name of the file with the server's output, in its folder.
_LOG = "server.log"


class ModelServer:
    """A server that was started for experiments.

    Its output goes to a file: between experiments no process reads a pipe, and a full one would block the server.

    Args:
        command: Program and arguments; the program is searched in the environment's ``PATH``.
        environment: All of its environment variables.
        watch_pids: Processes, besides this one, whose end also ends the server.
        directory: Its current folder; None for this process's.

    Attributes:
        pid: Pid of its first process; None before it runs.
        supervisor_pid: Pid of its supervisor, which has all of its processes as descendants; None before it runs.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        watch_pids: Sequence[int],
        directory: Path | None = None,
    ) -> None:
        self._command, self._environment, self._watch_pids = command, environment, watch_pids
        self._directory = directory
        self._folder: Path | None = None
        self._child: Child | None = None
        #: Files in shared memory that it uses. It cannot remove them if it is killed.
        self._shared: set[str] = set()

    def start(self) -> None:
        """Start it. It is not ready yet.

        Raises:
            OSError: The program was not found, or the system cannot start a process.
        """
        program = shutil.which(self._command[0], path=self._environment.get("PATH"))
        if program is None:
            raise FileNotFoundError(
                f"program not found: {self._command[0]}: install it, or give its path in server.command"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="llem-"))
        self._child = Child(lambda chunk: None)
        with (self._folder / _LOG).open("wb") as log:
            start = partial(self._start, [program, *self._command[1:]], log.fileno())
            self._child.start(start, self._folder, self._watch_pids)

    def _start(
        self, command: Sequence[str], log: int, pipes: ChildPipes, attempt: Path, watch_pids: Sequence[int]
    ) -> SupervisorHandle:
        """Start the supervisor of *command*, whose output goes to the file descriptor *log*."""
        return Spawned(
            subprocess.Popen(
                supervisor.supervisor_command(command, str(attempt), watch_pids),
                stdin=pipes.orders,
                stdout=pipes.reports,
                stderr=log,
                env=self._environment,
                cwd=self._directory,
                start_new_session=True,
            )
        )

    @property
    def pid(self) -> int | None:
        self._read_reports()
        return self._child.pid if self._child is not None else None

    @property
    def supervisor_pid(self) -> int | None:
        self._read_reports()
        return self._child.supervisor_pid if self._child is not None else None

    @property
    def has_ended(self) -> bool:
        """Whether its first process and all descendants have ended."""
        return self._child is None or self._child.is_over()

    def wait_until_ready(
        self, url: str, path: str, timeout: float, refresh: Callable[[], None] = lambda: None
    ) -> ErrorRecord | None:
        """Wait until it answers with status 200 under *path*. Return why it is not ready; None if it is.

        Args:
            url: Its base URL.
            path: The path to ask for.
            timeout: Time limit in s.
            refresh: Called about once a second.
        """
        give_up, refreshed_at = time.monotonic() + timeout, 0.0
        while not self.has_ended:
            if answers(url, path) and not self.has_ended:
                return self._port_error(url)
            if (now := time.monotonic()) > give_up:
                message = (
                    f"the server was not ready after {timeout:g} s: {url}{path} did not answer with status 200 "
                    "(raise server.ready.timeout_seconds)"
                )
                return ErrorRecord(kind="timeout", type="NotReady", message=message, phase=_STARTING)
            if now - refreshed_at >= 1:
                refresh()
                refreshed_at = now
            time.sleep(_POLL_SECONDS)
        return self.error().model_copy(update={"phase": _STARTING})

    def _port_error(self, url: str) -> ErrorRecord | None:
        """Return the error that another process has answered; None if this server has, as far as can be seen."""
        parent, listening = self.supervisor_pid, listening_processes(url)
        own = supervisor.descendants(parent) if parent is not None else []
        if not listening or not set(listening).isdisjoint(own):
            self._shared = supervisor.shared_files(own)
            return None
        message = f"the server's port is in use: process {listening[0]} answers at {url}"
        return ErrorRecord(kind="crash", type=PORT_TAKEN, message=message, phase=_STARTING)

    def ended_within(self, seconds: float = _END_SECONDS) -> bool:
        """Return whether it ends within *seconds*, with all descendants."""
        give_up = time.monotonic() + seconds
        while not self.has_ended and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS / 2)
        return self.has_ended

    def error(self) -> ErrorRecord:
        """Return how it ended."""
        assert self._child is not None
        status, refused = self._child.status, self._child.refused
        if refused is not None:
            message = f"the server could not be started: {refused}"
            return ErrorRecord(kind="crash", type="NotStarted", message=message)
        if status is None:
            return ErrorRecord(kind="crash", type="Unknown", message="the server's supervisor was killed")
        if status >= 0:
            message = f"the server ended with status {status}: its output says why"
            return ErrorRecord(kind="crash", type="Exit", message=message)
        return ended_by_signal(-status, "server")

    def output(self) -> str:
        """Return the head and the tail of what it wrote to standard output and standard error."""
        if self._folder is None:
            return ""
        try:
            with (self._folder / _LOG).open("rb") as log:
                head = log.read(HEAD_BYTES)
                size = log.seek(0, os.SEEK_END)
                left_out = size - len(head) - TAIL_BYTES
                log.seek(len(head) + max(0, left_out))
                tail = log.read()
        except OSError:
            return ""
        gap = f"\n[… {left_out:,} bytes left out …]\n" if left_out > 0 else ""
        return head.decode(errors="replace") + gap + tail.decode(errors="replace")

    def stop(self, grace_seconds: float) -> None:
        """Ask it to end, and kill what is left of it after *grace_seconds*. May be called again."""
        if (pid := self.pid) is not None and not self.has_ended:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
            with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the grace
                self.ended_within(grace_seconds)
        self.end()

    def end(self) -> None:
        """Kill it with all its descendants, and remove its files. May be called again."""
        if self._child is not None:
            run_uninterrupted(self._child.end)
        supervisor.remove_shared_files(self._shared)
        if self._folder is not None:
            run_uninterrupted(partial(shutil.rmtree, self._folder, ignore_errors=True))
            self._folder = None

    def _read_reports(self) -> None:
        if self._child is not None:
            self._child.is_over()


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(url: str, path: str) -> bool:
    """Return whether a server answers with status 200."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with closing(kind(parts.hostname or "", parts.port, timeout=_REQUEST_SECONDS)) as connection:
        try:
            connection.request("GET", parts.path.rstrip("/") + path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def listening_processes(url: str) -> list[int]:
    """Return the pids of the processes that listen on the port of *url* on this host, where they can be seen."""
    port = urlsplit(url).port or (443 if url.startswith("https") else 80)
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []
    return sorted({one.pid for one in listening if one.laddr and one.laddr[1] == port and one.pid is not None})
