"""An experiment's process as the pytest process sees it: its supervisor, and the pipes to both."""

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

#: How long a process may take to go once it has been killed. Only one stuck in the kernel takes this long.
REAP_SECONDS = supervisor.REAP_SECONDS + 5

#: How long a process that has left its result may take to exit by itself.
GRACE_SECONDS = 10.0

#: How long a dataset, or a model, may take to download. No deadline runs meanwhile.
FETCH_SECONDS = 6 * 3600.0

#: The longest single sleep; poll(2) takes no more than some weeks.
MAX_WAIT = 86_400.0

#: Bytes of an unfinished announcement that are kept.
EVENT_CAP = 1 << 16

#: Reads of what is still in the pipes at the end. They hold no more, unless somebody goes on writing.
MAX_LEFTOVERS = 64

#: Bytes of an experiment's output that are kept: of its beginning, and of its end.
HEAD_BYTES = 16_384
TAIL_BYTES = 49_152


class CappedOutput:
    """Keeps the first and the last bytes of what is written to it, and counts the rest.

    Args:
        head: Bytes kept from the beginning.
        tail: Bytes kept from the end, give or take the size of one write.
    """

    def __init__(self, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        self._head_room = head
        self._tail_room = tail
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0

    def write(self, chunk: bytes) -> None:
        """Take *chunk*."""
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
        """Return what was kept, with a line where something is missing."""
        gap = f"\n[… {self._dropped:,} bytes left out …]\n" if self._dropped else ""
        head, tail = (part.decode(errors="replace") for part in (bytes(self._head), b"".join(self._tail)))
        return f"{head}{gap}{tail}"


class Child:
    """An experiment's process, its supervisor, and the reading ends of their pipes.

    Attributes:
        phase: The last one that was announced.
        output: What it has written.
        status: How the process ended, as subprocess has it; None while it has not, or nobody can tell.
        refused: Why it could not be started, or None.
        watcher: Who is told how far it is; None while nobody looks.
    """

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self.phase = "starting"
        self.output = CappedOutput()
        self.status: int | None = None
        self.refused: str | None = None
        self.watcher: Watcher | None = None
        self._on_output = on_output
        self._keeper: SupervisorHandle | None = None
        self._guardian: int | None = None
        self._pid: int | None = None
        self._told_status = False
        self._heard = {"events": b"", "reports": b""}
        #: Each reading end, and what takes what comes from it.
        self._sources: dict[int, Callable[[bytes], None]] = {}
        self._reports = -1
        #: The writing ends: of the supervisor's orders, and of the process's cue.
        self._orders: int | None = None
        self._cue: int | None = None
        self._fetching_since: float | None = None
        self._fetched_for = 0.0

    def start(self, starter: Starter, attempt: Path, watch_pids: Sequence[int] = ()) -> None:
        """Start the supervisor, which starts the process, which waits for its cue.

        Args:
            starter: Starts it.
            attempt: The folder that holds the job.
            watch_pids: Processes, beside this one, whose end is its end.

        Raises:
            OSError: The system has no process, or no pipe, for it.
        """
        theirs: list[int] = []
        try:
            for take in (self._hear_reports, self._take_output, self._hear_events):
                ours, their_end = os.pipe()
                theirs.append(their_end)
                self._sources[ours] = take
                os.set_blocking(ours, False)
            self._reports = next(iter(self._sources))
            reports, output, events = theirs
            orders, self._orders = os.pipe()
            theirs.append(orders)
            cue, self._cue = os.pipe()
            theirs.append(cue)
            self._keeper = starter.start(ChildPipes(orders, reports, output, events, cue), attempt, watch_pids)
        finally:
            for fd in theirs:  # or their ends would never be seen
                os.close(fd)

    def signal_start(self) -> None:
        """Have the process begin."""
        assert self._cue is not None
        with suppress(OSError):  # it is gone
            os.write(self._cue, b"\n")

    def wait(self, timeout: float | None, *, until_done: bool = False) -> bool:
        """Sleep until all has ended, reading what it says. Return whether the time was up first.

        One that has left its result is given a little longer, and not left to hang in a thread or an exit handler.

        Args:
            timeout: Seconds that it has up to there; None for no end.
            until_done: Return as soon as it says that it has left its result, or its error.
        """
        began = time.monotonic()
        limit = math.inf if timeout is None else timeout
        left_result: float | None = None
        while not self._is_over():
            now = time.monotonic()
            if self.phase == worker.DONE and left_result is None:
                if until_done:
                    self._drain()
                    return False
                left_result = now
            if left_result is not None:
                left = left_result + GRACE_SECONDS - now
            elif self._fetching_since is not None:
                left = self._fetching_since + FETCH_SECONDS - now
            else:
                left = began + self._fetched_for + limit - now
            if left <= 0:
                if left_result is None:
                    self._order(supervisor.TIME_IS_UP)
                return left_result is None
            if self.watcher is None:
                self._read(min(left, MAX_WAIT))
            else:
                self._read(min(left, self.watcher.every_s))
                self.watcher.tick()
        return False

    def end(self) -> None:
        """Have the supervisor kill everything, and wait until it has. May be called again."""
        give_up = time.monotonic() + REAP_SECONDS
        if (keeper := self._keeper) is not None:
            self._read(0.0)  # it may have told of itself
            self._order(supervisor.END)
            # Not up to the end of the file: who was forked as the engine was imported may have the pipe, too.
            while not self._is_over() and (left := give_up - time.monotonic()) > 0:
                self._read(left)
            if self.status is None and self._pid is not None:  # the supervisor itself was killed, or is stuck
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            keeper.kill(self._guardian if self._reports in self._sources else None)
            if not self._told_status:
                status, refused = keeper.give_up()
                if self._pid is None:
                    self.status, self.refused = status, self.refused or refused
        self._drain()
        for fd in list(self._sources):
            self._close(fd)
        ends, self._orders, self._cue = (self._orders, self._cue), None, None
        for end in ends:
            if end is not None:
                os.close(end)

    @property
    def keeper(self) -> str:
        """Whose death is its own, in words."""
        return self._keeper.name if self._keeper is not None else ""

    def is_over(self) -> bool:
        """Whether all has ended: looks, and does not wait."""
        self._drain()
        return self._is_over()

    def _is_over(self) -> bool:
        """Whether the supervisor has told that nobody is left, or is gone itself."""
        return self._told_status or self._reports not in self._sources

    def _order(self, order: bytes) -> None:
        if self._orders is not None:
            with suppress(OSError):  # it is gone
                os.write(self._orders, order)
        if self._pid is None and self._keeper is not None:
            self._keeper.order(order)

    def _close(self, fd: int) -> None:
        del self._sources[fd]
        os.close(fd)

    def _read(self, seconds: float) -> bool:
        """Sleep until there is something to read, and take some. Return whether there was."""
        ready = wait(list(self._sources), seconds)
        for fd in ready:
            assert isinstance(fd, int)
            if chunk := os.read(fd, 1 << 16):
                self._sources[fd](chunk)
            else:
                self._close(fd)
        return bool(ready)

    def _drain(self) -> None:
        """Read what is in the pipes."""
        for _ in range(MAX_LEFTOVERS):
            if not self._read(0.0):
                break

    def _take_output(self, chunk: bytes) -> None:
        self.output.write(chunk)
        self._on_output(chunk)

    def _hear_reports(self, chunk: bytes) -> None:
        for said in self._objects("reports", chunk):
            self._pid = said.get("pid", self._pid)
            self._guardian = said.get("supervisor", self._guardian)
            if "status" in said:
                self._told_status, self.status = True, said["status"]
            self.refused = said.get("refused", self.refused)

    def _hear_events(self, chunk: bytes) -> None:
        for said in self._objects("events", chunk):
            if (seen := parse(said)) is None:
                continue
            if isinstance(seen, Progress):
                self.phase = seen.phase
                if self._fetching_since is not None:
                    self._fetched_for += time.monotonic() - self._fetching_since
                self._fetching_since = time.monotonic() if seen.phase in worker.FETCHING else None
            if self.watcher is not None:
                self.watcher.see(seen)

    def _objects(self, channel: str, chunk: bytes) -> list[dict[str, Any]]:
        """Return the JSON objects, one a line, that *chunk* completes; what is none is not one of ours."""
        *lines, rest = (self._heard[channel] + chunk).split(b"\n")
        self._heard[channel] = rest[-EVENT_CAP:]
        found = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]
