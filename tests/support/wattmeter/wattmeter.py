"""A third-party meter, such as a wattmeter at the wall socket, with constant power.

The environment variable WATTMETER_FAILS names the method that fails. WATTMETER_LOG is a file to which each call is
appended as a line. WATTMETER_SHOWS is another power in W.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from pytest_llem.energy.protocol import DeviceReading, PowerSample, Reading

WATTS = 230.5

#: Relative gain error, from the data sheet.
GAIN_ERROR = 0.02

#: Interval between new values, in s.
PERIOD_S = 0.01


class Wattmeter:
    def open(self, gpus: Any) -> None:
        self._asked("open")

    def begin(self) -> None:
        self._asked("begin")
        self.began = time.monotonic()

    def end(self) -> Any:
        self._asked("end")
        seconds = time.monotonic() - self.began
        watts = float(os.environ.get("WATTMETER_SHOWS", WATTS))
        socket = DeviceReading(
            device="socket-1",
            boundary="wall",
            energy_j=watts * seconds,
            method="sampled",
            source="wattmeter_power",
            seconds=seconds,
            uncertainty_j=WATTS * PERIOD_S * math.sqrt(2 / 12),
            gain_error=GAIN_ERROR,
        )
        samples = (PowerSample(at=self.began, device="socket-1", power_w=WATTS),)
        return Reading((socket,), seconds, samples=samples, harness_cpu_seconds=0.125)

    def close(self) -> None:
        self._asked("close")

    def _asked(self, what: Any) -> None:
        if log := os.environ.get("WATTMETER_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{what}\n")
        if what == os.environ.get("WATTMETER_FAILS"):
            raise ConnectionError(f"{what}: no answer from /dev/ttyUSB0")
