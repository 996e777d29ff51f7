"""An engine that sleeps on some GPUs and records when it had them, for tests of device leases.

Options, beside those of the engine ``noop``:
    gpus: Number of GPUs that it needs.
    folder: Folder in which each process has a file with its times and GPUs. The file's time of modification is the
        last moment at which the process is known to have been alive.
    number: Number of the experiment, for that file.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from noop_engine import NoopEngine, NoopOptions

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs


class BoardOptions(NoopOptions):
    gpus: int = 1
    folder: str | None = None
    number: int = 0

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        return Needs(gpus=self.gpus, sequences=1, compiles=False, seconds=config.n * 0.1)


class BoardEngine(NoopEngine):
    options = BoardOptions

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.gpus = list(context.gpus)
        self._file = Path(self.given["folder"], str(os.getpid())) if self.given.get("folder") else None
        if self._file is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            words = (time.time(), config.engine_section.get("number"), visible, *self.gpus)
            self._file.write_text(" ".join(map(str, words)))
            threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        while True:
            time.sleep(0.02)
            assert self._file is not None
            os.utime(self._file)

    def describe(self) -> EngineRecord:
        return EngineRecord(name="board", device="cuda", device_names=["Scripted"] * len(self.gpus))
