"""The protocol of an engine, and the values that it exchanges with the measurement."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.serving import ServerRecord
from pytest_llem.study.config import ExperimentConfig


class PreflightError(Exception):
    """Raised if the experiment cannot run here. The message says in one line what is missing and what to do.

    Example:
        >>> raise PreflightError("engine 'mine' needs a GPU: run it on a machine with one")
    """


class EngineCrashError(Exception):
    """Raised if a process that the experiment needs has ended. The error of the experiment is of kind ``crash``.

    Example:
        >>> raise EngineCrashError("the server of the engine was ended by SIGKILL")
    """


class ModelNotFoundError(PreflightError):
    """Raised if a model was not found. The message lists the places that were searched."""


class ShapeUnknownError(Exception):
    """Raised if a model's FLOPs do not follow from a :class:`ModelShape`. The message says why in one line."""


@dataclass(frozen=True)
class EngineContext:
    """What an engine gets from the run, in addition to the experiment's configuration.

    Attributes:
        model_path: Folders that hold models by name (the ini option ``llem_model_path``).
        gpus: UUIDs of the GPUs that are leased for the experiment; empty if none is leased.
        server: The running server, for the engine ``server``; None for the others.
        report_phase: Shows a phase of ``load`` on the live line, such as ``compiling``. Any thread may call it.
    """

    model_path: tuple[Path, ...] = ()
    gpus: tuple[str, ...] = ()
    server: ServerRecord | None = None
    report_phase: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class RequestRecord:
    """One request: when it was sent, when its answer came, and what the answer is.

    All times are on the clock of ``time.monotonic``, in s, and None if unknown. The meters use the same clock, and
    the result's ``window.began_at`` is the start of the window in UTC.

    Attributes:
        input_tokens: Number of prompt tokens, without padding; None if unknown.
        output_ids: Generated token ids up to and including the end-of-sequence token, without padding; None if the
            engine does not return them.
        sent: When the request was submitted to the engine, before any queue.
        token_times: When each output token arrived; empty if unknown. Tokens that arrived together have one time.
        first_token: When the first token arrived; if None, taken from ``token_times``.
        last_token: When the last token arrived; likewise.
        due: When the request should have been sent, if a schedule says so. Latencies then count from it, so that a
            late client does not hide a slow engine.
        admitted: When the engine began to process the request, if it has a queue.
        output_text: The answer as text, if the engine returns text.
        output_count: Number of output tokens, if ``output_ids`` is None and the engine knows the number.
        error: Why the request failed; None if it was answered. A failed request may have fewer tokens than asked
            for. The experiment continues, and no gate judges its metrics.
        cached_tokens: Number of prompt tokens that were taken from a prefix cache; None if unknown.

    Example:
        >>> record = RequestRecord(input_tokens=3, output_ids=[17, 4], sent=5.0, token_times=[5.5, 5.75])
        >>> record.ttft_s, record.itl_s, record.e2e_s
        (0.5, [0.25], 0.75)
    """

    input_tokens: int | None
    output_ids: Sequence[int] | None = None
    sent: float | None = None
    token_times: Sequence[float] = ()
    first_token: float | None = None
    last_token: float | None = None
    due: float | None = None
    admitted: float | None = None
    output_text: str | None = None
    output_count: int | None = None
    error: str | None = None
    cached_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.token_times):
            for name, place in (("first_token", 0), ("last_token", -1)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, self.token_times[place])

    @property
    def output_tokens(self) -> int | None:
        """Number of output tokens; None if unknown."""
        return self.output_count if self.output_ids is None else len(self.output_ids)

    @property
    def is_served(self) -> bool:
        """Whether the request was answered, with at least one token if their number is known."""
        return self.error is None and self.output_tokens != 0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, in s: from ``due``, or else from ``sent``."""
        return _difference(self.start, self.first_token)

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token, in s, from the same time as ``ttft_s``."""
        return _difference(self.start, self.last_token)

    @property
    def has_joint_tokens(self) -> bool:
        """Whether several tokens arrived together, as with speculative decoding."""
        return any(before == after for before, after in pairwise(self.token_times))

    @property
    def itl_s(self) -> list[float]:
        """Times between consecutive tokens, in s; empty if they are unknown, or if tokens arrived together."""
        if self.has_joint_tokens:
            return []
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first, in s; None for fewer than two tokens."""
        tokens, decoding = self.output_tokens, _difference(self.first_token, self.last_token)
        return None if decoding is None or tokens is None or tokens < 2 else decoding / (tokens - 1)

    @property
    def queue_s(self) -> float | None:
        """Time from ``sent`` until the engine began to process the request, in s."""
        return _difference(self.sent, self.admitted)

    @property
    def start(self) -> float | None:
        """When latencies count from: ``due``, or else ``sent``."""
        return self.sent if self.due is None else self.due


def _difference(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that determine its FLOPs and its memory traffic.

    The decoder has to pass every token through all of its layers once, and to cache the token's keys and values.

    Attributes:
        parameters: Weights of all linear layers except the head. Embeddings, norms and biases do not count.
        head_parameters: Weights of the head, which is used only for positions whose next token is chosen.
        attention_width: Query heads · head size, summed over the layers. If keys and values differ in size, the
            head size is their mean.
        kv_values_per_token: Number of key and value elements in the KV cache for one token, over all layers.
        kv_bytes_per_value: Size of one such element in bytes.
        weight_bytes: Size of the weights that a step reads, in bytes: all except embeddings that are only looked
            up. An input embedding that is also the head counts once.
        precision: Precision of the arithmetic, as named in :class:`pytest_llem.hardware.peaks.Peaks`.
        sliding_window: Tokens in the narrowest sliding window of attention; None if every layer attends to all.
    """

    parameters: int
    head_parameters: int
    attention_width: float
    kv_values_per_token: int
    kv_bytes_per_value: float
    weight_bytes: int
    precision: str
    sliding_window: int | None = None


