"""PyTorch through transformers' ``generate``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from pytest_llem.backends.models import ModelSource, resolve_model
from pytest_llem.backends.process_memory import peak_rss_bytes, reset_peak_rss
from pytest_llem.backends.protocol import EngineContext, PreflightError, RequestRecord
from pytest_llem.results.environment import package_version
from pytest_llem.results.models import EngineRecord
from pytest_llem.study.config import ExperimentConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """Prompts of one ``generate`` call, padded on the left.

    Attributes:
        input_ids: [prompts, longest] token ids, on the device.
        attention_mask: [prompts, longest], 1 at each token and 0 at padding, on the device.
        lengths: Tokens of each prompt, without padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """What one ``generate`` call gave.

    Attributes:
        sequences: [prompts, longest + generated] token ids, on the device.
        started: When it was called, on the performance counter, in seconds.
        token_times: When each position's tokens reached the host, likewise.
    """

    sequences: torch.Tensor
    started: float
    token_times: Sequence[float]


class _TokenClock(BaseStreamer):  # type: ignore[misc]  # untyped there
    """Notes when tokens arrive. ``generate`` hands it the prompt first, then each step's tokens.

    It adds no wait for the device: ``generate`` reads each step's stop condition back anyway.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


class PyTorchEngine:
    """The engine ``pytorch``: one model on one device, batches of ``pytorch.batch_size`` prompts."""

    no_latency: str | None = None

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        self._config = config
        self._options = config.engine_section
        self._context = context
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.gpus: list[str] = []
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            self.gpus = [f"GPU-{properties.uuid}"]
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        transformers_logging.disable_progress_bar()
        self._model: Any = None
        self._tokenizer: Any = None
        self._generation: Any = None
        self._source: ModelSource | None = None

    def fetch(self) -> None:
        self._source = resolve_model(self._config.model, self._context.model_path, self._options["revision"])

    def load(self) -> None:
        config, options, source = self._config, self._options, self._source
        assert source is not None, "fetch first"
        origin = {"revision": options["revision"]} if options["revision"] else {}
        origin["trust_remote_code"] = options["trust_remote_code"]
        self._tokenizer = AutoTokenizer.from_pretrained(source.location, **origin)
        attention = options["attn_implementation"]
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=DTYPES[config.precision],
                **({"attn_implementation": attention} if attention else {}),
                **origin,
            )
        except ImportError as error:  # how transformers reports an attention kernel that is not installed
            raise PreflightError(" ".join(str(error).split())) from error
        self._model = model.to(self._device).eval()
        self._generation = self._generation_config()
        # Unset fields of a call's configuration are filled from the model's own: make it ours.
        self._model.generation_config = self._generation
        self.synchronize()

    def _generation_config(self) -> Any:
        config, decoder = self._config, self._config.decoder
        natural = config.measurement.length_mode == "natural"
        own = self._model.generation_config
        sampling = {}
        if decoder.do_sample:
            sampling = {"temperature": decoder.temperature, "top_k": decoder.top_k, "top_p": decoder.top_p}
            if decoder.min_p is not None:
                sampling["min_p"] = decoder.min_p
        eos = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        return GenerationConfig(
            max_new_tokens=config.workload.output_len,
            do_sample=decoder.do_sample,
            repetition_penalty=decoder.repetition_penalty,
            use_cache=self._options["use_cache"],
            cache_implementation=self._options["cache_implementation"],
            bos_token_id=own.bos_token_id,
            # Without an end-of-sequence token every sequence runs to its full length.
            eos_token_id=eos if natural else None,
            pad_token_id=self._pad_id(eos),
            **sampling,
        )

    def _pad_id(self, eos: int | Sequence[int] | None) -> int:
        for candidate in (self._tokenizer.pad_token_id, self._model.generation_config.pad_token_id, eos):
            if candidate is not None:
                return int(candidate if isinstance(candidate, int) else candidate[0])
        return 0

    def describe(self) -> EngineRecord:
        model, source = self._model, self._source
        assert source is not None, "load first"
        cuda = self._device.type == "cuda"
        versions = {name: package_version(name) for name in ("torch", "transformers", "tokenizers")}
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        return EngineRecord(
            name="pytorch",
            versions={name: found for name, found in versions.items() if found},
            device=self._device.type,
            device_names=[torch.cuda.get_device_name(self._device)] if cuda else [],
            settings={
                "dtype": str(model.dtype).removeprefix("torch."),
                "attn_implementation": model.config._attn_implementation,
                "architecture": type(model).__name__,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "num_threads": torch.get_num_threads(),
                "generation": self._generation.to_diff_dict(),
            },
            model_source=source.kind,
            model_revision=getattr(model.config, "_commit_hash", None),
            random_weights=source.random_weights,
        )

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def vocabulary(self) -> Sequence[int]:
        special = set(self._tokenizer.all_special_ids)
        size = min(len(self._tokenizer), self._model.config.vocab_size)
        return [token for token in range(size) if token not in special]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids*, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def prepare(self, prompts: Sequence[Sequence[int]]) -> list[Batch]:
        size = self._options["batch_size"]
        return [self._batch(prompts[start : start + size]) for start in range(0, len(prompts), size)]

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
        set_seed(seed % 2**32)  # NumPy takes no more

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def generate(self, batch: Batch) -> Generated:
        clock = _TokenClock()
        started = time.perf_counter()
        sequences = self._model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=self._generation,
            streamer=clock,
        )
        return Generated(sequences, started, clock.times)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def requests(self, batch: Batch, generated: Generated) -> list[RequestRecord]:
        eos = self._generation.eos_token_id
        ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        new = generated.sequences[:, batch.input_ids.shape[1] :].tolist()
        times = generated.token_times
        return [
            RequestRecord(
                input_tokens=length,
                output_ids=ids[:end],
                ttft_s=times[0] - generated.started,
                itl_s=[after - before for before, after in pairwise(times[:end])],
                e2e_s=times[end - 1] - generated.started,
            )
            for length, ids in zip(batch.lengths, new, strict=True)
            for end in [next((at for at, token in enumerate(ids, 1) if token in ends), len(ids))]
        ]

    def model_memory_bytes(self) -> int:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reset_peak_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak_rss()

    def peak_memory_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return peak_rss_bytes()

    def close(self) -> None:
        self._model = None
