"""Sample GPUs ten times a second, in a process of its own.

    python -P -m pytest_llem.energy.sampler PARENT TELEMETRY_FD UUID=[POWER_SOURCE[+module]] …

The sampler takes no time from the process that it samples for, and does not wait for its GIL. It ends with the
process PARENT, or when its standard input is closed.

Standard output is a file, which cannot block. Each line is a sample of one GPU, a JSON array: the middle of the
call for its power on the monotonic clock in s; the GPU's index on the command line; its power in W; its
temperature in °C; the clocks of its processors and of its memory in MHz; the power of its module in W; the CPU
time of the sampler so far in s. Values are null if they were not read. A last line ``{"failed": …}`` contains the
reason why there are no more samples, unless the sampler was killed or the file cannot be written.

TELEMETRY_FD is the file descriptor of a pipe for the live telemetry: once a second a line with a JSON object,
``power_w`` of all GPUs, if each was read, and ``temperature_c`` of the hottest. It is empty if nothing reads the
telemetry.

Only what NVML needs is imported, because every experiment starts a sampler.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from itertools import count
from typing import Any, cast

from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import MODULE_SCOPE, PowerSource, clocks_mhz, power_w, temperature_c

#: Mean time between two samples of a GPU, in s.
PERIOD_S = 0.1

#: Samples are at different places within their periods: multiples of the golden ratio, modulo 1. Otherwise a load
#: that repeats at the same rate would be sampled at the same phases, and its integral would be wrong, as it was
#: by 12 % on an H200.
GOLDEN = (5**0.5 - 1) / 2

#: One of so many samples of a GPU includes its temperature and clocks: they change slowly, and each costs a call.
#: GPUs do so in different periods, so that all periods take about the same time.
SLOW_EVERY = 5

#: Time between two lines of telemetry, in s.
TELEMETRY_PERIOD_S = 1.0


def main(parent: int, telemetry_fd: int | None, gpus: list[str]) -> None:
    """Sample GPUs until the process *parent* ends.

    Args:
        parent: Pid of the process to sample for.
        telemetry_fd: Pipe for the live telemetry; None if nothing reads it.
        gpus: ``UUID=[POWER_SOURCE[+module]]`` of each GPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of standard input ends the sampler
    end_fds: list[int] = [0]  # readable when the sampler has to end
    with suppress(AttributeError, OSError):  # not Linux, or the parent has ended: standard input ends too
        end_fds.append(os.pidfd_open(parent))
    with Nvml() as nvml:
        if not nvml.is_open:
            _write({"failed": nvml.error})
            return
        requested = [gpu.partition("=") for gpu in gpus]
        handles = [nvml.ask("nvmlDeviceGetHandleByUUID", uuid) for uuid, _, _ in requested]
        telemetry = None if telemetry_fd is None else _Telemetry(telemetry_fd, len(gpus))
        period_began = due = time.monotonic()
        for number in count(1):
            for index, (handle, (_, _, source)) in enumerate(zip(handles, requested, strict=True)):
                slow = (number + index) % SLOW_EVERY == 0
                sample = _sample(nvml, handle, source, index, slow)
                _write(sample)
                if telemetry is not None:
                    telemetry.update(index, watts=sample[2], celsius=sample[3])
            if telemetry is not None:
                telemetry.send(time.monotonic())
            period_began = max(period_began + PERIOD_S, time.monotonic())
            due = period_began + PERIOD_S * (number * GOLDEN % 1)
            ready, _, _ = select.select(end_fds, [], [], max(0.0, due - time.monotonic()))
            if ready or os.getppid() != parent:
                return


def _sample(nvml: Nvml, handle: Any, source: str, index: int, slow: bool) -> list[float | None]:
    name, _, module = source.partition("+")
    power_source = cast(PowerSource, name)
    began = time.monotonic()
    watts = power_w(nvml, handle, power_source) if handle and name else None
    at = (began + time.monotonic()) / 2
    module_watts = power_w(nvml, handle, power_source, MODULE_SCOPE) if handle and module else None
    temperature = temperature_c(nvml, handle) if handle and slow else None
    clocks = clocks_mhz(nvml, handle) if handle and slow else (None, None)
    return [at, index, watts, temperature, *clocks, module_watts, time.process_time()]


class _Telemetry:
    """Writes the GPUs' power and temperature to a pipe, without ever delaying the samples."""

    def __init__(self, fd: int, gpus: int) -> None:
        self._fd = fd
        self._gpus = gpus
        self._due = 0.0
        self._watts: dict[int, float | None] = {}
        self._celsius: dict[int, float] = {}

    def update(self, gpu: int, watts: float | None, celsius: float | None) -> None:
        self._watts[gpu] = watts
        if celsius is not None:
            self._celsius[gpu] = celsius

    def send(self, now: float) -> None:
        status = {}
        watts = [one for one in self._watts.values() if one is not None]
        if len(watts) == self._gpus:
            status["power_w"] = sum(watts)
        if self._celsius:
            status["temperature_c"] = max(self._celsius.values())
        if not status or now < self._due:
            return
        self._due = now + TELEMETRY_PERIOD_S
        with suppress(OSError, ValueError):  # the pipe's reader has ended
            _, has_room, _ = select.select([], [self._fd], [], 0)
            if has_room:  # a writable pipe has room for more than a line
                os.write(self._fd, json.dumps(status).encode() + b"\n")


def _write(line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:])
    except Exception as error:
        with suppress(OSError):
            _write({"failed": f"{type(error).__name__}: {error}"})
        raise
