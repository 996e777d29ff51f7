"""The sampler: a process of its own that looks at the boards ten times a second.

    python -P -m pytest_llem.energy.sampler PARENT UUID=[POWER_SOURCE] …

It takes no time of the process that it samples for, and does not wait for its interpreter's lock. Standard output
is a file, which never fills up or blocks, and takes an array of JSON a line: :data:`COLUMNS` for every look at a
board. A last line ``{"failed": …}`` says why there are no more. It ends with the process PARENT, or when standard
input is closed.

Nothing is imported but what NVML takes: every experiment starts one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any, cast

from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import PowerSource, clocks_mhz, power_w, temperature_c

#: Of a line: the middle of the call for the power on the monotonic clock in s, the board by its place on the
#: command line, what it drew in W, its temperature in °C, the clocks of its processors and of its memory in MHz
#: (null where it did not tell, or was not asked), and the processor time that the sampler has taken so far in s.
COLUMNS = ("at", "board", "power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz", "cpu_s")

#: From one look to the next, in s.
PERIOD_S = 0.1

#: From one look at temperature and clocks to the next, in s: they change slowly, and each is a call more.
SLOW_PERIOD_S = 0.5


def main(parent: int, boards: list[str]) -> None:
    """Sample *boards* until the process *parent* ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # standard input tells
    ends: list[int] = [0]
    with suppress(AttributeError, OSError):  # no Linux, or gone already: standard input ends
        ends.append(os.pidfd_open(parent))
    with Nvml() as nvml:
        if not nvml.is_open:
            _write({"failed": nvml.error})
            return
        asked = [board.partition("=") for board in boards]
        handles = [nvml.ask("nvmlDeviceGetHandleByUUID", uuid) for uuid, _, _ in asked]
        due = slow_due = time.monotonic()
        while os.getppid() == parent:
            slow = time.monotonic() >= slow_due
            if slow:
                slow_due = time.monotonic() + SLOW_PERIOD_S
            for place, (handle, (_, _, source)) in enumerate(zip(handles, asked, strict=True)):
                _write(_look(nvml, handle, source, place, slow))
            due = max(due + PERIOD_S, time.monotonic())
            ready, _, _ = select.select(ends, [], [], max(0.0, due - time.monotonic()))
            if ready:
                return


def _look(nvml: Nvml, handle: Any, source: str, place: int, slow: bool) -> list[float | None]:
    began = time.monotonic()
    watts = power_w(nvml, handle, cast(PowerSource, source)) if handle and source else None
    at = (began + time.monotonic()) / 2
    temperature = temperature_c(nvml, handle) if handle and slow else None
    clocks = clocks_mhz(nvml, handle) if handle and slow else (None, None)
    return [at, place, watts, temperature, *clocks, time.process_time()]


def _write(line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
