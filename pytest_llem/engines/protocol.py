"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig


class PreflightError(Exception):
    """Something the experiment needs is not there. The message says what, in one line, and what to do."""


class ModelNotFoundError(PreflightError):
    """A model that cannot be had; the message says where it was looked for."""


class ShapeUnknownError(Exception):
    """What a model computes cannot be told; the message says why, in one line."""


@dataclass(frozen=True)
class EngineContext:
    """What an engine may know beside its configuration.

    Attributes:
        model_path: Folders that hold models by name (the ini option ``llem_model_path``).
    """

    model_path: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RequestRecord:
    """What became of one prompt.

    Attributes:
        input_tokens: Without padding.
        output_ids: Up to and including the end of the sequence, without padding.
        ttft_s: From the generate call to the first token, in seconds; null where the engine cannot tell.
        itl_s: Between each token and the next, in seconds; one fewer than ``output_ids``, or empty where the
            engine cannot tell.
        e2e_s: From the generate call to the last token, in seconds; null where the engine cannot tell.
        error: Why the request failed, in words; null where it was answered. It may then have fewer tokens than
            asked for. The experiment goes on, and no gate judges its figures.
    """

    input_tokens: int
    output_ids: Sequence[int]
    ttft_s: float | None = None
    itl_s: Sequence[float] = field(default_factory=tuple)
    e2e_s: float | None = None
    error: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether it was answered, with a token at least."""
        return self.error is None and len(self.output_ids) > 0


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic and the memory traffic of a decoder follow from: every token goes through all of its
    layers once, and its keys and values are kept.

    Attributes:
        parameters: Weights of the layers that each token is multiplied with: all linear ones, without head,
            embeddings, norms and biases.
        head_parameters: Weights of the head, which a token is multiplied with where the next one is chosen.
        attention_width: Query heads · head size, summed over the layers; where keys and values differ in size,
            their mean is the head size.
        kv_values_per_token: Keys and values that are kept of a token, over all layers.
        kv_bytes_per_value: Size of one of these.
        weight_bytes: Weights that a step reads: all, but for embeddings that are only looked up. An input
            embedding that is the head as well counts once.
        precision: Of the arithmetic, as :class:`pytest_llem.hardware.peaks.Peaks` has it.
        window: Tokens of context that the layer with the narrowest sliding window sees; null where all see all.
    """

    parameters: int
    head_parameters: int
    attention_width: float
    kv_values_per_token: int
    kv_bytes_per_value: float
    weight_bytes: int
    precision: str
    window: int | None = None


class Engine(Protocol):
    """Runs a model. Found by name under the entry-point group ``pytest_llem.engines``, or as
    ``package.module:Class``, and made as ``Engine(config, context)`` in the experiment's own process, where
    alone it may import what it needs.

    ``config.engine_section`` holds its options: those that its class lists in ``option_names``, a collection of
    names. Others are refused before it is made; a class that lists none reads none. ``config.passthrough_kwargs``
    is refused likewise, unless ``reads_passthrough_kwargs`` is true. It honours ``config.precision``,
    ``config.decoder``, ``config.prompt_format``, ``config.workload.output_len`` and ``measurement.length_mode``
    (``fixed``: exactly that many tokens, whatever the model would end with). What it does not support of these, or
    among its arguments, it refuses.

    The engine decides what a batch is: one ``generate`` call's worth of prompts. Between ``prepare`` and
    ``requests`` it does nothing but generate; everything else happens outside the measured window.
    Every pass of the window brings the same prompts: an engine that caches prompts or answers, such as by prefix
    caching, switches that off, or empties the cache in ``seed``, with which every pass begins.

    Beside this it may be a :class:`SupportsModelShape`, :class:`SupportsPrefillOnly` or :class:`SupportsPreload`.
    """

    #: UUIDs of the GPUs it may run on, empty on a CPU, as its own runtime names them; after ``load`` of those that
    #: it runs on. Meters read exactly these.
    gpus: Sequence[str]

    #: Why its requests have no latencies; null where they do.
    no_latency: str | None

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        """Import what is needed and choose the device.

        Raises:
            PreflightError: It cannot run here.
        """

    def fetch(self) -> None:
        """Find the model and bring its files to this machine. Neither timed nor metered.

        Raises:
            PreflightError: The model cannot be had.
        """

    def load(self) -> None:
        """Load the model.

        Raises:
            PreflightError: Something that loading it needs is not installed, or the model cannot be used as the
                experiment has it.
        """

    def describe(self) -> EngineRecord:
        """Return what runs, as it is after ``load``, and which settings it had to adjust."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, special tokens and, with ``prompt_format: chat``, the model's chat
        template included.
        """

    def vocabulary(self) -> Sequence[int]:
        """Return the token ids a synthetic prompt may hold: no special ones."""

    def prepare(self, prompts: Sequence[Sequence[int]]) -> Sequence[Any]:
        """Return the batches of a pass, ready on the device.

        Called twice: with prompts for the warm-up, of the same lengths, and with those of the window. An engine
        that answers a prompt faster when it comes again is not judged by any gate.
        """

    def positions(self, batch: Any) -> int:
        """Return the input positions of *batch*, padding included."""

    def seed(self, seed: int) -> None:
        """Seed everything random in the engine."""

    def generate(self, batch: Any) -> Any:
        """Generate for one batch and return what :meth:`requests` needs. May return before the device is done.

        What it returns is kept to the window's end: nothing of it should be on the device.
        """

    def synchronize(self) -> None:
        """Return when the device has nothing left to do."""

    def requests(self, batch: Any, generated: Any) -> list[RequestRecord]:
        """Return what became of each prompt of *batch*; called outside the window."""

    def model_memory_bytes(self) -> int | None:
        """Return the size of weights and buffers."""

    def reset_peak_memory(self) -> None:
        """Start watching for the largest memory use."""

    def peak_memory_bytes(self) -> int | None:
        """Return the largest memory use since ``reset_peak_memory``."""

    def close(self) -> None:
        """Let go of the model."""


@runtime_checkable
class SupportsModelShape(Protocol):
    """An engine that tells what its model computes: without it there are no FLOPs, and no floor. Optional."""

    def shape(self) -> ModelShape:
        """Return the shape of the loaded model. Called outside the measured window, once it is over.

        Raises:
            ShapeUnknownError: What is computed does not follow from a shape.
        """


@runtime_checkable
class SupportsPrefillOnly(Protocol):
    """An engine that can stop after the first token, which ``measurement.prefill_split`` needs. Optional."""

    def generate_first(self, batch: Any) -> Any:
        """Do what ``generate`` does, up to one new token for each prompt of *batch*."""


@runtime_checkable
class SupportsPreload(Protocol):
    """An engine that imports more than its own module, and can do so ahead. Optional."""

    @classmethod
    def preload(cls, config: ExperimentConfig, context: EngineContext) -> None:
        """Import what an experiment of *config* is going to import; what fails is told when it runs.

        Called before there is an engine: in a forkserver, whose processes share what it has imported, or while a
        process waits for its turn. It opens no device, starts no thread and asks no network.
        """
