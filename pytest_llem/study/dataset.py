"""Where an experiment's prompts come from, as a study file says it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pytest_llem.study.section import Section

#: The dataset of random token ids.
SYNTHETIC = "synthetic"

#: Names for datasets of the Hugging Face hub. AI Energy Score's 1,000 prompts for text generation.
ALIASES = {"aienergyscore": "AIEnergyScore/text_generation"}

#: Files that hold prompts.
FILE_TYPES = (".txt", ".jsonl")

#: What a dataset gives of an experiment's own fields.
DATASET_FIELDS = {"n": "n", "input_len": "max_input_tokens", "output_len": "max_output_tokens"}

#: More prompts, or tokens in one, than any machine will see.
MOST = 100_000_000

#: Without bounds, lengths are kept within so many standard deviations of their mean: as guidellm does.
_WIDEST = 5

Count = Annotated[int, Field(ge=1, le=MOST)]

_HUB = re.compile(
    r"(?P<name>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>[^/:#@]+))?(/(?P<subset>[^/:#@]+))?"
    r"(:(?P<split>[^/:#@]+))?(#(?P<column>.+))?"
)


class LengthConfig(Section):
    """Lengths of synthetic prompts, drawn with the dataset's seed: the same on any machine.

    Attributes:
        mean: Mean of a normal distribution, in tokens; what is drawn is rounded and clipped to ``min`` and
            ``max``. Default null: lengths from ``min`` to ``max`` are all as likely.
        stdev: Standard deviation of the normal distribution, in tokens. Default null: there is none. Goes with
            ``mean``.
        min: The shortest, in tokens. Default: five times ``stdev`` below ``mean``, and 1 at least; without them
            it has to be given.
        max: The longest, in tokens. Default: five times ``stdev`` above ``mean``; without them it has to be
            given.
    """

    mean: Count | None = None
    stdev: float | None = Field(None, ge=0, le=MOST)
    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _bound(cls, data: Any) -> Any:
        """What is hashed and written down has its bounds, given or not."""
        if not isinstance(data, dict):
            return data
        mean, stdev = data.get("mean"), data.get("stdev")
        if type(mean) is not int or not isinstance(stdev, int | float) or not 0 <= stdev <= MOST:
            return data
        reach = int(_WIDEST * stdev)
        bounds = {"min": max(1, mean - reach), "max": min(MOST, mean + reach)}
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
        """The longest that a prompt can be."""
        assert self.max is not None
        return self.max

    def draw(self, rng: random.Random) -> int:
        """Return the length of one prompt, in tokens."""
        assert self.min is not None
        if self.mean is None or self.stdev is None:
            return rng.randint(self.min, self.largest)
        return min(max(round(rng.gauss(self.mean, self.stdev)), self.min), self.largest)


class DatasetConfig(Section):
    """Synthetic prompts, spelt out. What is given here wins over the experiment's own fields.

    Attributes:
        n: Number of prompts. Default: the experiment's ``n``.
        input_len: Tokens in each prompt, or a mapping that says how they are distributed: ``{mean, stdev}``,
            ``{mean, stdev, min, max}`` or ``{min, max}``. The longest that there can be is the experiment's
            ``max_input_tokens``, with which time and memory are estimated. Default: the experiment's
            ``max_input_tokens``.
        output_len: Tokens to generate for each. Default: the experiment's ``max_output_tokens``.
        seed: Seed of the token ids, and of the lengths. Default: the experiment's ``random_seed``.
    """

    n: Count | None = None
    input_len: Count | LengthConfig | None = None
    output_len: Count | None = None
    seed: int | None = Field(None, ge=0)


def overrides(dataset: dict[str, Any]) -> dict[str, int]:
    """Return what *dataset*, as it stands in a study, gives of an experiment's own fields, where that is valid."""
    given = {ours: dataset.get(its) for its, ours in DATASET_FIELDS.items()}
    lengths = given["max_input_tokens"]
    if isinstance(lengths, dict | LengthConfig):
        try:
            given["max_input_tokens"] = LengthConfig.model_validate(lengths).largest
        except ValidationError:  # told where the whole dataset is validated
            given["max_input_tokens"] = None
    return {ours: value for ours, value in given.items() if type(value) is int and value > 0}


@dataclass(frozen=True)
class WorkloadShape:
    """What the prompts of an experiment are like.

    Attributes:
        n: How many.
        input_len: Tokens in each, at most.
        output_len: Tokens to generate for each, at most.
        seed: Of synthetic prompts.
        lengths: How the lengths of synthetic prompts are distributed; None where all have ``input_len``.
    """

    n: int
    input_len: int
    output_len: int
    seed: int
    lengths: LengthConfig | None = None


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub: ``owner/name@revision/subset:split#column``, all but the first optional.

    Attributes:
        name: ``owner/name``.
        revision: Branch, tag or commit; null for its main branch.
        subset: One of its configurations; null for the default one.
        split: Null for ``train``, or its only one.
        column: The one that holds the prompts; null to look for it.
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
        """Return the dataset that *text*, or the alias in it, names; None where it cannot be one of the hub."""
        found = None if text.endswith(FILE_TYPES) else _HUB.fullmatch(ALIASES.get(text, text))
        return cls(**found.groupdict()) if found else None
