"""CPU energy where nothing can be measured: a model, and labelled as one."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence

from pytest_llem.energy.protocol import DeviceReading, MeterUnavailableError, Reading

#: Power of one busy hardware thread, in W: the average maximum per vCPU over a cloud provider's x86 servers
#: in the methodology of Cloud Carbon Footprint.
WATTS_PER_BUSY_THREAD = 3.5

#: What its readings are from.
CPU_TIME_MODEL = "cpu_time_model"


class EstimateMeter:
    """CPU seconds of this process × :data:`WATTS_PER_BUSY_THREAD`.

    Good to a factor of two or three, blind to memory, idle power and everything but this process. It can tell
    that one setup keeps the CPU busier than another, and nothing finer.
    """

    def __init__(self) -> None:
        self._cpu_s = 0.0
        self._began = 0.0

    def open(self, gpus: Sequence[str]) -> None:
        if gpus:
            raise MeterUnavailableError("the estimate knows CPUs only, and the engine runs on a GPU")

    def begin(self) -> None:
        self._cpu_s = _cpu_seconds()
        self._began = time.monotonic()

    def end(self) -> Reading:
        energy_j = (_cpu_seconds() - self._cpu_s) * WATTS_PER_BUSY_THREAD
        seconds = time.monotonic() - self._began
        return Reading((DeviceReading("process", "cpu_package", energy_j, "estimated", CPU_TIME_MODEL),), seconds)

    def close(self) -> None:
        """Nothing was taken."""


def _cpu_seconds() -> float:
    # os.times() counts in steps of 10 ms, too coarse for a short window.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
