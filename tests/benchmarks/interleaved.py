"""The engine of ``throughput.py``: alternates its passes with those of another process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig

NAME = "interleaved:InterleavedEngine"

#: Files in the shared folder: a FIFO for each process, and the times of this engine.
INSIDE, SCRIPT, FOUND = "inside", "script", "found.json"

#: Byte in a FIFO: run the next pass, or stop.
GO, STOP = b".", b"x"


class InterleavedOptions(PyTorchConfig):
    """The options of ``pytorch``, and ``folder``."""

    folder: str


class InterleavedEngine(PyTorchEngine):
    """Times each pass of the window, from its seed until the device is idle, and then lets the other process run.

    Its options are those of ``pytorch``, and ``folder``, which holds the FIFOs.
    """

    options = InterleavedOptions

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self._folder = Path(config.engine_section["folder"])
        self._in_window, self._began = False, 0.0
        self._seconds: list[float] = []
        self._cpu_seconds = 0.0

    def reset_peak_memory(self) -> None:
        super().reset_peak_memory()  # the last call before the window
        self._own, self._other = (os.open(self._folder / name, os.O_RDWR) for name in (INSIDE, SCRIPT))
        self._in_window, self._cpu_seconds = True, -time.process_time()

    def seed(self, seed: int) -> None:
        if self._in_window:
            os.read(self._own, 1)
            self._began = time.perf_counter()
        super().seed(seed)

    def synchronize(self) -> None:
        super().synchronize()
        if self._began:
            self._seconds.append(time.perf_counter() - self._began)
            self._began = 0.0
            os.write(self._other, GO)

    def peak_memory_bytes(self) -> int | None:
        self._in_window = False  # the first call after the window
        self._cpu_seconds += time.process_time()
        os.write(self._other, STOP)
        found = {"seconds": self._seconds, "cpu_seconds": self._cpu_seconds}
        (self._folder / FOUND).write_text(json.dumps(found))
        return super().peak_memory_bytes()
