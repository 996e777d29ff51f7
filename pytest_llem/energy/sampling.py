"""A running sampler, as its parent sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress

from pytest_llem.energy import sampler
from pytest_llem.energy.gpu_source import GpuMeterSource
from pytest_llem.energy.protocol import PowerSample

#: How long the sampler may take to its first look, and to its end, in s.
START_S, END_S = 5.0, 1.0

_PAUSE_S = 0.005


class Sampling:
    """Starts a sampler and reads what it sees. Whatever befalls it raises nothing here.

    Its samples go through a file without a name, so that none is left behind whoever is killed.

    Args:
        boards: What is to be sampled.
        show_on: The pipe on which the sampler shows what the boards are like; None where nobody looks.

    Attributes:
        samples: What was read of it and not yet forgotten, in order of time.
    """

    def __init__(self, boards: Sequence[GpuMeterSource], show_on: int | None = None) -> None:
        self._boards = [board.uuid for board in boards]
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None
        self._rest = b""
        self._offset = 0
        self._cpu: list[tuple[float, float]] = []
        self.samples: list[PowerSample] = []
        asked = [f"{one.uuid}={one.source or ''}{'+module' * one.reads_module}" for one in boards]
        shown = "" if show_on is None else str(show_on)
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open until close
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", sampler.__name__, str(os.getpid()), shown, *asked],
                stdin=subprocess.PIPE,
                stdout=self._file,
                stderr=subprocess.DEVNULL,
                pass_fds=() if show_on is None else [show_on],
            )
        except OSError as error:
            self._failure = str(error)

    @property
    def failure(self) -> str | None:
        """Why there are no more samples; None while it runs."""
        if self._process is not None and self._failure is None and (status := self._process.poll()) is not None:
            ended = f"signal {-status}" if status < 0 else f"status {status}"
            self.read()  # it may have said why
            self._failure = self._failure or ended
        return f"the sampler ended: {self._failure}" if self._failure is not None else None

    def wait(self) -> None:
        """Wait until it has looked at every board, or has failed."""
        give_up = time.monotonic() + START_S
        while self.failure is None and time.monotonic() < give_up:
            self.read()
            if len(self.samples) >= len(self._boards):
                return
            time.sleep(_PAUSE_S)

    def read(self) -> None:
        """Take in what it has seen since the last time."""
        if self._process is None:
            return
        size = os.fstat(self._file.fileno()).st_size
        # Not read(): the sampler writes at the position that both share.
        found = self._rest + os.pread(self._file.fileno(), size - self._offset, self._offset)
        self._offset = size
        *lines, self._rest = found.split(b"\n")
        for line in lines:
            told = json.loads(line)
            if isinstance(told, dict):
                self._failure = str(told["failed"])
            else:
                at, place, *seen, cpu_s = told
                self.samples.append(PowerSample(at, self._boards[place], *seen))
                self._cpu.append((at, cpu_s))

    def forget(self) -> None:
        """Forget all but the last look at each board: a new window begins."""
        self.read()
        keep = len(self._boards)
        self.samples, self._cpu = self.samples[-keep:], self._cpu[-keep:]

    def cpu_seconds(self, began: float, ended: float) -> float | None:
        """Return the processor time that it took between two instants; None where it has failed."""
        if self.failure is not None or not self._cpu:
            return None
        first, last = (bisect_right(self._cpu, at, key=lambda one: one[0]) for at in (began, ended))
        return self._cpu[max(last - 1, 0)][1] - self._cpu[max(first - 1, 0)][1]

    def close(self) -> None:
        """End it. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # it is stuck in the driver
                process.wait(END_S)
        self._file.close()
