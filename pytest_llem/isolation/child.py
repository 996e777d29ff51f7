"""An experiment's process as the pytest process sees it: its guardian, and the pipes to both."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pytest_llem.isolation import guardian, worker
from pytest_llem.isolation.output import CappedOutput

#: How long a process may take to go once it has been killed. Only one stuck in the kernel takes this long.
REAP_SECONDS = guardian.REAP_SECONDS + 5

#: How long a process that has left its result may take to exit by itself.
GRACE_SECONDS = 10.0

#: How long a dataset, or a model, may take to download. No deadline runs meanwhile.
FETCH_SECONDS = 6 * 3600.0

#: The longest single sleep; poll(2) takes no more than some weeks.
LONGEST_WAIT = 86_400.0

#: Bytes of an unfinished announcement, and characters of a phase, that are kept.
EVENT_CAP, PHASE_CAP = 1 << 16, 80

#: Reads of what is still in the pipes at the end. They hold no more, unless somebody goes on writing.
MOST_LEFTOVERS = 64


class Child:
    """An experiment's process, its guardian, and the reading ends of their pipes.

    Attributes:
        phase: The last one that was announced.
        output: What it has written.
        status: How the process ended, as subprocess has it; None while it has not, or nobody can tell.
        refused: Why it could not be started, or None.
    """

    def __init__(self, on_phase: Callable[[str], None], on_output: Callable[[bytes], None]) -> None:
        self.phase = "starting"
        self.output = CappedOutput()
        self.status: int | None = None
        self.refused: str | None = None
        self._on_phase = on_phase
        self._on_output = on_output
        self._guardian: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._told_status = False
        self._heard = {"events": b"", "reports": b""}
        #: Each reading end, and what takes what comes from it.
        self._sources: dict[int, Callable[[bytes], None]] = {}
        self._reports = -1
        self._fetching_since: float | None = None
        self._fetched_for = 0.0

    def start(
        self, python: str, attempt: Path, environment: Mapping[str, str], lives_with: Sequence[int] = ()
    ) -> None:
        """Start the guardian, which starts the process.

        Args:
            python: The interpreter.
            attempt: The folder that holds the job.
            environment: Its environment variables.
            lives_with: Processes, beside this one, whose end is its end.

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
            # -P: what lies in the current folder is not in the way of the standard library.
            command = [python, "-P", "-m", worker.__name__, str(attempt), str(events)]
            self._guardian = subprocess.Popen(
                guardian.guarded(command, str(attempt), lives_with),
                stdin=subprocess.PIPE,
                stdout=reports,
                stderr=output,
                pass_fds=[events],
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for pytest
            )
        finally:
            for fd in theirs:  # or their ends would never be seen
                os.close(fd)

    def wait(self, timeout: float | None) -> bool:
        """Sleep until all has ended, reading what it says. Return whether the time was up first.

        One that has left its result is given a little longer, and not left to hang in a thread or an exit handler.
        """
        began = time.monotonic()
        limit = math.inf if timeout is None else timeout
        left_result: float | None = None
        while not self._is_over():
            now = time.monotonic()
            if self.phase == worker.DONE and left_result is None:
                left_result = now
            if left_result is not None:
                left = left_result + GRACE_SECONDS - now
            elif self._fetching_since is not None:
                left = self._fetching_since + FETCH_SECONDS - now
            else:
                left = began + self._fetched_for + limit - now
            if left <= 0:
                if left_result is None:
                    self._order(guardian.TIME_IS_UP)
                return left_result is None
            self._read(min(left, LONGEST_WAIT))
        return False

    def end(self) -> None:
        """Have the guardian kill everything, and wait until it has. May be called again."""
        process = self._guardian
        give_up = time.monotonic() + REAP_SECONDS
        if process is not None:
            self._order(guardian.END)
            while not self._is_over() and (left := give_up - time.monotonic()) > 0:
                self._read(left)
            if self.status is None and self._pid is not None:  # the guardian itself was killed, or is stuck
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
        for _ in range(MOST_LEFTOVERS):
            if not self._read(0.0):
                break
        for fd in list(self._sources):
            self._close(fd)

    def _is_over(self) -> bool:
        """Whether the guardian has told that nobody is left, or is gone itself."""
        return self._told_status or self._reports not in self._sources

    def _order(self, order: bytes) -> None:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        with suppress(OSError, ValueError):  # it is gone
            os.write(self._guardian.stdin.fileno(), order)

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

    def _take_output(self, chunk: bytes) -> None:
        self.output.write(chunk)
        self._on_output(chunk)

    def _hear_reports(self, chunk: bytes) -> None:
        for said in self._objects("reports", chunk):
            self._pid = said.get("pid", self._pid)
            if "status" in said:
                self._told_status, self.status = True, said["status"]
            self.refused = said.get("refused", self.refused)

    def _hear_events(self, chunk: bytes) -> None:
        for said in self._objects("events", chunk):
            if not isinstance(phase := said.get("phase"), str):
                continue
            self.phase = phase[:PHASE_CAP]
            if self._fetching_since is not None:
                self._fetched_for += time.monotonic() - self._fetching_since
            self._fetching_since = time.monotonic() if phase in worker.FETCHING else None
            self._on_phase(self.phase)

    def _objects(self, channel: str, chunk: bytes) -> list[dict[str, Any]]:
        """Return the JSON objects, one a line, that *chunk* completes; what is none is not one of ours."""
        *lines, rest = (self._heard[channel] + chunk).split(b"\n")
        self._heard[channel] = rest[-EVENT_CAP:]
        found = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]
