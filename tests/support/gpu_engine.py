"""The engine ``pytorch`` on a scripted GPU, which draws a fixed energy for each token. The CPU computes.

On shared CPU cores the duration of the same work varies, and so would the energy of a GPU of constant power. Here
every generated token has a fixed energy, drawn while it was generated, in addition to the GPU's idle power. The
script is the file that LLEM_SCRIPTED_NVML names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import Batch, Generated, PyTorchEngine
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig

GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000001"

IDLE_W = 5.0

JOULES_PER_TOKEN = 10.0


class ScriptedGpuEngine(PyTorchEngine):
    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.gpus = [GPU]
        # The energy of a token does not depend on other load of the CPU, so contention is not checked.
        unknown = Contention(state="unknown", reasons=["scripted board: not looked for"])
        setattr(WindowObservers, "contention", lambda *_: unknown)  # noqa: B010 (a method, to mypy)

    def load(self) -> None:
        super().load()  # which names the devices that the model is on
        self.gpus = [GPU]

    def describe(self) -> EngineRecord:
        return super().describe().model_copy(update={"device": "cuda", "device_names": ["Scripted"]})

    def generate(self, batch: Batch) -> Generated:
        began = time.monotonic()
        generated = super().generate(batch)
        _draw(generated.output_ids.numel() * JOULES_PER_TOKEN, began, time.monotonic())
        return generated


def _draw(joules: float, began: float, ended: float) -> None:
    """Add *joules* between two past times to the script. The counter is read later, at the window's end."""
    script = Path(os.environ["LLEM_SCRIPTED_NVML"])
    text = script.read_text()
    start = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("start "))
    busy = IDLE_W + joules / (ended - began)
    lines = f"power {began - start:.9f} {busy:.6f}\npower {ended - start:.9f} {IDLE_W}\n"
    new = script.with_suffix(".new")
    new.write_text(text + lines)
    new.replace(script)
