"""Define the execution settings of a study, which do not change what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pytest_llem.study.section import NullableSection, Section, single_error

CycleOrder = Literal["sequential", "interleaved", "shuffled"]

StartMethod = Literal["spawn", "forkserver"]

Devices = Literal["same", "spread"]

Gap = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0)],
    single_error("must be 'auto' or a number of seconds, 0 or more"),
]

Cycles = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1)], single_error("must be 'auto' or a number of cycles, 1 or more")
]


class ExecutionConfig(NullableSection):
    """Execution settings of a study."""

    NULL_MEANS: ClassVar[frozenset[str]] = frozenset({"max_consecutive_failures"})

    n_cycles: Cycles | None = None
    """Repetitions of every point, each in a new process; ``auto`` repeats a point until its comparisons are
    decided, or without a comparison until its intervals are narrow. Default: 3 for a study, 1 for a single
    experiment.
    """
    min_cycles: int = Field(4, ge=2)
    """Minimum number of cycles with ``n_cycles: auto``. Default 4."""
    max_cycles: int = Field(20, ge=2)
    """Maximum number of cycles with ``n_cycles: auto``; those that are not needed are skipped. Default 20."""
    half_width: float = Field(0.02, gt=0, lt=1)
    """With ``n_cycles: auto`` and without a comparison, half the width of a metric's 95 % interval, relative to
    its mean, at which a point needs no more cycles (0.02 is 2 %). Default 0.02.
    """
    cycle_order: CycleOrder = "shuffled"
    """``sequential`` (A A B B), ``interleaved`` (A B A B) or ``shuffled`` (another random order in each cycle).
    Points that share a server follow each other. Default ``shuffled``.
    """
    shuffle_seed: int | None = None
    """Seed of the shuffled order. Default null: derived from the study's design, so that a rerun has the same
    order.
    """
    experiment_gap_seconds: Gap = "auto"
    """Idle time before an experiment, in seconds, or ``auto``: until the GPU is as cool and as idle as before the
    first experiment, at most 120 s. Default ``auto``.
    """
    cycle_gap_seconds: float = Field(0.0, ge=0)
    """Minimum idle time before a new cycle, in seconds. Default 0."""
    experiment_timeout_seconds: float | None = Field(None, gt=0)
    """Deadline of an experiment, in seconds after it gets its device. Imports count; the download of a model does
    not. Default null: computed from the model's size, the prompts and the tokens; the plan shows it.
    """
    max_consecutive_failures: int | None = Field(5, ge=1)
    """Skip the study's remaining experiments after this many consecutive failures; null for no such limit. Default
    5.
    """
    contended_retries: int = Field(1, ge=0)
    """Maximum number of repetitions of contended cycles, per point. Default 1."""
    start_method: StartMethod = "spawn"
    """``spawn`` starts a new interpreter for each experiment, which imports what it needs; ``forkserver`` forks
    each experiment from a process that has done these imports and opens no device. Default ``spawn``.
    """
    devices: Devices = "same"
    """GPUs of the cycles of a point, on a machine with more GPUs than an experiment needs. ``same``: all cycles
    run on the GPUs of the first one. ``spread``: each cycle runs on other GPUs, in rotation; the results say how
    much GPUs differ. Default ``same``.
    """
    server_reuse: Literal["load", "never"] = "load"
    """``load``: the points of a cycle that differ only in ``load``, ``measurement``, ``warmup`` or ``baseline``
    use one server, one after the other. ``never``: each experiment starts a server of its own. Default ``load``.
    """
    check_drift: bool = True
    """Measure the first of several loads on a server again, as the last one, and report how far the server has
    changed. Takes one more window for each server that several loads share. Default true.
    """
    skip_preflight: bool = False
    """Start experiments without checking first whether they can run. Default false."""

    @model_validator(mode="after")
    def _min_is_at_most_max(self) -> ExecutionConfig:
        if self.min_cycles > self.max_cycles:
            raise ValueError(f"min_cycles ({self.min_cycles}) must be at most max_cycles ({self.max_cycles})")
        return self

    @property
    def until_decided(self) -> bool:
        """Whether the number of cycles is determined during the run."""
        return self.n_cycles == "auto"

    @property
    def cycle_limit(self) -> int:
        """Repetitions of every point; the maximum if their number is determined during the run."""
        return self.max_cycles if self.n_cycles == "auto" else self.n_cycles or 1


class Rule(Section):
    """One entry of ``skip`` or ``xfail``: points that are not run, or are expected to fail."""

    where: dict[str, Any] = Field(min_length=1)
    """Value by axis or field (``precision``, ``batch_size``, ``decoder.temperature``), or a list of alternative
    values. All entries have to match. Required.
    """
    reason: str = ""
    """Reason that pytest shows. Default: the text of ``where``."""


@dataclass(frozen=True)
class Overrides:
    """Options that override a study file.

    Attributes:
        n_cycles: Repetitions of every point; None for the file's number.
        cycle_order: Order of the experiments; None for the file's order.
        start_method: Start method of experiment processes; None for the file's method.
        no_gaps: No idle time between experiments.
        strict: Report excluded combinations as errors.
        max_experiments: Maximum number of experiments; None for no limit.
        timeout_seconds: Deadline of every experiment, in s; None for the file's.
        interleave: What alternates in an interleaved comparison; None for the file's setting.
    """

    n_cycles: int | Literal["auto"] | None = None
    cycle_order: CycleOrder | None = None
    start_method: StartMethod | None = None
    no_gaps: bool = False
    strict: bool = False
    max_experiments: int | None = None
    timeout_seconds: float | None = None
    interleave: str | None = None
