"""The engine ``pytorch``: run a model with PyTorch through transformers' ``generate``."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from pytest_llem.engines.models import ModelSource, context_length, model_damage, resolve_model, too_long_message
from pytest_llem.engines.options import check_options, in_section
from pytest_llem.engines.process_memory import peak_rss_bytes, reset_peak_rss
from pytest_llem.engines.protocol import (
    BatchEngine,
    EngineContext,
    ModelShape,
    PreflightError,
    RequestRecord,
    ShapeUnknownError,
)
from pytest_llem.engines.pytorch import generation, loading, placement
from pytest_llem.engines.pytorch.adjusted import adjusted_settings
from pytest_llem.engines.pytorch.shape import model_shape, uncounted_reason
from pytest_llem.engines.shipped import unmet_by_pytorch
from pytest_llem.engines.tokenizer import PromptTokenizer, text_config
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig


@dataclass(frozen=True)
class Batch:
    """Prompts of one ``generate`` call, padded on the left.

    Attributes:
        input_ids: Token ids [prompts, longest prompt], on the device.
        attention_mask: 1 at tokens and 0 at padding [prompts, longest prompt], on the device.
        lengths: Number of tokens of each prompt, without padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """The result of one ``generate`` call.

    Attributes:
        output_ids: Token ids [prompts, generated tokens], on the host. They are kept to the window's end: on the
            device they would add to its peak memory.
        started: Time of the call in s, from ``time.monotonic``.
        token_times: Time at which each position's tokens reached the host, likewise; empty if unknown.
    """

    output_ids: torch.Tensor
    started: float
    token_times: Sequence[float]


