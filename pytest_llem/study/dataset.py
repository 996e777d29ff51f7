"""Define the ``dataset`` of an experiment: synthetic prompts, files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pytest_llem.study.section import Section

#: Name of the dataset of random token ids.
SYNTHETIC = "synthetic"

#: Short names of hub datasets: AI Energy Score's 1,000 prompts for text generation.
ALIASES = {"aienergyscore": "AIEnergyScore/text_generation"}

#: Suffixes of prompt files.
FILE_TYPES = (".txt", ".jsonl")

#: Fields of a dataset, and the experiment's fields that they set.
DATASET_FIELDS = {"n": "n", "input_len": "max_input_tokens", "output_len": "max_output_tokens"}

#: Upper limit of numbers of prompts and of tokens.
MAX_COUNT = 100_000_000

#: Without bounds, lengths are limited to this many standard deviations from their mean, as guidellm does.
_MAX_DEVIATIONS = 5

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]

_HUB = re.compile(
    r"(?P<name>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>refs/\w+/\w+|[^/:#@]+))?"
    r"(/(?P<subset>[^/:#@]+))?(:(?P<split>[^/:#@]+))?(#(?P<column>.+))?"
)


class LengthConfig(Section):
    """Distribution of the lengths of synthetic prompts, drawn with the dataset's seed, the same on every
    machine.
    """

    mean: Count | None = None
    """Mean of a normal distribution, in tokens, rounded and clipped to ``min`` and ``max``. Default null: a
    uniform distribution from ``min`` to ``max``.
    """
    stdev: float | None = Field(None, ge=0, le=MAX_COUNT)
    """Standard deviation of the normal distribution, in tokens. Default null: none. Required with ``mean``."""
    min: Count | None = None
    """Minimum, in tokens. Default: five times ``stdev`` below ``mean``, at least 1. Required without ``mean``."""
    max: Count | None = None
    """Maximum, in tokens. Default: five times ``stdev`` above ``mean``. Required without ``mean``."""

    @model_validator(mode="before")
    @classmethod
    def _bound(cls, data: Any) -> Any:
        """Fill in the default bounds, so that they are hashed and recorded."""
        if not isinstance(data, dict):
            return data
        mean, stdev = data.get("mean"), data.get("stdev")
        if type(mean) is not int or not isinstance(stdev, int | float) or not 0 <= stdev <= MAX_COUNT:
            return data
        reach = int(_MAX_DEVIATIONS * stdev)
        bounds = {"min": max(1, mean - reach), "max": min(MAX_COUNT, mean + reach)}
        return bounds | {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _goes_together(self) -> LengthConfig:
        if (self.mean is None) != (self.stdev is None):
            raise ValueError("needs mean and stdev together")
        if self.min is None or self.max is None:
            raise ValueError("needs mean and stdev, or min and max")
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        if self.mean is not None and not self.min <= self.mean <= self.max:
            raise ValueError(f"mean {self.mean} is not between min {self.min} and max {self.max}")
        return self

    @property
    def largest(self) -> int:
        """Maximum length of a prompt, in tokens."""
        assert self.max is not None
        return self.max

    def draw(self, rng: random.Random) -> int:
        """Return a random length of one prompt, in tokens."""
        assert self.min is not None
        if self.mean is None or self.stdev is None:
            return rng.randint(self.min, self.largest)
        return min(max(round(rng.gauss(self.mean, self.stdev)), self.min), self.largest)


class DatasetConfig(Section):
    """Description of synthetic prompts. Its values override the experiment's own fields."""

    n: Count | None = None
    """Number of prompts. Default: the experiment's ``n``."""
    input_len: Count | LengthConfig | None = None
    """Tokens in each prompt, or a distribution: ``{mean, stdev}``, ``{mean, stdev, min, max}`` or ``{min, max}``.
    The maximum length becomes the experiment's ``max_input_tokens``, from which time and memory are estimated.
    Default: the experiment's ``max_input_tokens``.
    """
    output_len: Count | None = None
    """Tokens to generate for each prompt. Default: the experiment's ``max_output_tokens``."""
    seed: int | None = Field(None, ge=0)
    """Seed of the token ids and of the lengths. Default: the experiment's ``random_seed``."""


def overrides(dataset: dict[str, Any]) -> dict[str, int]:
    """Return the valid values of the experiment's fields that *dataset*, as given in a study, sets."""
    given = {field: dataset.get(key) for key, field in DATASET_FIELDS.items()}
    lengths = given["max_input_tokens"]
    if isinstance(lengths, dict | LengthConfig):
        try:
            given["max_input_tokens"] = LengthConfig.model_validate(lengths).largest
        except ValidationError:  # reported when the whole dataset is validated
            given["max_input_tokens"] = None
    return {field: value for field, value in given.items() if type(value) is int and 0 < value <= MAX_COUNT}


@dataclass(frozen=True)
class WorkloadShape:
    """Number and lengths of an experiment's prompts.

    Attributes:
        n: Number of prompts.
        input_len: Maximum number of tokens in a prompt.
        output_len: Maximum number of tokens to generate for a prompt.
        seed: Seed of synthetic prompts.
        lengths: Distribution of the lengths of synthetic prompts; None if all have ``input_len``.
    """

    n: int
    input_len: int
    output_len: int
    seed: int
    lengths: LengthConfig | None = None


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub: ``owner/name@revision/subset:split#column``. Only the name is required.

    Attributes:
        name: ``owner/name``.
        revision: Branch, tag, commit, or reference such as ``refs/convert/parquet``; None for the main branch.
        subset: Configuration of the dataset; None for the default one.
        split: Name of the split; None for ``train`` or the only one.
        column: Column of the prompts; None to search for it.
    """

    name: str
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        parts = (("@", self.revision), ("/", self.subset), (":", self.split), ("#", self.column))
        return self.name + "".join(f"{mark}{part}" for mark, part in parts if part is not None)

    @classmethod
    def parse(cls, text: str) -> HubDataset | None:
        """Return the hub dataset that *text*, a name or an alias, refers to; None if it cannot be one."""
        found = None if text.endswith(FILE_TYPES) else _HUB.fullmatch(ALIASES.get(text, text))
        return cls(**found.groupdict()) if found else None
