"""Start a sampler process, and read its samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from pytest_llem.energy import sampler
from pytest_llem.energy.gpu import MeteredGpu
from pytest_llem.energy.protocol import PowerSample

#: Longest time to wait for the sampler's first samples, and for its end, in s.
START_S, END_S = 5.0, 1.0

_PAUSE_S = 0.005


class SamplerProcess:
    """Starts a sampler process and reads its samples. If the sampler fails, nothing is raised.

    The samples go through an unnamed file, so that no file is left behind if a process is killed.

    Args:
        gpus: GPUs to sample.
        telemetry_fd: Pipe for the live telemetry of the sampler; None if nothing reads it.

    Attributes:
        samples: Samples kept by the last :meth:`forget`, and those read since, in order of time.
    """

    def __init__(self, gpus: Sequence[MeteredGpu], telemetry_fd: int | None = None) -> None:
        self._gpus = [gpu.uuid for gpu in gpus]
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None
        self._rest = b""
        self._offset = 0
        self._cpu: list[tuple[float, float]] = []  # time of each sample, and CPU time until then, in s
        self.samples: list[PowerSample] = []
        requested = [f"{one.uuid}={one.source or ''}{'+module' * one.reads_module}" for one in gpus]
        telemetry = "" if telemetry_fd is None else str(telemetry_fd)
        try:
            with ExitStack() as on_failure:
                self._file = on_failure.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", sampler.__name__, str(os.getpid()), telemetry, *requested],
                    stdin=subprocess.PIPE,
                    stdout=self._file,
                    stderr=subprocess.DEVNULL,
                    pass_fds=() if telemetry_fd is None else [telemetry_fd],
                )
                on_failure.pop_all()
        except OSError as error:
            self._failure = f"the sampler could not be started: {error}"

    @property
    def failure(self) -> str | None:
        """Why there are no more samples; None while the sampler runs."""
        if self._process is not None and self._failure is None and (status := self._process.poll()) is not None:
            self.read()  # the last line may contain the reason
            ended = f"signal {-status}" if status < 0 else f"status {status}"
            self._failure = self._failure or f"the sampler ended: {ended}"
        return self._failure

    def wait(self) -> None:
        """Wait until the sampler has sampled every GPU or failed, for at most :data:`START_S`."""
        give_up = time.monotonic() + START_S
        while self.failure is None and time.monotonic() < give_up:
            self.read()
            if len(self.samples) >= len(self._gpus):
                return
            time.sleep(_PAUSE_S)

    def read(self) -> None:
        """Read the sampler's new samples."""
        if self._process is None:
            return
        size = os.fstat(self._file.fileno()).st_size
        # read() would move the file position, which the sampler shares and writes at.
        data = self._rest + os.pread(self._file.fileno(), size - self._offset, self._offset)
        self._offset = size
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if isinstance(message, dict):
                self._failure = f"the sampler ended: {message['failed']}"
            else:
                at, index, *values, cpu_s = message
                self.samples.append(PowerSample(at, self._gpus[index], *values))
                self._cpu.append((at, cpu_s))

    def forget(self) -> None:
        """Forget all samples but the last of each GPU, with which the next window's integral starts."""
        self.read()
        keep = len(self._gpus)
        self.samples, self._cpu = self.samples[-keep:], self._cpu[-keep:]

    def cpu_seconds(self, began: float, ended: float) -> float | None:
        """Return the sampler's CPU time between two instants, in s; None if it has failed or has no samples."""
        if self.failure is not None or not self._cpu:
            return None
        first, last = (bisect_right(self._cpu, at, key=lambda one: one[0]) for at in (began, ended))
        return self._cpu[max(last - 1, 0)][1] - self._cpu[max(first - 1, 0)][1]

    def close(self) -> None:
        """End the sampler. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a call to the driver may hang even when killed
                process.wait(END_S)
        self._file.close()
