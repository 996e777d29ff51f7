"""How the experiments of a study are run; none of it changes what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pytest_llem.study.section import NullableSection, Section, told

CycleOrder = Literal["sequential", "interleaved", "shuffled"]

StartMethod = Literal["spawn", "forkserver"]

Gap = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0)], told("must be 'auto' or a number of seconds, 0 or more")
]

#: Every :data:`CycleOrder`, and every :data:`StartMethod`.
CYCLE_ORDERS: tuple[CycleOrder, ...] = ("sequential", "interleaved", "shuffled")
START_METHODS: tuple[StartMethod, ...] = ("spawn", "forkserver")


class ExecutionConfig(NullableSection):
    """How a study is run.

    Attributes:
        n_cycles: Repetitions of every point, each in a process of its own. Default: 3 for a study, 1 for a
            single experiment.
        cycle_order: ``sequential`` (A A B B), ``interleaved`` (A B A B) or ``shuffled`` (each cycle in an
            order of its own). Default ``shuffled``.
        shuffle_seed: Seeds that order. Default null: taken from the study's design, so that a rerun shuffles
            alike.
        experiment_gap_seconds: Idle time before an experiment, in seconds, or ``auto``: until the GPU is as cool
            and as idle as before the first one. Default ``auto``.
        cycle_gap_seconds: Idle time before a new cycle, in seconds, where that is longer. Default 0.
        experiment_timeout_seconds: End an experiment that takes longer, in seconds from its turn, with what it has
            yet to import; the download of a model does not count. Default null: computed from the model's size,
            the prompts and the tokens, as the plan shows it.
        max_consecutive_failures: Once this many experiments have failed in a row, the study's others are skipped;
            null for never. Default 5.
        contended_retries: How often at most contended cycles of a point are measured again, all together.
            Default 1.
        start_method: ``spawn`` starts an interpreter for each experiment, which imports what it needs;
            ``forkserver`` forks each from one that has imported it and opens no device. Default ``spawn``.
        skip_preflight: Let experiments start without looking first whether they can run. Default false.
    """

    NULL_MEANS: ClassVar[frozenset[str]] = frozenset({"max_consecutive_failures"})

    n_cycles: int | None = Field(None, ge=1)
    cycle_order: CycleOrder = "shuffled"
    shuffle_seed: int | None = None
    experiment_gap_seconds: Gap = "auto"
    cycle_gap_seconds: float = Field(0.0, ge=0)
    experiment_timeout_seconds: float | None = Field(None, gt=0)
    max_consecutive_failures: int | None = Field(5, ge=1)
    contended_retries: int = Field(1, ge=0)
    start_method: StartMethod = "spawn"
    skip_preflight: bool = False


class Rule(Section):
    """One entry of ``skip`` or ``xfail``: points that are not run, or are expected to fail.

    Attributes:
        where: Value by axis or field (``precision``, ``batch_size``, ``decoder.temperature``); a list holds any
            of several. All have to fit. Required.
        reason: What pytest shows. Default: what ``where`` says.
    """

    where: dict[str, Any] = Field(min_length=1)
    reason: str = ""


@dataclass(frozen=True)
class Overrides:
    """What the command line says of a study, over what its file says.

    Attributes:
        n_cycles: Repetitions of every point, or None for the file's.
        cycle_order: Their order, or None for the file's.
        start_method: How their processes come to be, or None for the file's way.
        no_gaps: No idle time between experiments.
        strict: A combination that is left out is an error.
        max_experiments: A study of more is an error, or None for no such limit.
        timeout_seconds: Deadline of every experiment, in seconds, or None for the file's.
    """

    n_cycles: int | None = None
    cycle_order: CycleOrder | None = None
    start_method: StartMethod | None = None
    no_gaps: bool = False
    strict: bool = False
    max_experiments: int | None = None
    timeout_seconds: float | None = None
