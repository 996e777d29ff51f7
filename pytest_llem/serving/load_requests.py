"""Make the requests of a load: distinct prompts, the same for the same seed and cycle."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from pytest_llem.serving.client import LoadRequest, Prompt
from pytest_llem.serving.errors import DatasetExhaustedError
from pytest_llem.study.config import ExperimentConfig


class LoadRequests(Iterator[LoadRequest]):
    """Yields the requests of an experiment.

    Synthetic prompts are random token ids, each of which depends only on the seed, the cycle and its number. Texts
    are sent in their order.

    Args:
        config: The experiment.
        texts: Texts of each request: several are the turns of a conversation; None for synthetic prompts.
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
        self._config, self._texts, self._vocabulary, self._cycle = config, texts, vocabulary, cycle
        assert config.load is not None
        self._is_distinct = config.load.prompts == "distinct"
        self._next = first if self._is_distinct else 0
        self.taken = 0

    def __next__(self) -> LoadRequest:
        """Return the next request.

        Raises:
            DatasetExhaustedError: All have been sent, and may not be repeated.
        """
        index = self._next if self._is_distinct else self._next % self._config.n
        request = self._synthetic(index) if self._texts is None else self._of_texts(index, self._texts)
        self._next += 1
        self.taken += 1
        return request

    def _synthetic(self, index: int) -> LoadRequest:
        shape = self._config.workload
        rng = random.Random(f"{shape.seed}:{self._cycle}:{index}")
        length = shape.lengths.draw(rng) if shape.lengths else shape.input_len
        return LoadRequest(index, [rng.choices(self._vocabulary, k=length)], shape.output_len)

    def _of_texts(self, index: int, texts: Sequence[Sequence[str]]) -> LoadRequest:
        if index >= len(texts):
            raise DatasetExhaustedError(
                f"the dataset has {len(texts)} prompts, and the server has got them all: use a larger dataset, or "
                "load.prompts: repeated"
            )
        assert self._config.server is not None
        turns: Sequence[Prompt] = texts[index] if self._config.server.api == "chat" else texts[index][:1]
        return LoadRequest(index, turns, self._config.max_output_tokens)
