"""The prompts of a pass, as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.backends.protocol import Engine, PreflightError
from pytest_llem.study.config import ExperimentConfig


@dataclass(frozen=True)
class Workload:
    """What a pass consists of.

    Attributes:
        prompts: Token ids of each prompt.
        truncated: How many were cut to ``max_input_tokens``.
    """

    prompts: list[list[int]]
    truncated: int = 0


def dataset_problem(config: ExperimentConfig, directory: Path) -> str | None:
    return None


def read_texts(config: ExperimentConfig, directory: Path) -> list[str] | None:
    """Return the dataset's first ``n`` prompts as text, or None where they are synthetic.

    Args:
        config: The experiment.
        directory: What a dataset's path is relative to.

    Raises:
        PreflightError: The dataset cannot be had, or holds too few prompts.
    """
    dataset = config.dataset
    if not isinstance(dataset, str) or dataset == "synthetic":
        return None
    readers = {".txt": _lines, ".jsonl": _objects}
    reader = readers.get(Path(dataset).suffix)
    if reader is None:
        raise PreflightError(f"dataset {dataset!r}: expected 'synthetic', or a .txt or .jsonl file")
    try:
        texts = reader(directory / Path(dataset).expanduser())
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~nobody
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error
    if len(texts) < config.n:
        message = f"dataset {dataset!r} holds {len(texts)} prompts, and the experiment asks for n: {config.n}"
        raise PreflightError(message)
    return texts[: config.n]


def build_workload(config: ExperimentConfig, engine: Engine, texts: Sequence[str] | None) -> Workload:
    """Return the prompts of a pass: *texts* cut to ``max_input_tokens``, or synthetic ones of exactly that."""
    shape = config.workload
    if texts is None:
        rng = random.Random(shape.seed)
        vocabulary = engine.vocabulary()
        return Workload([rng.choices(vocabulary, k=shape.input_len) for _ in range(shape.n)])
    encoded = [engine.encode(text) for text in texts]
    truncated = sum(len(ids) > shape.input_len for ids in encoded)
    return Workload([ids[: shape.input_len] for ids in encoded], truncated)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _objects(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts.append(next(entry[key] for key in ("prompt", "text") if isinstance(entry.get(key), str)))
        except (ValueError, AttributeError, StopIteration):
            raise PreflightError(
                f"{path}:{number}: expected a JSON object with a string under 'prompt' or 'text'"
            ) from None
    return texts