class _TokenClock(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Records when tokens arrive. ``generate`` passes it the prompt first, and then the tokens of each step.

    It adds no wait for the device: ``generate`` reads back the stop condition of each step anyway.

    Args:
        on_first: Called when the first token has arrived and decoding begins.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self._prompt_seen = False
        self._on_first = on_first

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.monotonic())
            if len(self.times) == 1:
                self._on_first()
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: every token has already been recorded."""


class PyTorchEngine(BatchEngine):
    """The engine ``pytorch``: one model, batches of ``batch_size`` prompts.

    A subclass has the same options in its own section of the study, and may add some.

    Example:
        >>> class MyOptions(PyTorchConfig):
        ...     my_option: int = 0
        >>> class MyEngine(PyTorchEngine):
        ...     options = MyOptions
    """

    options: type[PyTorchConfig] = PyTorchConfig
    reads_passthrough_kwargs = True

    @classmethod
    def preload(cls, config: ExperimentConfig, context: EngineContext) -> None:
        with suppress(PreflightError):  # reported when the experiment runs
            loading.preload_classes(cls._with_options(config), context)

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        if config.model is None:
            raise PreflightError("the engine needs a model: give model in the study")
        config = self._with_options(config)
        if missing := list(unmet_by_pytorch(config)):
            raise PreflightError("; ".join(missing))
        self._config = config
        self._options = config.pytorch or PyTorchConfig()
        self._context = context
        self._indices = placement.possible_gpus(self._options, config.backend)
        self._cudnn_attention_is_on = torch.backends.cuda.cudnn_sdp_enabled()
        loading.check_compiler(self._options, config.backend, self._indices)
        cache = self._options.cache_implementation or ""
        if cache.startswith("offloaded") and not self._indices:
            raise PreflightError(f"{config.backend}.cache_implementation {cache!r} needs a GPU, and there is none")
        self._device = torch.device("cuda", self._indices[0]) if self._indices else torch.device("cpu")
        self.gpus: Sequence[str] = _uuids(self._indices)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        transformers_logging.disable_progress_bar()
        # Only the special tokens depend on the model. So wrong arguments are reported before it is downloaded.
        self._generation = self._generation_config(generation.SpecialTokens())
        self.latency_unknown_reason = generation.latency_unknown_reason(self._generation)
        self._model: Any = None
        self._prompts: PromptTokenizer
        self._source: ModelSource | None = None
        self._peak_is_known = False

    @classmethod
    def _with_options(cls, config: ExperimentConfig) -> ExperimentConfig:
        """Return *config* with the options of its engine under ``pytorch``, also for a subclass of that engine.

        Raises:
            PreflightError: An option of a subclass is unknown, or its value is wrong.
        """
        if config.pytorch is None:
            check_options(cls, config)
        return in_section(cls, config, "pytorch")

    def _generation_config(self, tokens: generation.SpecialTokens) -> Any:
        with generation.refusals_as_preflight(self._config):
            return generation.generation_config(self._config, tokens)

    def fetch(self) -> None:
        name = self._config.model_name
        self._source = resolve_model(name, self._context.model_path, self._options.revision)
        if damage := model_damage(name, self._source):
            raise PreflightError(damage)
        loading.import_class(self._source, self._options)

    def load(self) -> None:
        config, source = self._config, self._source
        assert source is not None, "fetch first"
        self.seed(config.random_seed)  # weights missing in the model's files are initialised at random
        self._prompts = PromptTokenizer(source, config, loading.origin(self._options))
        self._model = loading.load_model(source, config, self._device)
        self._device, self._indices = placement.input_device(self._model), placement.used_gpus(self._model)
        self.gpus = _uuids(self._indices)
        self._generation = self._generation_config(
            generation.SpecialTokens.of(self._model, self._prompts.tokenizer)
        )
        # transformers fills unset fields of a call's configuration from the model's: replace that one, too.
        self._model.generation_config = self._generation
        self.synchronize()

    def describe(self) -> EngineRecord:
        model, source, options = self._model, self._source, self._options
        assert source is not None, "load first"
        gpus = placement.used_gpus(model)
        versions = {name: package_version(name) for name in ("torch", "transformers", "tokenizers")}
        quantises = options.load_in_4bit or options.load_in_8bit
        if quantises or options.device_map is not None:
            versions["accelerate"] = package_version("accelerate")
        if quantises:
            versions["bitsandbytes"] = package_version("bitsandbytes")
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
            versions["cudnn"] = _dotted(torch.backends.cudnn.version())
        placed = getattr(model, "hf_device_map", None)
        return EngineRecord(
            name="pytorch",
            versions={name: found for name, found in versions.items() if found},
            device="cuda" if gpus else "cpu",
            device_names=[torch.cuda.get_device_name(index) for index in gpus],
            settings={
                "dtype": str(loading.main_dtype(model)).removeprefix("torch."),
                "attn_implementation": text_config(model.config)._attn_implementation,
                "torch_compile": loading.compile_settings(options),
                "quantization": loading.quantisation_of(model),
                "hf_device_map": {name: str(place) for name, place in placed.items()} if placed else None,
                "architecture": type(model).__name__,
                "parameters": model.num_parameters(),
                "num_threads": torch.get_num_threads(),
                "num_interop_threads": torch.get_num_interop_threads(),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
                "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
                "generation": generation.as_data(self._generation),
                **({"tokenizer": "none"} if self._prompts.tokenizer is None else {}),
            },
            adjusted=adjusted_settings(model, self._config, source),
            **source.provenance(),
            random_weights=source.random_weights or getattr(model.config, "random_weights", False) is True,
        )

    def encode(self, text: str) -> list[int]:
        return self._prompts.encode(text)

    def vocabulary(self) -> Sequence[int]:
        return self._prompts.vocabulary(self._model.config)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids* without special tokens. The model must have a tokenizer."""
        return self._prompts.decode(ids)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> list[Batch]:
        self._check_context(prompts)
        size = self._options.batch_size
        return [self._batch(prompts[start : start + size]) for start in range(0, len(prompts), size)]

    def _check_context(self, prompts: Sequence[Sequence[int]]) -> None:
        """Check that the longest prompt and its answer fit the model's context. transformers only warns.

        Raises:
            PreflightError: They do not fit.
        """
        limit = context_length(text_config(self._model.config).to_dict())
        longest, output = max(map(len, prompts)), self._config.workload.output_len
        if limit is not None and longest + output > limit:
            raise PreflightError(too_long_message(self._config.model_name, longest, output, limit))

    def _batch(self, prompts: Sequence[Sequence[int]]) -> Batch:
        lengths = tuple(map(len, prompts))
        shape = (len(prompts), max(lengths))
        ids = torch.full(shape, self._generation.pad_token_id, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
        return Batch(ids.to(self._device), mask.to(self._device), lengths)

    def positions(self, batch: Batch) -> int:
        return int(batch.input_ids.numel())

    def seed(self, seed: int) -> None:
        set_seed((seed ^ seed >> 32) % 2**32)  # NumPy accepts, and torch on a CPU uses, only 32 bits

    def generate(self, batch: Batch) -> Generated:
        return self._run(batch, self._generation)

    def generate_first(self, batch: Batch) -> Generated:
        first = copy.copy(self._generation)
        first.max_new_tokens = 1
        if first.min_new_tokens is not None:  # if it were unset, transformers would fill it from the model's
            first.min_new_tokens = 1
        return self._run(batch, first)

    def _run(self, batch: Batch, options: GenerationConfig) -> Generated:
        clock = _TokenClock(self._make_decoding_deterministic)
        watch = {} if self.latency_unknown_reason else {"streamer": clock}
        if self.latency_unknown_reason:  # the beginning of decoding is not observable
            self._make_decoding_deterministic()
        started = time.monotonic()
        try:
            with torch.inference_mode(), generation.refusals_as_preflight(self._config):
                sequences = self._model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=options,
                    **watch,
                )
        finally:
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn_attention_is_on)
        # Copies on a CPU, too: a view would keep the prompts' part alive. The copy adds no wait for the device, as
        # the last stop condition has been read back.
        new = sequences[:, batch.input_ids.shape[1] :].to("cpu", torch.int32)
        return Generated(new, started, clock.times)

    def _make_decoding_deterministic(self) -> None:
        """Disable cuDNN's attention for decoding, if the experiment has to be deterministic.

        Among PyTorch's kernels it alone returned different results for equal input (H100, PyTorch 2.11). In
        prefill, where it is the fastest, its results were equal.
        """
        if self._options.deterministic:
            torch.backends.cuda.enable_cudnn_sdp(False)

    def synchronize(self) -> None:
        for index in self._indices:
            torch.cuda.synchronize(index)

    def requests(self, batch: Batch, generated: Generated) -> list[RequestRecord]:
        eos = self._generation.eos_token_id
        ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        records = []
        for length, ids in zip(batch.lengths, generated.output_ids.tolist(), strict=True):
            answer = ids[: next((at for at, token in enumerate(ids, 1) if token in ends), None)]
            times = generated.token_times[: len(answer)]
            records.append(RequestRecord(length, answer, generated.started, times))
        return records

    def shape(self) -> ModelShape:
        if reason := uncounted_reason(self._generation):
            raise ShapeUnknownError(reason)
        return model_shape(self._model)

    def model_memory_bytes(self) -> int:
        model = self._model
        tensors = [*model.parameters(), *model.buffers(), *loading.constants(model)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reset_peak_memory(self) -> None:
        for index in self._indices:
            torch.cuda.reset_peak_memory_stats(index)
        if not self._indices:
            self._peak_is_known = reset_peak_rss()

    def peak_memory_bytes(self) -> int | None:
        if self._indices:
            return int(sum(torch.cuda.max_memory_allocated(index) for index in self._indices))
        return peak_rss_bytes() if self._peak_is_known else None  # without the reset it would include loading

    def close(self) -> None:
        self._model = None


def _uuids(indices: Sequence[int]) -> Sequence[str]:
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indices]


def _dotted(cudnn: int | None) -> str | None:
    """Return a cuDNN version with dots, from its number: 91002, or 8902 before version 9."""
    if cudnn is None:
        return None
    major, rest = divmod(cudnn, 10_000 if cudnn >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"
