"""The engine ``pytorch`` as on a GPU: computed on the CPU, while a scripted board draws the energy of its tokens.

The time of the same work varies on shared cores, and with it the energy of a board of constant power. What a token
costs does not: here every one that the model has generated is so many joules, drawn while it was generated, beside
what the idle board draws all along. The script is the file that LLEM_SCRIPTED_NVML names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import Batch, Generated, PyTorchEngine
from pytest_llem.measurement.contention import ContentionWatch
from pytest_llem.results.contention import Contention
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig

GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000001"

IDLE_W = 5.0

JOULES_PER_TOKEN = 10.0


class BoardEngine(PyTorchEngine):
    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.gpus = [GPU]
        # A token's joules do not depend on who else uses the CPU: in this process, contention is not looked for.
        unknown = Contention(state="unknown", reasons=["scripted board: not looked for"])
        setattr(ContentionWatch, "end", lambda *_: unknown)  # noqa: B010 (a method, to mypy)

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
    """Have drawn so much more than idle; the counter is not looked at before the window's end, which is later."""
    script = Path(os.environ["LLEM_SCRIPTED_NVML"])
    text = script.read_text()
    start = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("start "))
    busy = IDLE_W + joules / (ended - began)
    lines = f"power {began - start:.9f} {busy:.6f}\npower {ended - start:.9f} {IDLE_W}\n"
    new = script.with_suffix(".new")
    new.write_text(text + lines)
    new.replace(script)
