"""Real weights quantised by bitsandbytes, on a CPU, in an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.weights import MODEL

pytestmark = pytest.mark.slow

BITSANDBYTES = "bitsandbytes==0.50.2"

#: transformers' defaults for 4 bits are tested without weights, in test_pytorch_loading.py.
OPTIONS: dict[str, dict[str, bool | str]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    },
}

RUN = """
import json, sys
from pathlib import Path
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from tests.support.tiny import config

model, folder, options = sys.argv[1:]
found = {}
for name, one in json.loads(options).items():
    fields = {"model": model, "decoder": {"do_sample": False}, "pytorch": one, "max_output_tokens": 1}
    engine = PyTorchEngine(config(**fields), EngineContext((Path(folder),)))
    engine.fetch()
    engine.load()
    (batch,) = engine.prepare([engine.encode("The capital of France is")])
    (request,) = engine.requests(batch, engine.generate(batch))
    record = engine.describe()
    found[name] = {
        "text": engine.decode(request.output_ids),
        "bytes": engine.model_memory_bytes(),
        "layer": type(engine._model.model.layers[0].mlp.up_proj).__name__,
        "recorded": record.settings["quantization"],
        "version": record.versions.get("bitsandbytes"),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bitsandbytes. Its requirements are already installed."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile")
    install = [sys.executable, "-m", "pip", "install", *options]
    done = subprocess.run([*install, "--target", folder, BITSANDBYTES], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        if os.environ.get("CI"):
            pytest.fail(f"{BITSANDBYTES} cannot be installed: {last}")
        pytest.skip(f"{BITSANDBYTES} cannot be installed: {last}")
    return folder


def test_quantised_weights_run_and_are_recorded(packages: Path, smollm2: Path) -> None:
    path = os.pathsep.join(filter(None, [str(packages), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", RUN, MODEL, str(smollm2), json.dumps(OPTIONS)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert {name: one["text"].strip(" .\n") for name, one in found.items()} == dict.fromkeys(OPTIONS, "Paris")
    layers = {name: one["layer"] for name, one in found.items()}
    assert layers == {"8 bits": "Linear8bitLt", "4 bits": "Linear4bit"}
    for name, one in found.items():
        assert one["version"] == BITSANDBYTES.partition("==")[2]
        assert {key: one["recorded"][key] for key in OPTIONS[name]} == OPTIONS[name]

    # 106.2 million weights in linear layers; embedding and head, 28.3 million, and norms stay bf16.
    # For each 64 weights of 4 bits there is a constant: of one byte, since constants are quantised too, or of 2
    # where bitsandbytes lays them out for the CPU; for each row of weights of 8 bits one of 4 bytes.
    linear, rest = 106_168_320, 2 * (28_311_552 + 35_136)
    assert linear / 2 + linear / 64 < found["4 bits"]["bytes"] - rest < 1.01 * (linear / 2 + 2 * linear / 64)
    rows = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    assert found["8 bits"]["bytes"] == pytest.approx(linear + 4 * rows + rest, abs=1000)
