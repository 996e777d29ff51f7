"""The prompts of a pass, as token ids."""

from __future__ import annotations

import json
import random
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


def build_workload(config: ExperimentConfig, engine: Engine, directory: Path) -> Workload:
    """Return the prompts *config* asks for.

    Args:
        config: The experiment.
        engine: Loaded; it knows the vocabulary.
        directory: What a dataset's path is relative to.

    Raises:
        PreflightError: The dataset cannot be had, or holds too few prompts.
    """
    workload = config.workload
    if not isinstance(config.dataset, str) or config.dataset == "synthetic":
        rng = random.Random(workload.seed)
        vocabulary = engine.vocabulary()
        return Workload([rng.choices(vocabulary, k=workload.input_len) for _ in range(workload.n)])
    texts = _read_texts(config.dataset, directory)
    if len(texts) < workload.n:
        raise PreflightError(
            f"dataset {config.dataset!r} holds {len(texts)} prompts, and the experiment asks for n: {workload.n}"
        )
    encoded = [engine.encode(text) for text in texts[: workload.n]]
    truncated = sum(len(ids) > workload.input_len for ids in encoded)
    return Workload([ids[: workload.input_len] for ids in encoded], truncated)


def _read_texts(dataset: str, directory: Path) -> list[str]:
    path = directory / Path(dataset).expanduser()
    readers = {".txt": _lines, ".jsonl": _objects}
    if path.suffix not in readers:
        raise PreflightError(f"dataset {dataset!r}: expected 'synthetic', or a .txt or .jsonl file")
    try:
        return readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error


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
