"""Build the prompts of a pass: token ids, or texts for an engine that takes them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pytest_llem.engines.protocol import BatchEngine, PreflightError
from pytest_llem.engines.shipped import THIS_ENVIRONMENT, Packages
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.dataset import HubDataset
from pytest_llem.workload.datasets import Prompt, fetch_dataset, file_problem, hub_problem, read_dataset, read_file


@dataclass(frozen=True)
class Texts:
    """The text prompts of a pass.

    Attributes:
        prompts: The texts in order.
        conversations: For each prompt, what the user says in its conversation, first the prompt.
        revision: Commit of their hub dataset; None if they are from a file.
    """

    prompts: list[str]
    revision: str | None = None
    conversations: list[Sequence[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """The prompts of a pass.

    Attributes:
        prompts: Token ids of each prompt; texts for an engine that takes them.
        digest: SHA-256 of the synthetic prompts, or of the texts before truncation.
        truncated: Number of prompts that were truncated to ``max_input_tokens``.
        revision: Commit of their hub dataset; None if they are not from the hub.
    """

    prompts: Sequence[Any]
    digest: str
    truncated: int = 0
    revision: str | None = None


def dataset_problem(
    config: ExperimentConfig, directory: Path, packages: Packages = THIS_ENVIRONMENT
) -> str | None:
    """Return why the dataset cannot be read; None if no reason is known. Reads nothing and does not ask the hub.

    Args:
        config: The experiment.
        directory: Folder to which a dataset's path is relative.
        packages: The environment in which it will be read.
    """
    if not config.has_texts:
        return None
    dataset = str(config.dataset)
    on_hub = hub_dataset(dataset, directory)
    return hub_problem(on_hub, packages) if on_hub else file_problem(dataset, directory)


def hub_dataset(dataset: str, directory: Path) -> HubDataset | None:
    """Return the hub dataset that *dataset* names; None if it is not a hub name, or if a local path has that name.

    Args:
        dataset: The dataset's name in the study.
        directory: Folder to which a path is relative.
    """
    found = HubDataset.parse(dataset)
    return None if found is None or (found.name == dataset and (directory / dataset).exists()) else found


def read_texts(
    config: ExperimentConfig, directory: Path, on_fetch: Callable[[], None] = lambda: None
) -> Texts | None:
    """Return the ``n`` prompts of a pass as texts, in the order of ``dataset_order``; None if they are synthetic.

    For a load, they are the first ``n`` of the dataset, or all of them if they have to be distinct.

    Args:
        config: The experiment.
        directory: Folder to which a dataset's path is relative.
        on_fetch: Called before a hub dataset is fetched, from the hub or its cache.

    Raises:
        PreflightError: The dataset cannot be read or downloaded, or has too few prompts.
    """
    if not config.has_texts:
        return None
    dataset, revision = str(config.dataset), None
    if on_hub := hub_dataset(dataset, directory):
        if problem := hub_problem(on_hub):
            raise PreflightError(problem)
        on_fetch()
        folder = fetch_dataset(on_hub)
        prompts, revision = read_dataset(on_hub, folder), folder.name
    else:
        prompts = read_file(dataset, directory)
    if config.load is None or config.load.prompts == "repeated":
        if (count := len(prompts)) < config.n:
            has = f"has {count} prompt{'s' * (count != 1)}"
            raise PreflightError(f"dataset {dataset!r} {has}, but the experiment needs n: {config.n}")
        prompts = _ordered(prompts, config) if config.load is None else prompts[: config.n]
    return Texts([one.text for one in prompts], revision, [one.turns for one in prompts])


def _ordered(prompts: Sequence[Prompt], config: ExperimentConfig) -> list[Prompt]:
    """Return ``n`` of *prompts* in the order of ``dataset_order``."""
    if config.dataset_order == "shuffled":
        return random.Random(config.random_seed).sample(prompts, config.n)
    by_source: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    rounds = chain.from_iterable(zip_longest(*by_source.values()))
    alternating = [prompt for prompt in rounds if prompt is not None][: config.n]
    if config.dataset_order == "grouped":
        ranks = {source: rank for rank, source in enumerate(by_source)}
        alternating.sort(key=lambda prompt: ranks[prompt.source])
    return alternating


def build_workload(config: ExperimentConfig, engine: BatchEngine, texts: Texts | None) -> Workload:
    """Return the prompts of a pass: *texts* truncated to ``max_input_tokens``, or synthetic ones of exact lengths.

    An engine that takes texts gets them whole.

    Raises:
        PreflightError: The tokenizer returns no tokens for a text.
    """
    shape = config.workload
    if texts is None:
        rng = random.Random(shape.seed)
        vocabulary = engine.vocabulary()
        prompts = [
            rng.choices(vocabulary, k=shape.lengths.draw(rng) if shape.lengths else shape.input_len)
            for _ in range(shape.n)
        ]
        return Workload(prompts, prompts_digest(prompts))
    if engine.takes_texts:
        return Workload(texts.prompts, texts_digest(texts, config), revision=texts.revision)
    encoded = [engine.encode(text) for text in texts.prompts]
    if [] in encoded:
        text = texts.prompts[encoded.index([])]
        raise PreflightError(
            f"dataset {config.dataset!r}: the tokenizer returns no tokens for the prompt {text!a}: remove it"
        )
    truncated = sum(len(ids) > shape.input_len for ids in encoded)
    prompts = [ids[: shape.input_len] for ids in encoded]
    return Workload(prompts, texts_digest(texts, config), truncated, texts.revision)


def other_prompts(
    config: ExperimentConfig, engine: BatchEngine, workload: Workload, purpose: str
) -> Sequence[Any]:
    """Return prompts as long as those of the pass, with random tokens: a repeated prompt may be cached.

    They hold random token ids of the vocabulary or, if the pass has texts, of these texts. For an engine that
    takes texts, they hold as many random words of these texts. Each *purpose*, such as ``warm-up``, has its own.
    """
    rng = random.Random(f"{purpose} {config.random_seed}")
    if config.has_texts and engine.takes_texts:
        words = [word for text in workload.prompts for word in text.split()]
        return [" ".join(rng.choices(words, k=len(text.split()))) for text in workload.prompts]
    ids = list(chain.from_iterable(workload.prompts)) if config.has_texts else engine.vocabulary()
    return [rng.choices(ids, k=len(prompt)) for prompt in workload.prompts]


def texts_digest(texts: Texts, config: ExperimentConfig) -> str:
    """Return the SHA-256 of an experiment's texts: its prompts or, of a load, all turns of its conversations."""
    return prompts_digest(texts.prompts if config.load is None else map("\n".join, texts.conversations))


def prompts_digest(prompts: Iterable[str | Sequence[int]]) -> str:
    """Return the SHA-256 of *prompts*, texts or token ids, each as one line of ASCII JSON."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
