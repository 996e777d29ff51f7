"""The sampler: a process of its own that looks at the boards ten times a second.

    python -P -m pytest_llem.energy.sampler PARENT SHOWN UUID=[POWER_SOURCE[+module]] …

It takes no time of the process that it samples for, and does not wait for its interpreter's lock. It ends with the
process PARENT, or when standard input is closed.

Standard output is a file, which never fills up or blocks, and takes an array of JSON a line, for every look at a
board: the middle of the call for its power on the monotonic clock in s; the board, by its place on the command
line; what it drew in W; its temperature in °C; the clocks of its processors and of its memory in MHz; what its
module drew in W (null where it did not tell, or was not asked); the processor time that the sampler has taken so
far in s. A last line ``{"failed": …}`` says why there are no more.

SHOWN is the file descriptor of a pipe that takes once a second what the boards are like, an object of JSON a line:
``power_w`` of all of them, ``temperature_c`` of the hottest. It is empty where nobody looks.

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
from itertools import count
from typing import Any, cast

from pytest_llem.hardware.nvml import Nvml
from pytest_llem.hardware.sensors import MODULE_SCOPE, PowerSource, clocks_mhz, power_w, temperature_c

#: From one look to the next, in s.
PERIOD_S = 0.1

#: Every so many looks at a board are also for its temperature and clocks: they change slowly, and each is a call
#: more. The boards take turns, so that no round takes much longer than the others.
SLOW_EVERY = 5

#: From one word to whoever looks on to the next, in s.
SHOW_S = 1.0


def main(parent: int, shown: int | None, boards: list[str]) -> None:
    """Sample *boards* until the process *parent* ends, and show them on the pipe *shown*."""
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
        show = None if shown is None else _Show(shown)
        due = time.monotonic()
        for number in count():
            for place, (handle, (_, _, source)) in enumerate(zip(handles, asked, strict=True)):
                slow = (number + place) % SLOW_EVERY == 0
                seen = _look(nvml, handle, source, place, slow)
                _write(seen)
                if show is not None:
                    show.take(place, watts=seen[2], celsius=seen[3])
            if show is not None:
                show.tell(due)
            due = max(due + PERIOD_S, time.monotonic())
            ready, _, _ = select.select(ends, [], [], max(0.0, due - time.monotonic()))
            if ready or os.getppid() != parent:
                return


def _look(nvml: Nvml, handle: Any, source: str, place: int, slow: bool) -> list[float | None]:
    name, _, module = source.partition("+")
    power_source = cast(PowerSource, name)
    began = time.monotonic()
    watts = power_w(nvml, handle, power_source) if handle and name else None
    at = (began + time.monotonic()) / 2
    module_watts = power_w(nvml, handle, power_source, MODULE_SCOPE) if handle and module else None
    temperature = temperature_c(nvml, handle) if handle and slow else None
    clocks = clocks_mhz(nvml, handle) if handle and slow else (None, None)
    return [at, place, watts, temperature, *clocks, module_watts, time.process_time()]


class _Show:
    """Tells whoever looks on what the boards are like. The samples never wait for that."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._due = 0.0
        self._watts: dict[int, float] = {}
        self._celsius: dict[int, float] = {}

    def take(self, board: int, watts: float | None, celsius: float | None) -> None:
        if watts is not None:
            self._watts[board] = watts
        if celsius is not None:
            self._celsius[board] = celsius

    def tell(self, now: float) -> None:
        told = {}
        if self._watts:
            told["power_w"] = sum(self._watts.values())
        if self._celsius:
            told["temperature_c"] = max(self._celsius.values())
        if not told or now < self._due:
            return
        self._due = now + SHOW_S
        with suppress(OSError, ValueError):  # nobody looks any more
            _, has_room, _ = select.select([], [self._fd], [], 0)
            if has_room:  # for more than a line
                os.write(self._fd, json.dumps(told).encode() + b"\n")


def _write(line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:])
