"""Communicate from the pytest process with an experiment's process and its supervisor."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pytest_llem.isolation import supervisor, worker
from pytest_llem.isolation.starting import ChildPipes, Starter, SupervisorHandle
from pytest_llem.measurement.progress import Progress, Watcher, parse

#: Time that the supervisor may take to report the end of a killed process, in s. Only a process stuck in the
#: kernel takes this long.
REAP_SECONDS = supervisor.REAP_SECONDS + 5

#: Time that a process may take to exit after it has written its result, in s.
GRACE_SECONDS = 10.0

#: Time limit of a dataset's or model's download, in s. It does not count towards the deadline.
FETCH_SECONDS = 6 * 3600.0

#: Longest single sleep in s; poll(2) accepts at most some weeks.
MAX_WAIT = 86_400.0

#: Bytes of an unfinished line of events that are kept.
EVENT_CAP = 1 << 16

#: Maximum number of reads to empty the pipes. More are needed only if a process is still writing.
MAX_READS = 64

#: Bytes of an experiment's output that are kept: from its beginning and from its end.
HEAD_BYTES = 16_384
TAIL_BYTES = 49_152


class CappedOutput:
    """Keeps the first and the last bytes that are written to it, and counts the rest.

    Args:
        head: Bytes kept from the beginning.
        tail: Bytes kept from the end, rounded up to whole writes.
    """

    def __init__(self, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        self._head_room = head
        self._tail_room = tail
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0

    def write(self, chunk: bytes) -> None:
        """Add *chunk*."""
        if room := self._head_room - len(self._head):
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk:
            self._tail.append(chunk)
            self._tail_size += len(chunk)
        while self._tail and self._tail_size - len(self._tail[0]) >= self._tail_room:
            oldest = len(self._tail.popleft())
            self._tail_size -= oldest
            self._dropped += oldest

    def text(self) -> str:
        """Return the kept text, with a line in place of dropped bytes."""
        gap = f"\n[… {self._dropped:,} bytes left out …]\n" if self._dropped else ""
        head, tail = (part.decode(errors="replace") for part in (bytes(self._head), b"".join(self._tail)))
        return f"{head}{gap}{tail}"


class Child:
    """An experiment's process, its supervisor, and this process's ends of their pipes.

    Attributes:
        phase: The last announced phase.
        output: What the process has written.
        status: Exit status of the process, as ``Popen.returncode``; None while it runs, or if unknown.
        refused: Why the process could not be started; None if it was.
        watcher: Notified of progress; None for no notification.
        max_load_seconds: Time limit of loading the engine, in s.
    """

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self.phase = "starting"
        self.output = CappedOutput()
        self.status: int | None = None
        self.refused: str | None = None
        self.watcher: Watcher | None = None
        self.max_load_seconds = math.inf
        self._on_output = on_output
        self._handle: SupervisorHandle | None = None
        self._supervisor_pid: int | None = None
        self._pid: int | None = None
        self._has_status = False
        self._buffers = {"events": b"", "reports": b""}
        #: Handler of what a pipe delivers, by the file descriptor of its reading end.
        self._sources: dict[int, Callable[[bytes], None]] = {}
        self._reports = -1
        #: Writing ends of the pipes for the supervisor's orders, and for the lines of :meth:`send`.
        self._orders: int | None = None
        self._start_pipe: int | None = None
        self._fetching_since: float | None = None
        self._fetched_for = 0.0
        self._loading_since: float | None = None

    def start(self, starter: Starter, attempt: Path, watch_pids: Sequence[int] = ()) -> None:
        """Start the supervisor and the process, which then waits for :meth:`send`.

        Args:
            starter: Starts the supervisor.
            attempt: The folder that holds the job.
            watch_pids: Processes, besides this one, whose end also ends the experiment.

        Raises:
            OSError: The system cannot start a process or open a pipe.
        """
        child_ends: list[int] = []
        try:
            for take in (self._take_reports, self._take_output, self._take_events):
                own_end, child_end = os.pipe()
                child_ends.append(child_end)
                self._sources[own_end] = take
                os.set_blocking(own_end, False)
            self._reports = next(iter(self._sources))
            reports, output, events = child_ends
            orders, self._orders = os.pipe()
            child_ends.append(orders)
            start_fd, self._start_pipe = os.pipe()
            child_ends.append(start_fd)
            self._handle = starter(ChildPipes(orders, reports, output, events, start_fd), attempt, watch_pids)
        finally:
            for fd in child_ends:  # an open copy would keep the readers from seeing end of file
                os.close(fd)

    @property
    def pid(self) -> int | None:
        """Pid of the process, which leads a process group; None if it has not been reported."""
        return self._pid

    @property
    def supervisor_pid(self) -> int | None:
        """Pid of the supervisor; None if it has not reported it."""
        return self._supervisor_pid

    @property
    def fetched_seconds(self) -> float:
        """Time that downloads took so far, in s."""
        return self._fetched_for

    def send(self, line: bytes = b"\n") -> None:
        """Send the process a line. The first one makes it begin its job."""
        assert self._start_pipe is not None
        with suppress(OSError):  # the process has ended
            os.write(self._start_pipe, line)

    def wait(
        self,
        timeout: float | None,
        *,
        until: Callable[[], bool] = lambda: False,
        other: Child | None = None,
    ) -> bool:
        """Read the pipes until the process and all its descendants have ended. Return whether it timed out.

        After its result, a process may take only :data:`GRACE_SECONDS`: a thread or an exit handler may hang.

        Args:
            timeout: Time limit in s, up to the result; None for none.
            until: Return as soon as it returns True.
            other: Another process, whose pipes are read meanwhile.
        """
        began, fetched_before = time.monotonic(), self._fetched_for
        limit = math.inf if timeout is None else timeout
        done_at: float | None = None
        while not self.has_ended:
            if until():
                self._empty_pipes()
                return False
            now = time.monotonic()
            if self.phase == worker.DONE and done_at is None:
                done_at = now
            if done_at is not None:
                left = done_at + GRACE_SECONDS - now
            elif self._fetching_since is not None:
                left = self._fetching_since + FETCH_SECONDS - now
            else:
                left = min(began + self._fetched_for - fetched_before + limit - now, self._loading_time_left(now))
            if left <= 0:
                if done_at is None:
                    self._order(supervisor.TIME_IS_UP)
                return done_at is None
            refresh_every_s = MAX_WAIT if self.watcher is None else self.watcher.refresh_every_s
            _read([self, other] if other else [self], min(left, refresh_every_s))
            if self.watcher is not None:
                self.watcher.refresh()
        return False

    @property
    def is_loading_too_long(self) -> bool:
        """Whether the engine is loading, and its time for that is up."""
        return self._loading_time_left(time.monotonic()) <= 0

    def _loading_time_left(self, now: float) -> float:
        return math.inf if self._loading_since is None else self._loading_since + self.max_load_seconds - now

    def end(self) -> None:
        """Have the supervisor kill the process and its descendants, and wait for that. May be called again."""
        give_up = time.monotonic() + REAP_SECONDS
        if (handle := self._handle) is not None:
            _read([self], 0.0)  # the supervisor may have sent its process id
            self._order(supervisor.END)
            # Do not wait for end of file: a process forked while the engine was imported may hold the pipe open.
            while not self.has_ended and (left := give_up - time.monotonic()) > 0:
                _read([self], left)
            if self.status is None and self._pid is not None:  # the supervisor itself was killed, or is stuck
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            handle.kill(self._supervisor_pid if self._reports in self._sources else None)
            if not self._has_status:
                status, refused = handle.give_up()
                if self._pid is None:
                    self.status, self.refused = status, self.refused or refused
        self._empty_pipes()
        for fd in list(self._sources):
            self._close(fd)
        ends, self._orders, self._start_pipe = (self._orders, self._start_pipe), None, None
        for end in ends:
            if end is not None:
                os.close(end)

    @property
    def supervisor_name(self) -> str:
        """For error messages: the processes whose death ends the experiment."""
        return self._handle.name if self._handle is not None else ""

    def is_over(self) -> bool:
        """Return, without waiting, whether the process and all its descendants have ended."""
        self._empty_pipes()
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the supervisor has reported the end, or has ended itself, as far as the pipes were read."""
        return self._has_status or self._reports not in self._sources

    def _order(self, order: bytes) -> None:
        if self._orders is not None:
            with suppress(OSError):  # the supervisor has ended
                os.write(self._orders, order)
        if self._pid is None and self._handle is not None:
            self._handle.order(order)

    def _close(self, fd: int) -> None:
        del self._sources[fd]
        os.close(fd)

    def _empty_pipes(self) -> None:
        """Read what is left in the pipes."""
        for _ in range(MAX_READS):
            if not _read([self], 0.0):
                break

    def _take_output(self, chunk: bytes) -> None:
        self.output.write(chunk)
        self._on_output(chunk)

    def _take_reports(self, chunk: bytes) -> None:
        for message in self._objects("reports", chunk):
            self._pid = message.get("pid", self._pid)
            self._supervisor_pid = message.get("supervisor", self._supervisor_pid)
            if "status" in message:
                self._has_status, self.status = True, message["status"]
            self.refused = message.get("refused", self.refused)

    def _take_events(self, chunk: bytes) -> None:
        for message in self._objects("events", chunk):
            if (seen := parse(message)) is None:
                continue
            if isinstance(seen, Progress):
                self.phase = seen.phase
                if self._fetching_since is not None:
                    self._fetched_for += time.monotonic() - self._fetching_since
                self._fetching_since = time.monotonic() if seen.phase in worker.FETCHING else None
                if seen.phase == worker.LOADING:
                    self._loading_since = time.monotonic()
                elif seen.phase in (worker.LOADED, worker.DONE):
                    self._loading_since = None
            if self.watcher is not None:
                self.watcher.see(seen)

    def _objects(self, channel: str, chunk: bytes) -> list[dict[str, Any]]:
        """Return the JSON objects, one a line, that *chunk* completes; other lines are dropped."""
        *lines, rest = (self._buffers[channel] + chunk).split(b"\n")
        self._buffers[channel] = rest[-EVENT_CAP:]
        found = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]


def _read(children: Sequence[Child], seconds: float) -> bool:
    """Wait up to *seconds* for input and read once from each ready pipe. Return whether any was ready."""
    owners = {fd: child for child in children for fd in child._sources}
    ready = wait(list(owners), seconds)
    for fd in ready:
        assert isinstance(fd, int)
        child = owners[fd]
        if chunk := os.read(fd, 1 << 16):
            child._sources[fd](chunk)
        else:
            child._close(fd)
    return bool(ready)
