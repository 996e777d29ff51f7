"""The prompts of a pass, as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
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


@dataclass(frozen=True)
class _Prompt:
    """A prompt of a file, and where it is from, as far as the file says."""

    text: str
    source: str | None = None


def dataset_problem(config: ExperimentConfig, directory: Path) -> str | None:
    """Return what keeps the dataset from being read, or None. The file is opened, and not read.

    Args:
        config: The experiment.
        directory: What a dataset's path is relative to.
    """
    if not config.has_texts:
        return None
    dataset = str(config.dataset)
    if Path(dataset).suffix not in _READERS:
        expected = "'synthetic', or a .txt or .jsonl file (no dataset of the Hugging Face hub)"
        return f"dataset {dataset!r}: expected {expected}"
    try:
        path = directory / Path(dataset).expanduser()
        if path.exists() and not path.is_file():  # a pipe, say, which opening would wait for
            return f"dataset {dataset!r} is no file"
        with path.open("rb"):
            return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        return f"dataset {dataset!r} cannot be read: {error}"


def read_texts(config: ExperimentConfig, directory: Path) -> list[str] | None:
    """Return the ``n`` prompts of a pass as texts, in the order asked for, or None where they are synthetic.

    Args:
        config: The experiment.
        directory: What a dataset's path is relative to.

    Raises:
        PreflightError: The dataset cannot be had, or holds too few prompts.
    """
    if not config.has_texts:
        return None
    if problem := dataset_problem(config, directory):
        raise PreflightError(problem)
    dataset = str(config.dataset)
    path = directory / Path(dataset).expanduser()
    try:
        prompts = _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error
    if len(prompts) < config.n:
        message = f"dataset {dataset!r} holds {len(prompts)} prompts, and the experiment asks for n: {config.n}"
        raise PreflightError(message)
    return [prompt.text for prompt in _ordered(prompts, config)]


def _ordered(prompts: Sequence[_Prompt], config: ExperimentConfig) -> list[_Prompt]:
    """Return ``n`` of *prompts* in the order of ``dataset_order``."""
    if config.dataset_order == "shuffled":
        return random.Random(config.random_seed).sample(prompts, config.n)
    by_source: dict[str | None, list[_Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    rounds = chain.from_iterable(zip_longest(*by_source.values()))
    in_turn = [prompt for prompt in rounds if prompt is not None][: config.n]
    if config.dataset_order == "grouped":
        places = {source: place for place, source in enumerate(by_source)}
        in_turn.sort(key=lambda prompt: places[prompt.source])
    return in_turn


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


def _lines(path: Path) -> list[_Prompt]:
    return [_Prompt(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _objects(path: Path) -> list[_Prompt]:
    return list(_each_object(path))


def _each_object(path: Path) -> Iterator[_Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = next(entry[key] for key in ("prompt", "text") if isinstance(entry.get(key), str))
        except (ValueError, AttributeError, StopIteration):
            raise PreflightError(
                f"{path}:{number}: expected a JSON object with a string under 'prompt' or 'text'"
            ) from None
        source = entry.get("source")
        if not isinstance(source, str | None):
            raise PreflightError(f"{path}:{number}: expected a string under 'source'")
        yield _Prompt(text, source)


_READERS: dict[str, Callable[[Path], list[_Prompt]]] = {".txt": _lines, ".jsonl": _objects}
