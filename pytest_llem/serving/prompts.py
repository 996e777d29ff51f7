"""Make the requests of a load: distinct prompts, the same for the same seed and cycle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from pytest_llem.serving.client import LoadRequest, Prompt
from pytest_llem.serving.errors import DatasetExhaustedError
from pytest_llem.study.config import ExperimentConfig

#: Share of a vocabulary at each end from which no synthetic prompt is drawn, if special tokens are not known: they
#: are the first or the last ones.
_ENDS = 0.05


class CountedRequests(Iterator[LoadRequest]):
    """Yields the requests of an experiment, and counts them.

    Args:
        config: The experiment.
        texts: Texts of each request; None for synthetic prompts.
        vocabulary: Token ids of which synthetic prompts are made.
        cycle: Number of the cycle, which no other shares synthetic prompts with.
        first: Number of the first request.

    Attributes:
        taken: Number of requests so far.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        texts: Sequence[Sequence[str]] | None,
        vocabulary: Sequence[int],
        cycle: int,
        first: int,
    ) -> None:
        self._requests = (
            synthetic_requests(config, vocabulary, cycle, first)
            if texts is None
            else text_requests(config, texts, first)
        )
        self._exhausted: DatasetExhaustedError | None = None
        self.taken = 0

    def __next__(self) -> LoadRequest:
        """Return the next request.

        Raises:
            DatasetExhaustedError: All have been sent, and may not be repeated.
        """
        if self._exhausted is not None:  # a generator that has raised is at its end
            raise self._exhausted
        try:
            request = next(self._requests)
        except DatasetExhaustedError as error:
            self._exhausted = error
            raise
        self.taken += 1
        return request


def synthetic_requests(
    config: ExperimentConfig, vocabulary: Sequence[int], cycle: int, first: int = 0
) -> Iterator[LoadRequest]:
    """Yield requests of random token ids. Each depends only on the seed, the cycle and its number.

    Args:
        config: The experiment.
        vocabulary: Token ids to draw from.
        cycle: Number of the cycle: no other cycle has the same prompts.
        first: Number of the first request.
    """
    shape = config.workload
    for index in _indices(config, first):
        rng = random.Random(f"{shape.seed}:{cycle}:{index}")
        length = shape.lengths.draw(rng) if shape.lengths else shape.input_len
        yield LoadRequest(index, [rng.choices(vocabulary, k=length)], shape.output_len)


def text_requests(
    config: ExperimentConfig, prompts: Sequence[Sequence[str]], first: int = 0
) -> Iterator[LoadRequest]:
    """Yield requests of texts in their order.

    Args:
        config: The experiment.
        prompts: Texts of each request: several are the turns of a conversation.
        first: Number of the first request.

    Raises:
        DatasetExhaustedError: All have been sent, and may not be repeated.
    """
    assert config.server is not None
    is_chat = config.server.api == "chat"
    for index in _indices(config, first):
        if index >= len(prompts):
            raise DatasetExhaustedError(
                f"the dataset has {len(prompts)} prompts, and the server has got them all: use a larger dataset, "
                "or load.prompts: repeated"
            )
        turns: Sequence[Prompt] = prompts[index] if is_chat else prompts[index][:1]
        yield LoadRequest(index, turns, config.max_output_tokens)


def vocabulary_of(folder: Path) -> list[int] | None:
    """Return the token ids of a model's folder without special tokens; None if its files do not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = config.get("text_config", config)["vocab_size"]
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        special = {one["id"] for one in tokenizer.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return [token for token in range(size) if token not in special]


def vocabulary_of_size(size: int) -> range:
    """Return token ids of a vocabulary of which only the size is known."""
    return range(int(size * _ENDS), size - int(size * _ENDS))


def _indices(config: ExperimentConfig, first: int) -> Iterator[int]:
    """Yield the numbers of the prompts without end: distinct ones from *first* on, or ``n`` repeated ones."""
    assert config.load is not None
    if config.load.prompts == "distinct":
        yield from count(first)
    for index in count():
        yield index % config.n
