"""Faulty engines: the engine ``pytorch`` with another ``generate``."""

from __future__ import annotations

import os
import signal
import time

import torch

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import Batch, Generated, PyTorchEngine
from pytest_llem.study.config import ExperimentConfig


class Idle(PyTorchEngine):
    """Loads the model, and sleeps for a second instead of generating."""

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.latency_unknown_reason = "nothing is generated"

    def generate(self, batch: Batch) -> Generated:
        time.sleep(1.0)
        shape = len(batch.lengths), self._config.workload.output_len
        return Generated(torch.zeros(shape, dtype=torch.long), time.monotonic(), [])


class Raises(PyTorchEngine):
    def generate(self, batch: Batch) -> Generated:
        super().generate(batch)
        raise RuntimeError("as it should")


class Dies(PyTorchEngine):
    def generate(self, batch: Batch) -> Generated:
        super().generate(batch)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
