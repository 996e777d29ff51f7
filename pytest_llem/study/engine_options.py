"""What an engine's class states to pytest-llem: its options in a study, and what an experiment needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from pytest_llem.study.section import NullableSection

if TYPE_CHECKING:  # which imports the options of engines
    from pytest_llem.study.config import ExperimentConfig


@dataclass(frozen=True)
class Needs:
    """What an experiment needs from the machine, as its engine states it before it is loaded.

    Attributes:
        gpus: Number of GPUs, all of one kind: 0 for none, None if the engine may use every visible one. With 1,
            the engine runs on the CPU if there is no GPU.
        sequences: Sequences that are generated at a time; None if unknown.
        compiles: Whether the engine may compile the model, which takes long.
        weight_bytes: Size of the weights in memory, in bytes; None to estimate it from ``precision``.
        seconds: Time of one pass over the prompts, in s; None to estimate it from the size of the model.
        recomputes: Whether every step computes all earlier tokens again, because there is no KV cache.
        offloads: Whether a part of the model is kept on the CPU or on disk.
        uses_torch: Whether the engine uses GPUs through PyTorch only. With a CPU build it then uses none.
        memory_share: Share of a GPU's memory that the engine reserves, 0 to 1; None if it takes what it needs.
        resolves_model: Whether the engine looks for ``model`` as the engine ``pytorch`` does. A missing or damaged
            model, and one that does not fit the device, is then reported before the run.
        model_revision: Branch, tag or commit of the model on the Hugging Face hub; None for its main branch.
        unused: Fields of the study that do not reach the engine, by dotted name, and why. A study that sets one is
            refused, and the field is null in the result.
        supports: Optional abilities of the engine's class, such as ``prefill_only``; None if unknown. It is filled
            in from the class: an engine does not state it.

    Example:
        >>> Needs(gpus=2, sequences=64, compiles=False)
    """

    gpus: int | None = None
    sequences: int | None = None
    compiles: bool = True
    weight_bytes: float | None = None
    seconds: float | None = None
    recomputes: bool = False
    offloads: bool = False
    uses_torch: bool = False
    memory_share: float | None = None
    resolves_model: bool = False
    model_revision: str | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    supports: frozenset[str] | None = None


class EngineOptions(NullableSection):
    """Base class of an engine's options: the fields of its section in a study.

    A field that is not given, or is null, has its default. Unknown fields and wrong values are refused.

    Example:
        >>> class MyOptions(EngineOptions):
        ...     batch_size: int = 1
        ...
        ...     def needs(self, config, parameters):
        ...         return Needs(gpus=0, sequences=self.batch_size, compiles=False)
        >>> class MyEngine:
        ...     options = MyOptions
    """

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> Self:
        """Return the options in the section of an experiment's engine.

        Raises:
            pydantic.ValidationError: An option is unknown, or its value is wrong.
        """
        return cls.model_validate(config.engine_section)

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        """Return what an experiment with these options needs. The default states nothing.

        Called without a device, and before the model is loaded.

        Args:
            config: The experiment.
            parameters: Number of the model's weights; None if unknown.

        Raises:
            ValueError: The options contradict other fields of the experiment. The message says why.
        """
        return Needs()