class Engine(Protocol):
    """Runs a model in an experiment's own process.

    A study names an engine by its entry point in the group ``pytest_llem.engines``, or as
    ``package.module:Class``. It is created as ``Engine(config, context)`` in the experiment's process. Heavy
    imports belong there.

    Options: the class attribute ``options`` is a subclass of :class:`pytest_llem.EngineOptions`, and
    ``options.from_config(config)`` returns the options of an experiment. Unknown options and wrong
    values are refused before the run. A class without ``options`` has no options.
    ``config.passthrough_kwargs`` is refused unless ``reads_passthrough_kwargs`` is true. The engine has to honour
    ``config.precision``, ``config.decoder``, ``config.prompt_format``, ``config.workload.output_len`` and
    ``measurement.length_mode`` (``fixed``: exactly that many tokens, even if the model would end earlier). It has
    to refuse each of these that it does not support, and each of its own options that it does not support.

    This protocol does not say how requests reach the engine. To run whole passes over prompts, pytest-llem needs
    a :class:`BatchEngine`. A class that derives from the protocol has to define its abstract methods only.

    An engine may also implement :class:`SupportsModelShape`, :class:`SupportsPrefillOnly`,
    :class:`SupportsOptionCheck`, :class:`SupportsPreload`, :class:`SupportsCacheMemory`,
    :class:`SupportsExpectedWarnings` and :class:`SupportsProcesses`.
    """

    #: UUIDs of the GPUs that the engine may use, as its runtime reports them; empty on a CPU. After ``load``,
    #: those that it does use. Meters read exactly these GPUs.
    gpus: Sequence[str] = ()

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        """Import what is needed and choose the device.

        Raises:
            PreflightError: The experiment cannot run here.
        """

    def fetch(self) -> None:
        """Find the model and download its files. Neither timed nor metered.

        Raises:
            PreflightError: The model was not found or cannot be downloaded.
        """

    @abstractmethod
    def load(self) -> None:
        """Load the model.

        Raises:
            PreflightError: A package is not installed, or the model does not support the experiment's settings.
        """

    @abstractmethod
    def describe(self) -> EngineRecord:
        """Return versions, devices and effective settings after ``load``, and which settings were adjusted."""

    def synchronize(self) -> None:
        """Wait until the devices have finished all work."""

    def model_memory_bytes(self) -> int | None:
        """Return the size of weights and buffers in bytes; None if unknown."""

    def reset_peak_memory(self) -> None:
        """Start to record the peak memory use."""

    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory use since ``reset_peak_memory`` in bytes; None if unknown."""

    def close(self) -> None:
        """Release the model, and end every process that the engine has started.

        Called also if another method has raised, so there may be nothing to release. An error of ``close`` would
        hide the first one.
        """


class BatchEngine(Engine, Protocol):
    """An engine that generates for batches of prompts. pytest-llem runs whole passes over the prompts.

    The engine decides what a batch is, that is, the prompts of one ``generate`` call. Within a window, only
    ``seed``, ``generate`` and ``synchronize`` are called. Every pass of the window has the same prompts. So an
    engine that caches prompts or answers, such as by prefix caching, has to disable the cache, or to clear it in
    ``seed``, which is called at the beginning of every pass.

    Example:
        >>> class EchoEngine(BatchEngine):
        ...     latency_unknown_reason = "all tokens are returned at once"
        ...     options = EchoOptions  # class EchoOptions(EngineOptions): repeat: int = 1
        ...
        ...     def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        ...         self._repeat = EchoOptions.from_config(config).repeat
        ...
        ...     def generate(self, batch: Sequence[Sequence[int]]) -> list[list[int]]:
        ...         return [[*prompt] * self._repeat for prompt in batch]
        ...
        ...     ...  # the other methods of the protocol
    """

    #: Why the requests have no latencies; None if they have.
    latency_unknown_reason: str | None = None

    #: Why the numbers of output tokens are unknown; None if they are known.
    tokens_unknown_reason: str | None = None

    #: Whether ``prepare`` gets the texts of a dataset as they are, and not the token ids of :meth:`encode`. The
    #: number of input tokens is then unknown.
    takes_texts: bool = False

    #: Whether the engine generates for the prompts of one ``generate`` call together. If it divides them further,
    #: the result has no batch sizes.
    batch_sizes_known: bool = True

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt with special tokens.

        With ``prompt_format: chat`` they include the model's chat template.

        Raises:
            PreflightError: The engine takes no texts.
        """
        raise PreflightError("the engine has no tokenizer, and takes no texts: use a synthetic dataset")

    @abstractmethod
    def vocabulary(self) -> Sequence[int]:
        """Return the token ids that a synthetic prompt may hold, without special tokens."""

    @abstractmethod
    def prepare(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """Return the batches of *prompts* in their order, ready on the device.

        A prompt is a list of token ids, or a text of a dataset if ``takes_texts`` is true.

        Called with the window's prompts, and with other prompts of the same lengths. No gate judges an engine
        that answers repeated prompts faster.
        """

    def positions(self, batch: Any) -> int | None:
        """Return the number of input positions of *batch*, padding included; None if unknown."""

    def seed(self, seed: int) -> None:
        """Seed all random number generators of the engine."""

    @abstractmethod
    def generate(self, batch: Any) -> Any:
        """Generate for one batch and return what :meth:`requests` needs. May return before the device is done.

        The returned value is kept to the window's end, so it should hold no device memory.
        """

    @abstractmethod
    def requests(self, batch: Any, generated: Any) -> list[RequestRecord]:
        """Return the record of each prompt of *batch*. Called outside the window."""


@runtime_checkable
class SupportsModelShape(Protocol):
    """Optional: an engine that reports the shape of its model, from which FLOPs and roofline follow."""

    def shape(self) -> ModelShape:
        """Return the shape of the loaded model. Called after the measurement window.

        Raises:
            ShapeUnknownError: The computation does not follow from a shape.
        """


@runtime_checkable
class SupportsPrefillOnly(Protocol):
    """Optional: an engine that can stop after the first token, which ``measurement.prefill_split`` needs."""

    def generate_first(self, batch: Any) -> Any:
        """Do the same as ``generate``, with only one new token for each prompt of *batch*."""


@runtime_checkable
class SupportsOptionCheck(Protocol):
    """Optional: an engine whose options are checked by its library, beyond what the class of the options says."""

    @classmethod
    def check_options(cls, config: ExperimentConfig) -> Iterable[tuple[tuple[str, ...], str]]:
        """Return the options that the library refuses: key path in the configuration, and what is wrong."""


@runtime_checkable
class SupportsPreload(Protocol):
    """Optional: an engine that imports more than its own module, and can do so early."""

    @classmethod
    def preload(cls, config: ExperimentConfig, context: EngineContext) -> None:
        """Import what an experiment of *config* will import. Errors are ignored: the experiment reports them.

        Called before an engine is created: in a forkserver, whose processes share the imported modules, or while a
        process waits for its devices. It must not open a device, start a thread or use the network.
        """


@runtime_checkable
class SupportsExpectedWarnings(Protocol):
    """Optional: an engine whose library warns of what the experiment asks for."""

    #: Parts of these warnings. Results omit warnings that contain one of them.
    expected_warnings: Sequence[str]


@runtime_checkable
class SupportsProcesses(Protocol):
    """Optional: an engine whose model runs in processes that do not descend from the experiment's: a server."""

    #: Pids of these processes. Their descendants are included.
    processes: Sequence[int]


@dataclass(frozen=True)
class CacheMemory:
    """Memory of an engine that allocates its KV cache before it generates.

    Attributes:
        allocated_bytes: Size of the cache in bytes.
        used_bytes: Largest part of it that was in use since ``reset_peak_memory``, in bytes; None if unknown.
    """

    allocated_bytes: int
    used_bytes: int | None = None


@runtime_checkable
class SupportsCacheMemory(Protocol):
    """Optional: an engine that allocates its KV cache in advance. Its peak memory does not show what it needs."""

    def cache_memory(self) -> CacheMemory:
        """Return the size and use of the KV cache. Called after the measurement window."""
